"""The layers that blocks are made of: frozen linear layers with a LoRA in the same step, attention, what is recorded
for a recomputed block, and which layers a pattern selects. It imports flux2.utils. Begin with frozen_linear.py.
"""
