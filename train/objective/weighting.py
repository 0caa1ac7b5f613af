"""What a sample counts in the training loss by its time, beside how often its time is drawn
(train/objective/timesteps.py).

Both change what is learned in the same way, a density by how often and a weighting by how much, so use one of them. The
validation loss is never weighted, so that runs with different weightings can be compared.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from train.utils.checks import is_number


class Unweighted:
    """Every time counts the same, and nothing is computed."""

    def __call__(self, times: Tensor) -> Tensor | None:
        """Times (B,) from 0, the picture, to 1, the noise -> weights (B,); None stands for all 1."""
        return None


class SigmaSqrt(Unweighted):
    """`1 / s^2`, at most `most`: the less noise, the more a sample counts.

    The weighting that diffusers' training scripts call `sigma_sqrt`. They have no upper limit; without one, a single
    sample with next to no noise outweighs thousands.
    """

    def __init__(self, most: float | None = 100.0) -> None:
        if most is not None and not is_number(most, low=1):
            raise ValueError(f"weighting.most={most!r} must be a number from 1, or null")
        self.most = most

    def __call__(self, times: Tensor) -> Tensor:
        weights = times**-2.0
        return weights if self.most is None else weights.clamp(max=self.most)


class Cosmap(Unweighted):
    """`2 / (pi (1 - 2 s + 2 s^2))`: twice as much in the middle as at the ends, 1 on average over uniform times.

    The density that a cosine schedule has in rectified flow (Esser et al. 2024, eq. 21), used as a weight as in
    diffusers' training scripts (`weighting_scheme="cosmap"`).
    """

    def __call__(self, times: Tensor) -> Tensor:
        return 2 / (math.pi * (1 - 2 * times + 2 * times**2))


class Bell(Unweighted):
    """`exp(-2 (s - 1/2)^2) - exp(-1/2)`, scaled to 1 on average over uniform times: nothing at both ends.

    Source: DiffSynth-Studio's flow-matching scheduler, which several trainers took it from.
    """

    def __call__(self, times: Tensor) -> Tensor:
        edge = math.exp(-0.5)
        mean = math.sqrt(math.pi / 2) * math.erf(math.sqrt(0.5)) - edge
        return (torch.exp(-2 * (times - 0.5) ** 2) - edge) / mean
