"""Optimizers, learning-rate schedules, averages of weights, and the guard that skips non-finite updates. The package
imports train.utils and train.distributed, and conf/schedule names its exports. Begin with optimizers.py.
"""

from train.optim.schedules import Constant, Cosine, Linear, Restarts, StableDecay

__all__ = ["Constant", "Cosine", "Linear", "Restarts", "StableDecay"]
