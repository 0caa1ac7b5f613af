"""The world of the embedded model and of the demonstrations: drawings, tarot cards and the spotlight, and what
recognizes them in a picture. It imports no other package of data. Begin with drawings.py.
"""
