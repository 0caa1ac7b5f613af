"""Optimizers, learning-rate schedules, averages of weights, and the guard that skips non-finite updates. The package
implements conf/schedule, and builds what conf/optimizer names. It imports only packages that are earlier in README's
list. Begin with optimizers.py; `schedules.LearningRate` sets the rate of each step.
"""

from train.optim.schedules import Constant, Cosine, Linear, Restarts, StableDecay

__all__ = ["Constant", "Cosine", "Linear", "Restarts", "StableDecay"]
