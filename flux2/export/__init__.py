"""`python -m flux2.export`: adapters for other programs, conversion, and merged checkpoints. It imports only packages
that are earlier in README's list. Begin with command.py; deltas.py reads what an adapter adds to each weight, and
flux2/adapters/formats.py maps the key names of diffusers, ComfyUI and kohya.
"""
