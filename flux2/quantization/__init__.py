"""Frozen linear layers in FP8, INT8 and NF4, for text encoders also in INT8 by blocks, and `Precision`: which layers of
a model are stored how, and how they multiply. The package implements conf/precision. It imports only packages that are
earlier in README's list. Begin with precision.py, then base.py. Stored FP8 and NF4 weights are read by
flux2/weights/prequantized.py.
"""
