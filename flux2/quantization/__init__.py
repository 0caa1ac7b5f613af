"""Frozen linear layers in FP8, NF4 and INT8, and `Precision`: which layers of a model are stored how, and how they
multiply. Imports flux2.utils and flux2.layers. Start with precision.py, then base.py.
"""
