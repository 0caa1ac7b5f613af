"""`python -m flux2.export`: adapters for other programs, conversion, and merged checkpoints. It imports the rest of
flux2 but for other commands. Begin with command.py; deltas.py reads what an adapter adds to each weight.
"""
