"""Less memory for the same numbers: activation checkpointing, compiled blocks, blocks and activations in host memory.
It imports flux2.adapters and what stands below. Begin with activation_checkpointing.py, then block_offload.py.
"""
