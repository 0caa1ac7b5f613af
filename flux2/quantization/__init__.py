"""Frozen linear layers in FP8, NF4 and (for text encoders only) INT8, and `Precision`: which layers of a model are
stored how, and how they multiply. The package implements conf/precision. It imports only packages that are earlier in
README's list. Begin with precision.py, then base.py. Stored FP8 and NF4 weights are read by
flux2/weights/prequantized.py.
"""
