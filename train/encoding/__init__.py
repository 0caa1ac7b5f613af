"""Encoding before training: images and prompts into the cache, and class images drawn by the base. The package
implements conf/text_encoder. It imports only packages that are earlier in README's list. Begin with prepare.py; the
files of the cache are written by data/cache.
"""

from train.encoding.text_encoders import LocalTextEncoder, RemoteTextEncoder

__all__ = ["LocalTextEncoder", "RemoteTextEncoder"]
