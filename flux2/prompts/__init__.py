"""From prompts to embeddings: kept ones, a file of them, a text encoder here or on another machine, and rewritten
prompts. It imports flux2.weights and what stands below. Begin with embeddings.py, which asks each of the others.
"""
