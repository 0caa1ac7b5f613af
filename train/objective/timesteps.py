"""Distributions of training timesteps on [0, 1], where 0 is the image and 1 the noise.

A distribution draws the timestep of a sample from the sample's generator (train/objective/loss.py), and may then shift
it towards noise as sampling does: the odds s / (1 - s) are multiplied by exp(mu). Larger images need more noise until
they are equally hard to recognize (Esser et al. 2024, section 5.3.2), and the model was trained and is sampled that
way.

A range from `min` to `max` keeps the shape of a distribution: the timestep is drawn between the shares F(min) and
F(max) of its distribution function F, so that within the range all timesteps are as likely, relative to each other, as
without one.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
from torch import Tensor

from flux2.sampling import empirical_mu, shift
from flux2.utils.checks import MAX_STEPS
from train.utils.checks import check_count, is_number

SHIFTS = ("none", "resolution", "empirical")
ODDS = (1e-6, 1e6)  # factors of the odds; beyond them all timesteps are the image, or all are noise
MOST_LOGIT = 10.0  # likewise: the sigmoid of 10 is 0.99995
LEAST_SHARE = 1e-6  # of a distribution that a range must hold; what is left of less is rounding
BISECTIONS = 60  # after which an interval of length 1 is shorter than the distance of two float64 numbers near 1
MODE_SCALES = (-1.0, 2 / (math.pi - 2))  # outside this range the map from u to s is not monotonic within [0, 1]


class Uniform:
    """Uniform timesteps in [0, 1], whose odds are then multiplied.

    Args:
        shift: Factor of the odds. `none`: 1. `resolution`: exp(mu) with mu linear in the number of image tokens, from
            0.5 at 256 to 1.15 at 4096. `empirical`: exp(mu) with mu of the published sampling schedule, for the number
            of image tokens and `steps` steps. A number is used as it is.
        steps: Number of sampling steps for `empirical`; None takes the model's default.
        min, max: Range of the timesteps, after the shift.
    """

    def __init__(
        self, shift: str | float = "none", steps: int | None = None, min: float = 0.0, max: float = 1.0
    ) -> None:
        if shift not in SHIFTS and not is_number(shift, *ODDS):
            low, high = ODDS
            raise ValueError(
                f"timesteps.shift={shift!r} must be one of {', '.join(SHIFTS)}, or a number from {low:g} to {high:g}"
            )
        if steps is not None:
            check_count("timesteps.steps", steps, 1, MAX_STEPS)
        if steps is not None and shift != "empirical":
            raise ValueError(f"timesteps.steps={steps} has no effect with timesteps.shift={shift}, only with empirical")
        for key, value in (("min", min), ("max", max)):
            if not is_number(value, 0, 1):
                raise ValueError(f"timesteps.{key}={value!r} must be a number from 0 to 1")
        if min >= max:
            raise ValueError(f"timesteps.min={min} must be less than timesteps.max={max}. Lower one or raise the other")
        self.shift, self.steps, self.min, self.max = shift, steps, min, max
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
        if self.has_range:
            low, high = self.shares(tokens)
            drawn = low + (high - low) * torch.rand((), generator=generator, dtype=torch.float64).item()
            time = torch.tensor(self.quantile(drawn), dtype=torch.float64)
            return shift(time, self.mu(tokens)).clamp(self.min, self.max).float()  # against rounding
        time = self.unshifted(generator)
        return time if self.shift == "none" else shift(time, self.mu(tokens))

    def unshifted(self, generator: torch.Generator) -> Tensor:
        """Draw a timestep without shift and range."""
        return torch.rand((), generator=generator)

    def distribution(self, time: float) -> float:
        """Return the share of unshifted timesteps up to `time`."""
        return time

    def quantile(self, share: float) -> float:
        """Return the unshifted timestep up to which `share` of all are; the inverse of `distribution`."""
        return share

    @property
    def has_range(self) -> bool:
        return (self.min, self.max) != (0, 1)

    def shares(self, tokens: int) -> tuple[float, float]:
        """Return the shares of timesteps up to `min` and up to `max`, for an image of `tokens` tokens."""
        factor = math.exp(-self.mu(tokens))  # back from the shifted range

        def share(time: float) -> float:
            return self.distribution(factor * time / (1 - time + factor * time))

        return share(self.min), share(self.max)

    def check_range(self, tokens: int) -> None:
        """Raise ValueError if almost no timestep of an image of `tokens` tokens would be in the range."""
        low, high = self.shares(tokens) if self.has_range else (0.0, 1.0)
        if high - low < LEAST_SHARE:
            raise ValueError(
                f"timesteps.min={self.min} with timesteps.max={self.max}: only {high - low:.1g} of this distribution "
                f"is in that range, for images of {tokens} tokens. Widen the range, or choose another distribution"
            )


class LogitNormal(Uniform):
    """`s = sigmoid(n)`, n normal with `mean`, `std`; other arguments as above (Esser et al. 2024, eq. 19)."""

    most = MOST_LOGIT  # of `mean` and `std`

    def __init__(
        self,
        mean: float = 0.0,
        std: float = 1.0,
        shift: str | float = "resolution",
        steps: int | None = None,
        min: float = 0.0,
        max: float = 1.0,
    ) -> None:
        super().__init__(shift, steps, min, max)
        if not is_number(mean, -self.most, self.most):
            raise ValueError(f"timesteps.mean={mean!r} must be a number from {-self.most:g} to {self.most:g}")
        if not is_number(std, 1e-6, self.most):
            raise ValueError(f"timesteps.std={std!r} must be a positive number up to {self.most:g}")
        self.mean, self.std = mean, std

    @property
    def logits(self) -> NormalDist:
        """The distribution of `log(s / (1 - s))`."""
        return NormalDist(self.mean, self.std)

    def unshifted(self, generator: torch.Generator) -> Tensor:
        logits = self.logits
        return torch.sigmoid(logits.mean + logits.stdev * torch.randn((), generator=generator))

    def distribution(self, time: float) -> float:
        return self.logits.cdf(math.log(time / (1 - time))) if 0 < time < 1 else time

    def quantile(self, share: float) -> float:
        return 1 / (1 + math.exp(-self.logits.inv_cdf(share))) if 0 < share < 1 else share


class LogSNR(LogitNormal):
    """Timesteps whose `log((1 - s)^2 / s^2)`, the log signal-to-noise ratio, is normal with `mean` and `std`; other
    arguments as above. A low mean trains noisy timesteps, where a style is decided. ("Style-Friendly SNR Sampler", Choi
    et al. 2024, with mean -6 and deviation 2.)
    """

    most = 2 * MOST_LOGIT

    def __init__(
        self,
        mean: float = -6.0,
        std: float = 2.0,
        shift: str | float = "none",
        steps: int | None = None,
        min: float = 0.0,
        max: float = 1.0,
    ) -> None:
        super().__init__(mean, std, shift, steps, min, max)

    @property
    def logits(self) -> NormalDist:
        return NormalDist(-self.mean / 2, self.std / 2)


class Mode(Uniform):
    """`s = 1 - u - scale (cos^2(pi u / 2) - 1 + u)`, u uniform: a peak in the middle, with heavier tails than a
    logit-normal; other arguments as in `Uniform`. (Esser et al. 2024, eq. 20, "mode sampling with heavy tails".)

    Args:
        scale: Above 0 the middle is more likely, below 0 the ends; 0 is uniform.
    """

    def __init__(
        self,
        scale: float = 1.29,
        shift: str | float = "none",
        steps: int | None = None,
        min: float = 0.0,
        max: float = 1.0,
    ) -> None:
        super().__init__(shift, steps, min, max)
        if not is_number(scale, *MODE_SCALES):
            low, high = MODE_SCALES
            raise ValueError(f"timesteps.scale={scale!r} must be a number from {low:g} to {high:.4g}")
        self.scale = scale

    def unshifted(self, generator: torch.Generator) -> Tensor:
        u = torch.rand((), generator=generator)
        return (1 - u - self.scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)).clamp(0, 1)  # against rounding

    def distribution(self, time: float) -> float:
        low, high = 0.0, 1.0  # `quantile` rises, and has no inverse in closed form
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            low, high = (middle, high) if self.quantile(middle) < time else (low, middle)
        return high

    def quantile(self, share: float) -> float:
        return share - self.scale * (math.cos(math.pi * (1 - share) / 2) ** 2 - share)
