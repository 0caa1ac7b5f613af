"""Everything that is encoded once, before training: pictures, prompts and class pictures, into the cache. It imports
train.objective, train.distributed and train.utils. Begin with prepare.py; conf/text_encoder names what is exported
here.
"""

from train.encoding.text_encoders import LocalTextEncoder, RemoteTextEncoder

__all__ = ["LocalTextEncoder", "RemoteTextEncoder"]
