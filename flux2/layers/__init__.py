"""Building blocks of the networks: frozen linears fused with their LoRA, attention, the context in which a block is
recomputed, and the selection of layers by pattern. Imports flux2.utils. Start with frozen_linear.py.
"""
