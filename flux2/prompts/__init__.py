"""Turn prompts into embeddings: remembered ones, a file of them, a text encoder here or on another machine, and
rewritten prompts; and images into captions. It imports only packages that are earlier in README's list. Begin with
embeddings.py, which uses the others except captioning.py.
"""
