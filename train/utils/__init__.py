"""Helpers for all of train: checks, text, files, locks, console, signals, secrets, out-of-memory errors, progress.
The package imports only flux2 and data. The files are independent of each other; begin with files.py.
"""
