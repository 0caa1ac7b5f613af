"""Building blocks of the networks: frozen linears fused with their LoRA, attention, Triton kernels for what lies
between the products, the context in which a block is recomputed, and the selection of layers by pattern. It imports
only packages that are earlier in README's list. Begin with frozen_linear.py.
"""
