"""The training objective: flow loss, timestep distributions, loss weighting, and preservation of the base. The package
implements conf/timesteps, conf/weighting and conf/preservation. It imports only packages that are earlier in README's
list. Begin with loss.py.
"""

from train.objective.preservation import Preservation
from train.objective.prior import PriorPreservation
from train.objective.timesteps import LogitNormal, Mode, Uniform
from train.objective.weighting import Bell, Cosmap, SigmaSqrt, Unweighted

__all__ = [
    "Bell",
    "Cosmap",
    "LogitNormal",
    "Mode",
    "Preservation",
    "PriorPreservation",
    "SigmaSqrt",
    "Uniform",
    "Unweighted",
]
