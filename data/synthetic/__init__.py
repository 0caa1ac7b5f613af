"""The images of the embedded model and of the demonstrations: drawings, tarot cards and the spotlight, and code that
recognizes them in an image. It imports no other package. Begin with drawings.py.
"""
