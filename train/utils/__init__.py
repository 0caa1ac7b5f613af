"""Helpers for all of train: checks, text, files, locks, console, signals, secrets, out-of-memory errors, progress.
It imports no other package of train. Begin with files.py.
"""
