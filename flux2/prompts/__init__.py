"""Turn prompts into embeddings: remembered ones, a file of them, a text encoder here or on another machine, and
rewritten prompts. It imports only packages that are earlier in README's list. Begin with embeddings.py, which uses the
others.
"""
