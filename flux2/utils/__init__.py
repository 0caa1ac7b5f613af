"""Helpers for every part of flux2: argument checks, image files, signals, device choice, text, and what commands share.

It imports no other package. Begin with checks.py, whose errors name the argument.
"""
