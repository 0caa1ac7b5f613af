"""Which times are trained: densities on [0, 1], 0 being the picture and 1 the noise.

A density draws one time for one sample, from the generator that the sample is given (train/objective/loss.py), and may
then shift it towards noise as sampling does: the odds s / (1 - s) are multiplied by exp(mu). Larger pictures need more
noise until as little of them can be seen (Esser et al. 2024, section 5.3.2), and the model was trained and is sampled
that way.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flux2.sampling import empirical_mu, shift
from train.utils.checks import is_count, is_number

SHIFTS = ("none", "resolution", "empirical")
MODE_SCALES = (-1.0, 2 / (math.pi - 2))  # outside of them times are drawn twice, or beyond [0, 1]


class Uniform:
    """Every time in [0, 1] equally likely, then the odds multiplied.

    Args:
        shift: what by. `none`: nothing. `resolution`: exp(mu), mu linear in the number of image tokens from 0.5 at 256
            to 1.15 at 4096. `empirical`: exp(mu), mu being that of the published sampling schedule, for the picture's
            tokens and `steps` steps. A number: itself.
        steps: of sampling, for `empirical`; None takes those that the model is sampled with by default.
    """

    def __init__(self, shift: str | float = "none", steps: int | None = None) -> None:
        if shift not in SHIFTS and not is_number(shift, low=1e-6):
            raise ValueError(f"timesteps.shift={shift!r} must be {', '.join(SHIFTS)} or a positive number")
        if steps is not None and not is_count(steps, 1):
            raise ValueError(f"timesteps.steps={steps!r} must be a whole number from 1, or null")
        if steps is not None and shift != "empirical":
            raise ValueError(f"timesteps.steps={steps} does nothing with timesteps.shift={shift}: it is for empirical")
        self.shift, self.steps = shift, steps
        self.sampling_steps = steps

    def sampled_in(self, steps: int) -> None:
        """Tell how many steps the model is sampled with, which `empirical` follows unless `steps` was given."""
        self.sampling_steps = self.steps or steps

    def mu(self, tokens: int) -> float:
        """The log of what the odds are multiplied by, for a picture of `tokens` image tokens."""
        if self.shift == "none":
            return 0.0
        if self.shift == "resolution":
            return 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)
        if self.shift == "empirical":
            assert self.sampling_steps is not None, "the model's own steps are not known"
            return empirical_mu(tokens, self.sampling_steps)
        assert not isinstance(self.shift, str)
        return math.log(self.shift)

    def draw(self, generator: torch.Generator, tokens: int) -> Tensor:
        """A time, shape (), float32 on the CPU, for a picture of `tokens` image tokens."""
        time = self.unshifted(generator)
        return time if self.shift == "none" else shift(time, self.mu(tokens))

    def unshifted(self, generator: torch.Generator) -> Tensor:
        return torch.rand((), generator=generator)


class LogitNormal(Uniform):
    """`s = sigmoid(n)`, n normal with `mean` and `std`; `shift` and `steps` as above. (Esser et al. 2024, eq. 19.)"""

    def __init__(
        self, mean: float = 0.0, std: float = 1.0, shift: str | float = "resolution", steps: int | None = None
    ) -> None:
        super().__init__(shift, steps)
        if not is_number(mean):
            raise ValueError(f"timesteps.mean={mean!r} must be a number")
        if not is_number(std, low=1e-6):
            raise ValueError(f"timesteps.std={std!r} must be a positive number")
        self.mean, self.std = mean, std

    def unshifted(self, generator: torch.Generator) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.randn((), generator=generator))


class Mode(Uniform):
    """`s = 1 - u - scale (cos^2(pi u / 2) - 1 + u)`, u uniform: a hill in the middle, and more than a logit-normal has
    at the ends; `shift` and `steps` as above. (Esser et al. 2024, eq. 20, "mode sampling with heavy tails".)

    Args:
        scale: above 0 the middle is likelier, below 0 the ends, 0 is uniform.
    """

    def __init__(self, scale: float = 1.29, shift: str | float = "none", steps: int | None = None) -> None:
        super().__init__(shift, steps)
        if not is_number(scale, *MODE_SCALES):
            low, high = MODE_SCALES
            raise ValueError(f"timesteps.scale={scale!r} must be a number from {low:g} to {high:.4g}")
        self.scale = scale

    def unshifted(self, generator: torch.Generator) -> Tensor:
        u = torch.rand((), generator=generator)
        return (1 - u - self.scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)).clamp(0, 1)  # rounding leaves it
