"""The networks of FLUX.2 (transformer, autoencoder, text encoder), the published variants, and the tensors in between.

The package implements conf/model. It imports only packages that are earlier in README's list. Begin with variants.py,
then transformer.py.
"""
