"""Checkpoints: what one holds, which are kept, when one is written, and how a run resumes from it on the same data. It
imports train.optim, train.distributed and train.utils. Begin with checkpoint.py, then resume.py.
"""
