"""How far predictions are from their targets: the group `loss`, with masks and weights of samples.

A loss is the mean over each sample's tokens, and then over samples. If samples have masks, the first mean is weighted
by a sample's mask and the second is not: the masked area does not change the weight of a sample, nor does it matter
which samples share a micro-batch. Weights of samples by timestep are in train/objective/weighting.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from train.utils.checks import is_number

DELTAS = (1e-6, 1e6)  # below, a Huber loss is the absolute error in float32; above, it is the squared error
SCHEDULES = ("constant", "exponential")


@dataclass(frozen=True)
class MSE:
    """The mean of `d^2` over differences d of prediction and target."""

    def __call__(
        self,
        prediction: Tensor,
        target: Tensor,
        mask: Tensor | None = None,
        weights: Tensor | None = None,
        times: Tensor | None = None,
    ) -> Tensor:
        """Return the loss, shape (), of (B, n, C) tokens at timesteps (B,), which only some losses use.

        Per sample: sum(mask * mean over C of the distances) / sum(mask), with mask (B, n, 1). Over the batch: the mean
        of sample losses times weights (B,). A sample whose mask is 0 everywhere, as in a crop without unmasked pixels,
        has loss 0. None is 1 everywhere.
        """
        if mask is None and weights is None:
            return self.mean(prediction, target, times)
        losses = mean_of_tokens(self.distances(prediction, target, times), mask)
        return (losses if weights is None else losses * weights).mean()

    def mean(self, prediction: Tensor, target: Tensor, times: Tensor | None) -> Tensor:
        """Return the mean distance, shape (), of all numbers of all tokens."""
        return F.mse_loss(prediction, target)

    def distances(self, prediction: Tensor, target: Tensor, times: Tensor | None) -> Tensor:
        """Return the distance of each number, shape (B, n, C)."""
        return (prediction - target).square()


@dataclass(frozen=True)
class MAE(MSE):
    """The mean of `|d|`: a large difference has no more influence than a small one."""

    def mean(self, prediction: Tensor, target: Tensor, times: Tensor | None) -> Tensor:
        return self.distances(prediction, target, times).mean()

    def distances(self, prediction: Tensor, target: Tensor, times: Tensor | None) -> Tensor:
        return (prediction - target).abs()


@dataclass(frozen=True)
class Huber(MAE):
    """The mean of `d^2 / 2` up to |d| = delta, and of `delta (|d| - delta / 2)` beyond.

    Attributes:
        delta: Difference from which the loss grows linearly.
        delta_schedule: `constant`, or `exponential`: delta^t at timestep t, from 1 at the image to `delta` at the
            noise, as `huber_schedule` of kohya's scripts: outliers count less where there is more noise.
    """

    delta: float = 0.1
    delta_schedule: str = "constant"

    def __post_init__(self) -> None:
        if not is_number(self.delta, *DELTAS):
            low, high = DELTAS
            raise ValueError(f"loss.delta={self.delta!r} must be a number from {low:g} to {high:g}")
        if self.delta_schedule not in SCHEDULES:
            raise ValueError(f"loss.delta_schedule={self.delta_schedule!r} must be one of {', '.join(SCHEDULES)}")
        if self.delta_schedule != "constant" and self.delta == 1:
            raise ValueError(
                f"loss.delta_schedule={self.delta_schedule} has no effect with loss.delta=1, whose powers are 1. Set "
                "another loss.delta, or loss.delta_schedule=constant"
            )

    def distances(self, prediction: Tensor, target: Tensor, times: Tensor | None) -> Tensor:
        d, delta = (prediction - target).abs(), self.delta_at(times)
        return torch.where(d <= delta, d.square() / 2, delta * (d - delta / 2))

    def delta_at(self, times: Tensor | None) -> float | Tensor:
        """Return `delta`, or with a schedule that of each timestep (B,), shape (B, 1, 1)."""
        if self.delta_schedule == "constant":
            return self.delta
        assert times is not None
        return self.delta ** times[:, None, None]


@dataclass(frozen=True)
class PseudoHuber(Huber):
    """The mean of `sqrt(d^2 + delta^2) - delta`: smooth, |d| - delta for large and d^2 / (2 delta) for small |d|."""

    delta: float = 0.01

    def distances(self, prediction: Tensor, target: Tensor, times: Tensor | None) -> Tensor:
        delta = self.delta_at(times)
        return ((prediction - target).square() + delta**2).sqrt() - delta


def mean_of_tokens(distances: Tensor, mask: Tensor | None) -> Tensor:
    """Return each sample's mean (B,) of (B, n, C), its tokens weighted by mask (B, n, 1); 0 for a mask of zeros."""
    distances = distances.mean(-1, keepdim=True)  # (B, n, 1)
    if mask is None:
        return distances.mean((1, 2))
    counted = mask.sum((1, 2))
    return (distances * mask).sum((1, 2)) / torch.where(counted > 0, counted, 1)


flow_loss = MSE()  # of validation and preservation, which are the same in every run
