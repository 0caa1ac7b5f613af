"""Distributions of training timesteps on [0, 1], where 0 is the image and 1 the noise.

A distribution draws the timestep of a sample from the sample's generator (train/objective/loss.py), and may then shift
it towards noise as sampling does: the odds s / (1 - s) are multiplied by exp(mu). Larger images need more noise until
they are equally hard to recognize (Esser et al. 2024, section 5.3.2), and the model was trained and is sampled that
way.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flux2.sampling import empirical_mu, shift
from flux2.utils.checks import MAX_STEPS
from train.utils.checks import check_count, is_number

SHIFTS = ("none", "resolution", "empirical")
ODDS = (1e-6, 1e6)  # factors of the odds; beyond them all timesteps are the image, or all are noise
MOST_LOGIT = 10.0  # likewise: the sigmoid of 10 is 0.99995
MODE_SCALES = (-1.0, 2 / (math.pi - 2))  # outside this range the map from u to s is not monotonic within [0, 1]


class Uniform:
    """Uniform timesteps in [0, 1], whose odds are then multiplied.

    Args:
        shift: Factor of the odds. `none`: 1. `resolution`: exp(mu) with mu linear in the number of image tokens, from
            0.5 at 256 to 1.15 at 4096. `empirical`: exp(mu) with mu of the published sampling schedule, for the number
            of image tokens and `steps` steps. A number is used as it is.
        steps: Number of sampling steps for `empirical`; None takes the model's default.
    """

    def __init__(self, shift: str | float = "none", steps: int | None = None) -> None:
        if shift not in SHIFTS and not is_number(shift, *ODDS):
            low, high = ODDS
            raise ValueError(
                f"timesteps.shift={shift!r} must be one of {', '.join(SHIFTS)}, or a number from {low:g} to {high:g}"
            )
        if steps is not None:
            check_count("timesteps.steps", steps, 1, MAX_STEPS)
        if steps is not None and shift != "empirical":
            raise ValueError(f"timesteps.steps={steps} has no effect with timesteps.shift={shift}, only with empirical")
        self.shift, self.steps = shift, steps
        self.sampling_steps = steps

    def sampled_in(self, steps: int) -> None:
        """Set the model's number of sampling steps, which `empirical` uses unless `steps` was given."""
        self.sampling_steps = self.steps or steps

    def mu(self, tokens: int) -> float:
        """Return the log of the factor of the odds, for `tokens` image tokens."""
        if self.shift == "none":
            return 0.0
        if self.shift == "resolution":
            return 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
        if self.shift == "empirical":
            assert self.sampling_steps is not None, "sampled_in was not called"
            return empirical_mu(tokens, self.sampling_steps)
        assert not isinstance(self.shift, str)
        return math.log(self.shift)

    def draw(self, generator: torch.Generator, tokens: int) -> Tensor:
        """Draw a timestep, shape (), float32 on the CPU, for an image of `tokens` tokens."""
        time = self.unshifted(generator)
        return time if self.shift == "none" else shift(time, self.mu(tokens))

    def unshifted(self, generator: torch.Generator) -> Tensor:
        return torch.rand((), generator=generator)


class LogitNormal(Uniform):
    """`s = sigmoid(n)`, n normal with `mean`, `std`; `shift` and `steps` as above (Esser et al. 2024, eq. 19)."""

    def __init__(
        self, mean: float = 0.0, std: float = 1.0, shift: str | float = "resolution", steps: int | None = None
    ) -> None:
        super().__init__(shift, steps)
        if not is_number(mean, -MOST_LOGIT, MOST_LOGIT):
            raise ValueError(f"timesteps.mean={mean!r} must be a number from {-MOST_LOGIT:g} to {MOST_LOGIT:g}")
        if not is_number(std, 1e-6, MOST_LOGIT):
            raise ValueError(f"timesteps.std={std!r} must be a positive number up to {MOST_LOGIT:g}")
        self.mean, self.std = mean, std

    def unshifted(self, generator: torch.Generator) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.randn((), generator=generator))


class Mode(Uniform):
    """`s = 1 - u - scale (cos^2(pi u / 2) - 1 + u)`, u uniform: a peak in the middle, with heavier tails than a
    logit-normal; `shift` and `steps` as in `Uniform`. (Esser et al. 2024, eq. 20, "mode sampling with heavy tails".)

    Args:
        scale: Above 0 the middle is more likely, below 0 the ends; 0 is uniform.
    """

    def __init__(self, scale: float = 1.29, shift: str | float = "none", steps: int | None = None) -> None:
        super().__init__(shift, steps)
        if not is_number(scale, *MODE_SCALES):
            low, high = MODE_SCALES
            raise ValueError(f"timesteps.scale={scale!r} must be a number from {low:g} to {high:.4g}")
        self.scale = scale

    def unshifted(self, generator: torch.Generator) -> Tensor:
        u = torch.rand((), generator=generator)
        return (1 - u - self.scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)).clamp(0, 1)  # against rounding
