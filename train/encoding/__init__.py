"""Encoding before training: images and prompts into the cache, and class images drawn by the base. The package imports
train.objective, train.distributed and train.utils, and conf/text_encoder names its exports. Begin with prepare.py.
"""

from train.encoding.text_encoders import LocalTextEncoder, RemoteTextEncoder

__all__ = ["LocalTextEncoder", "RemoteTextEncoder"]
