"""A model's files: where they are, how tensors are named, read, written and loaded, and quantized copies on disk. It
imports flux2.models and what that imports. Begin with loading.py; sources.py says where the files are.
"""
