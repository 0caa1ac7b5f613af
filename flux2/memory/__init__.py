"""Ways to use less memory for the same numbers: activation checkpointing, compiled blocks, and offload of blocks and
activations to host memory. Imports flux2.adapters and everything below it. Start with activation_checkpointing.py, then
block_offload.py.
"""
