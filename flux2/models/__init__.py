"""The networks of FLUX.2 and what is published of each variant: transformer, autoencoder, text encoder, and the tensors
between them. It imports flux2.utils, layers and quantization. Begin with variants.py, then transformer.py.
"""
