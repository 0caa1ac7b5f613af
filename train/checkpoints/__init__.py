"""Checkpoints: their content, when they are written and deleted, and how a run resumes from one on the same data. It
imports only packages that are earlier in README's list. Begin with checkpoint.py, then resume.py.
"""
