"""What is learned: the flow loss, which times are drawn, what each counts, and what is preserved. It imports
train.utils and train.distributed. Begin with loss.py; conf/timesteps, weighting and preservation name what is exported
here.
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
