"""Which checkpoint is best, read from the folder of a run: losses, features of pictures, distances, findings. It knows
no configuration object. The package implements conf/features. It imports only packages that are earlier in README's
list. Begin with recommend.py.
"""

from train.evaluation.features import Clip, Latents, Vision

__all__ = ["Clip", "Latents", "Vision"]
