"""`python -m flux2.export`: adapters for other programs, conversion, and merged checkpoints. The package imports the
rest of flux2 except other commands. Begin with command.py; deltas.py reads what an adapter adds to each weight.
"""
