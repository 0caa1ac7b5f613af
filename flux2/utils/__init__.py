"""Helpers for every part of flux2: argument checks, image files, signals, device choice, text, and what commands share.

Imports nothing else of flux2. Start with checks.py, whose errors name the argument.
"""
