"""Optimizers, learning-rate schedules, averages of weights, and the guard that leaves out updates that are not finite.
It imports train.utils and train.distributed. Begin with optimizers.py; conf/schedule names what is exported here.
"""

from train.optim.schedules import Constant, Cosine, Linear, Restarts, StableDecay

__all__ = ["Constant", "Cosine", "Linear", "Restarts", "StableDecay"]
