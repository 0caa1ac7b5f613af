"""Model files: where they are, how tensors are named, read, written and loaded, and quantized copies on disk. It
imports only packages that are earlier in README's list. Begin with loading.py; sources.py finds the files,
prequantized.py reads weights that are stored in FP8 or NF4.
"""
