"""Turn prompts into embeddings: remembered ones, a file of them, a text encoder here or on another machine, and
rewritten prompts. The package imports flux2.weights and the packages below it. Begin with embeddings.py, which uses the
others.
"""
