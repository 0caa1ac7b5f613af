"""Which checkpoint is best, read from the folder of a run: losses, features of pictures, distances, findings. It knows
no configuration object. Begin with recommend.py; conf/features names what is exported here.
"""

from train.evaluation.features import Latents, Vision

__all__ = ["Latents", "Vision"]
