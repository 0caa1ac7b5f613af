"""The optimizer, and learning-rate schedules as functions of the step, so that resuming needs no state of theirs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import nn

from train.loss import is_number


class Schedule(Protocol):
    def factor(self, step: int, steps: int) -> float:
        """What the learning rate is multiplied by at `step` (from 0) of `steps`."""


class Constant:
    """Linear warm-up over `warmup_steps`, then flat."""

    def __init__(self, warmup_steps: int = 0) -> None:
        if not isinstance(warmup_steps, int) or isinstance(warmup_steps, bool) or warmup_steps < 0:
            raise ValueError(f"schedule.warmup_steps={warmup_steps!r} must be a whole number from 0")
        self.warmup_steps = warmup_steps

    def factor(self, step: int, steps: int) -> float:
        warm = min(1.0, (step + 1) / (self.warmup_steps + 1))
        return warm * self.after(max(0.0, (step - self.warmup_steps) / max(1, steps - self.warmup_steps)))

    def after(self, done: float) -> float:
        """The factor after the warm-up, `done` running from 0 to 1."""
        return 1.0


class Cosine(Constant):
    """Warm-up, then half a cosine down to `floor`."""

    def __init__(self, warmup_steps: int = 0, floor: float = 0.0) -> None:
        super().__init__(warmup_steps)
        if not is_number(floor, 0, 1):
            raise ValueError(f"schedule.floor={floor!r} must be a number from 0 to 1")
        self.floor = floor

    def after(self, done: float) -> float:
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


class Linear(Cosine):
    """Warm-up, then a straight line down to `floor`."""

    def after(self, done: float) -> float:
        return self.floor + (1 - self.floor) * (1 - min(done, 1.0))


def build(make: Callable[..., torch.optim.Optimizer], parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of the configuration on `parameters`. Raises ValueError naming the setting that it refused."""
    settings = getattr(make, "keywords", {})
    if not is_number(settings.get("lr"), low=0):
        raise ValueError(f"optimizer.lr={settings.get('lr')!r} must be a number from 0")
    try:
        return make(list(parameters))
    except (TypeError, ValueError, AssertionError, IndexError, RuntimeError) as error:
        given = ", ".join(f"optimizer.{key}={value!r}" for key, value in settings.items())
        raise ValueError(f"the optimizer refused its settings ({error}): {given}") from error


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
