"""Weights of samples in the training loss by timestep.

A weighting and a distribution of timesteps (train/objective/timesteps.py) have the same effect on the expected loss, so
use one of them. The validation loss is never weighted, so that runs with different weightings can be compared.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from train.utils.checks import is_number

LARGEST = 1e9  # of `most`; a sample with such a weight leaves nothing of the others in float32


class Unweighted:
    """The same weight for every timestep; nothing is computed."""

    def __call__(self, times: Tensor) -> Tensor | None:
        """Return weights (B,) for timesteps (B,) from 0, the image, to 1, the noise; None is 1 for all."""
        return None


class SigmaSqrt(Unweighted):
    """`1 / s^2`, at most `most`: a larger weight for less noise.

    This is `sigma_sqrt` of diffusers' training scripts, which have no upper limit; without one, a single sample with
    almost no noise outweighs thousands.
    """

    def __init__(self, most: float | None = 100.0) -> None:
        if most is not None and not is_number(most, 1, LARGEST):
            raise ValueError(f"weighting.most={most!r} must be a number from 1 to {LARGEST:g}, or null")
        self.most = most

    def __call__(self, times: Tensor) -> Tensor:
        weights = times**-2.0
        return weights if self.most is None else weights.clamp(max=self.most)


class Cosmap(Unweighted):
    """`2 / (pi (1 - 2 s + 2 s^2))`: twice as large in the middle as at the ends, with mean 1 over uniform timesteps.

    The density of a cosine schedule in rectified flow (Esser et al. 2024, eq. 21), used as a weight as in
    diffusers' training scripts (`weighting_scheme="cosmap"`).
    """

    def __call__(self, times: Tensor) -> Tensor:
        return 2 / (math.pi * (1 - 2 * times + 2 * times**2))


class Bell(Unweighted):
    """`exp(-2 (s - 1/2)^2) - exp(-1/2)`, scaled to mean 1 over uniform timesteps: 0 at both ends.

    Source: DiffSynth-Studio's flow-matching scheduler, from which several trainers took it.
    """

    def __call__(self, times: Tensor) -> Tensor:
        edge = math.exp(-0.5)
        mean = math.sqrt(math.pi / 2) * math.erf(math.sqrt(0.5)) - edge
        return (torch.exp(-2 * (times - 0.5) ** 2) - edge) / mean
