"""Checkpoints: their content, when they are written and deleted, and how a run resumes from one on the same data.
Imports train.optim, train.distributed and train.utils. Read checkpoint.py first, then resume.py.
"""
