"""The networks of FLUX.2 (transformer, autoencoder, text encoder), the published variants, and the tensors in between.

Imports flux2.utils, layers and quantization. Start with variants.py, then transformer.py.
"""
