"""The training objective: flow loss, timestep distributions, loss weighting, and preservation of the base. The package
implements conf/timesteps, conf/target, conf/loss, conf/weighting and conf/preservation. It imports only packages that
are earlier in README's list. Begin with noise.py, then objective.py.
"""

from train.objective.loss import DPO, MAE, MSE, Huber, PseudoHuber
from train.objective.preservation import BlankPreservation, ClassPreservation, Preservation
from train.objective.prior import PriorPreservation
from train.objective.target import ContrastiveGuidance, Flow, Slider, SliderImages
from train.objective.timesteps import LogitNormal, LogSNR, Mode, Uniform
from train.objective.weighting import Bell, Cosmap, SigmaSqrt, Unweighted

__all__ = [
    "DPO",
    "MAE",
    "MSE",
    "Bell",
    "BlankPreservation",
    "ClassPreservation",
    "ContrastiveGuidance",
    "Cosmap",
    "Flow",
    "Huber",
    "LogSNR",
    "LogitNormal",
    "Mode",
    "Preservation",
    "PriorPreservation",
    "PseudoHuber",
    "SigmaSqrt",
    "Slider",
    "SliderImages",
    "Uniform",
    "Unweighted",
]
