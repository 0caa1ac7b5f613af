"""Ways to use less memory for the same numbers: activation checkpointing, compiled blocks, fused kernels, offload of
blocks and activations to host memory, and the division of a model over several GPUs. The package implements
conf/memory, for which train/planner chooses values. It imports only packages that are earlier in README's list. Begin
with activation_checkpointing.py, then block_offload.py.
"""
