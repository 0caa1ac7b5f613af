"""Frozen linear layers whose weights are stored in FP8, NF4 or INT8, and the precision of a whole model. It imports
flux2.utils and flux2.layers. Begin with base.py, what all three share; precision.py applies them to a model.
"""
