"""Learning-rate schedules: a factor that is a function of the step alone, so that resuming needs no state.

`LearningRate.set` applies it to an optimizer before each step.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch

from train.optim.parameter_groups import FACTOR
from train.utils.checks import check_count, is_count, is_number


class Schedule(Protocol):
    def factor(self, step: int, steps: int) -> float:
        """Return the factor of the learning rate at `step` (from 0) of `steps`."""


class Constant:
    """Linear warm-up, then constant.

    Args:
        warmup_steps: Number of steps, or a share of all steps below 1, such as 0.1.
    """

    def __init__(self, warmup_steps: int | float = 0) -> None:
        if not is_count(warmup_steps) and not (is_number(warmup_steps, 0, 1) and warmup_steps < 1):
            raise ValueError(
                f"schedule.warmup_steps={warmup_steps!r} must be an integer >= 0, or a share of the steps below 1"
            )
        self.warmup_steps = warmup_steps

    def warmup(self, steps: int) -> int:
        """Return the number of warm-up steps in a run of `steps` steps."""
        warmup = self.warmup_steps
        return warmup if isinstance(warmup, int) else round(warmup * steps)

    def factor(self, step: int, steps: int) -> float:
        warmup = self.warmup(steps)
        warm = min(1.0, (step + 1) / (warmup + 1))
        return warm * self.after(max(0.0, (step - warmup) / max(1, steps - warmup)))

    def after(self, done: float) -> float:
        """Return the factor after the warm-up, as `done` goes from 0 to 1."""
        return 1.0


class Cosine(Constant):
    """Warm-up, then half a cosine down to the factor `floor`."""

    def __init__(self, warmup_steps: int | float = 0, floor: float = 0.0) -> None:
        super().__init__(warmup_steps)
        if not is_number(floor, 0, 1):
            raise ValueError(f"schedule.floor={floor!r} must be a number from 0 to 1")
        self.floor = floor

    def after(self, done: float) -> float:
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


class Linear(Cosine):
    """Warm-up, then linear decay to the factor `floor`."""

    def after(self, done: float) -> float:
        return self.floor + (1 - self.floor) * (1 - min(done, 1.0))


class Restarts(Cosine):
    """Warm-up, then `cycles` half cosines from the full rate down to `floor` (Loshchilov and Hutter 2017)."""

    def __init__(self, warmup_steps: int | float = 0, floor: float = 0.0, cycles: int = 3) -> None:
        super().__init__(warmup_steps, floor)
        check_count("schedule.cycles", cycles, 1)
        self.cycles = cycles

    def after(self, done: float) -> float:
        return super().after(self.cycles * done % 1 if done < 1 else 1.0)


class StableDecay(Linear):
    """Warm-up, constant, then linear decay to the factor `floor` (Hu et al. 2024, "warmup-stable-decay").

    Args:
        decay: Share of the steps after the warm-up in which the rate decays, above 0.
    """

    def __init__(self, warmup_steps: int | float = 0, floor: float = 0.0, decay: float = 0.2) -> None:
        super().__init__(warmup_steps, floor)
        if not is_number(decay, 0, 1) or decay == 0:
            raise ValueError(f"schedule.decay={decay!r} must be a number above 0, up to 1")
        self.decay = decay

    def after(self, done: float) -> float:
        return super().after(max(0.0, (done - (1 - self.decay)) / self.decay))


class LearningRate:
    """Sets the learning rate of each step: the configured rate times the factor of the schedule.

    Parameter groups with a factor of their own (train/optim/parameter_groups.py) get that rate times their factor.
    Create it before a checkpoint is loaded: the state of an optimizer contains the rate of its last step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: Schedule, steps: int) -> None:
        self.optimizer, self.schedule, self.steps = optimizer, schedule, steps
        self.base: float = optimizer.param_groups[0]["lr"]
        self.rate = self.base  # of the current step, without the factors of groups

    def set(self, step: int) -> None:
        """Set the learning rate of `step` (from 0)."""
        self.rate = self.base * self.schedule.factor(step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * group.get(FACTOR, 1.0)

    @property
    def value(self) -> float:
        """The current learning rate without the factors of groups, including Prodigy's estimate (`d`)."""
        return float(self.rate * self.optimizer.param_groups[0].get("d", 1.0))
