"""Optimizers, and learning-rate schedules as functions of the step, so that resuming needs no state of theirs."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any, Protocol

import torch
from torch import nn

from train.checks import is_count, is_number

MakeOptimizer = Callable[..., torch.optim.Optimizer]


class Schedule(Protocol):
    def factor(self, step: int, steps: int) -> float:
        """What the learning rate is multiplied by at `step` (from 0) of `steps`."""


class Constant:
    """Linear warm-up, then flat.

    Args:
        warmup_steps: a whole number of steps, or a share of all steps below 1, as 0.1.
    """

    def __init__(self, warmup_steps: int | float = 0) -> None:
        if not is_count(warmup_steps) and not (is_number(warmup_steps, 0, 1) and warmup_steps < 1):
            raise ValueError(
                f"schedule.warmup_steps={warmup_steps!r} must be a whole number from 0, or a share of the steps below 1"
            )
        self.warmup_steps = warmup_steps

    def warmup(self, steps: int) -> int:
        """Of so many steps, how many the warm-up takes."""
        given = self.warmup_steps
        return given if isinstance(given, int) else round(given * steps)

    def factor(self, step: int, steps: int) -> float:
        warmup = self.warmup(steps)
        warm = min(1.0, (step + 1) / (warmup + 1))
        return warm * self.after(max(0.0, (step - warmup) / max(1, steps - warmup)))

    def after(self, done: float) -> float:
        """The factor after the warm-up, `done` running from 0 to 1."""
        return 1.0


class Cosine(Constant):
    """Warm-up, then half a cosine down to `floor`."""

    def __init__(self, warmup_steps: int | float = 0, floor: float = 0.0) -> None:
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


class Restarts(Cosine):
    """Warm-up, then `cycles` times half a cosine from the whole rate down to `floor`. (Loshchilov and Hutter 2017.)"""

    def __init__(self, warmup_steps: int | float = 0, floor: float = 0.0, cycles: int = 3) -> None:
        super().__init__(warmup_steps, floor)
        if not is_count(cycles, 1):
            raise ValueError(f"schedule.cycles={cycles!r} must be a whole number from 1")
        self.cycles = cycles

    def after(self, done: float) -> float:
        return super().after(self.cycles * done % 1 if done < 1 else 1.0)


class StableDecay(Linear):
    """Warm-up, flat, then a straight line down to `floor` over the last part. (Hu et al. 2024, "warmup-stable-decay".)

    Args:
        decay: the share of the steps after the warm-up in which the rate falls, above 0.
    """

    def __init__(self, warmup_steps: int | float = 0, floor: float = 0.0, decay: float = 0.2) -> None:
        super().__init__(warmup_steps, floor)
        if not is_number(decay, 0, 1) or decay == 0:
            raise ValueError(f"schedule.decay={decay!r} must be a number above 0, up to 1")
        self.decay = decay

    def after(self, done: float) -> float:
        return super().after(max(0.0, (done - (1 - self.decay)) / self.decay))


# ------------------------------------------------------------------ optimizers

EXTRA = ("prodigyopt", "schedulefree")  # packages of the extra `optimizers`
MATRICES_ONLY = "Muon only supports 2D parameters"


def check_installed(target: object) -> None:
    """Raises ValueError if the optimizer called `target` is in a package that is not installed."""
    package = str(target).partition(".")[0]
    if package in EXTRA and find_spec(package) is None:
        raise ValueError(
            f"optimizer._target_={target} needs the package {package}: pip install 'flux2-lora[optimizers]'"
        )


def averages(optimizer: object) -> bool:
    """Whether an optimizer (or its class) trains other weights than those it is meant to be used with, as schedule-free
    ones do: `eval()` puts the averaged ones into the parameters, and `train()` those that are trained."""
    return hasattr(optimizer, "train") and hasattr(optimizer, "eval")


def is_share(value: object) -> bool:
    return is_number(value, 0, 1) and value != 1


def is_positive(value: object) -> bool:
    return is_number(value, 0) and value != 0


# what settings of these names may be, whichever optimizer takes them, and the words for it
ACCEPTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("lr", "eps", "d0", "d_coef"), (is_positive, "a positive number")),
    **dict.fromkeys(("weight_decay", "weight_lr_power", "r"), (partial(is_number, low=0), "a number from 0")),
    **dict.fromkeys(("momentum", "beta1", "beta2", "beta3"), (is_share, "a number from 0, below 1")),
    **dict.fromkeys(("warmup_steps", "min_8bit_size"), (is_count, "a whole number from 0")),
    **dict.fromkeys(("ns_steps", "slice_p"), (partial(is_count, low=1), "a whole number from 1")),
    **dict.fromkeys(
        ("amsgrad", "capturable", "decouple", "differentiable", "foreach", "is_paged", "maximize", "nesterov",
         "safeguard_warmup", "use_bias_correction"),
        (lambda value: isinstance(value, bool), "true or false"),
    ),
    "fused": (lambda value: value in (None, "auto") or isinstance(value, bool), "true, false or auto"),
    "growth_rate": (lambda value: value == math.inf or (is_number(value, 1) and value != 1), "above 1, or .inf"),
}  # fmt: skip
LISTS: dict[
    str, tuple[Callable[[Any], bool], str]
] = {  # likewise, of a list of as many as the optimizer's own default has
    "betas": (is_share, "in [0, 1)"),
    "eps": (is_positive, "above 0"),
    "ns_coefficients": (is_number, "that are finite"),
}
HIGH_RATE = 1.0  # Prodigy's; the others move each number by about as much in a step


def check_settings(make: MakeOptimizer) -> None:
    """Raises ValueError, naming the setting, for one that no optimizer can mean: many take it all the same.

    What an optimizer itself leaves empty may be null.
    """
    settings = dict(getattr(make, "keywords", {}))
    try:
        parameters = inspect.signature(getattr(make, "func", make)).parameters
        own = {name: parameter.default for name, parameter in parameters.items()}
    except ValueError:
        own = {}
    for key, value in {"lr": None, **settings}.items():
        default = own.get(key)
        if value is None and key in own and default is None:
            continue
        count = len(default) if isinstance(default, list | tuple) else 2 if key == "betas" else 0
        if key in LISTS and count:
            accepts, what = LISTS[key]
            empty = [item is None for item in default] if isinstance(default, list | tuple) else [False] * count
            right = isinstance(value, list | tuple) and len(value) == count
            if not right or not all(accepts(a) or (a is None and b) for a, b in zip(value, empty, strict=True)):
                raise ValueError(f"optimizer.{key}={value!r} must be {count} numbers {what}")
        elif key in ACCEPTED:
            accepts, what = ACCEPTED[key]
            if not accepts(value):
                raise ValueError(f"optimizer.{key}={value!r} must be {what}")


def doubts(make: MakeOptimizer, schedule: Schedule, steps: int) -> list[str]:
    """What of optimizer and schedule is allowed, and is hardly meant in a run of so many steps."""
    rate = getattr(make, "keywords", {}).get("lr", 0.0)
    found = []
    if rate > HIGH_RATE:
        found.append(
            f"optimizer.lr={rate:g} is far above what optimizers here are used with (1e-5 to 1e-2; prodigy: 1): "
            "training will hardly survive it"
        )
    if not isinstance(schedule, Constant):
        return found
    warmup, after = schedule.warmup(steps), steps - schedule.warmup(steps)
    if warmup >= steps:
        reached = schedule.factor(steps - 1, steps)
        found.append(
            f"schedule.warmup_steps={schedule.warmup_steps} is all of steps={steps}: the rate ends at {reached:.0%} of "
            "optimizer.lr, and never reaches it"
        )
    elif isinstance(schedule, Restarts) and 2 * schedule.cycles > after:
        found.append(
            f"schedule.cycles={schedule.cycles} in {after} steps (after the warm-up) leaves less than two steps for "
            "each, so that the rate does not fall as cosines do"
        )
    elif isinstance(schedule, StableDecay) and schedule.decay * after < 1:
        found.append(f"schedule.decay={schedule.decay:g} of {after} steps is less than one: the rate never falls")
    return found


def build(make: MakeOptimizer, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of the configuration on `parameters`, ready to train.

    `fused: auto` is true where all parameters are on a GPU; on a CPU the fused kernel rounds differently.
    Raises ValueError naming the setting that it refused.
    """
    check_settings(make)
    settings = dict(getattr(make, "keywords", {}))
    if settings.get("fused") == "auto":
        make = partial(make, fused=all(parameter.is_cuda for parameter in parameters) or None)
    try:
        optimizer = make(list(parameters))
    except (TypeError, ValueError, AssertionError, IndexError, RuntimeError) as error:
        given = ", ".join(f"optimizer.{key}={value!r}" for key, value in settings.items())
        if MATRICES_ONLY in str(error):
            dims = " and ".join(map(str, sorted({parameter.ndim for parameter in parameters} - {2})))
            raise ValueError(
                f"optimizer=muon trains matrices only, and this adapter has tensors of {dims} dimensions: choose "
                "another optimizer, or adapter=lora"
            ) from error
        raise ValueError(f"the optimizer refused its settings ({error}): {given}") from error
    if averages(optimizer):
        optimizer.train()  # type: ignore[attr-defined]
    return optimizer


def try_out(make: MakeOptimizer, device: torch.device) -> None:
    """One update of a small matrix: some settings are only looked at there.

    Raises ValueError if the optimizer refuses them, or what it makes of them is not finite.

    Want of memory is passed on as it is.
    """
    parameter = nn.Parameter(torch.ones(4, 4, device=device))
    parameter.grad = torch.ones_like(parameter)
    given = ", ".join(f"optimizer.{key}={value!r}" for key, value in getattr(make, "keywords", {}).items())
    optimizer = build(make, [parameter])
    try:
        optimizer.step()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of whichever library, and of any kind
        raise ValueError(f"the optimizer refused its settings ({type(error).__name__}: {error}): {given}") from error
    if not torch.isfinite(parameter).all():
        raise ValueError(f"an update with these settings is not finite: {given}")


class LearningRate:
    """Sets the learning rate of each step: the optimizer's own, times the factor of the schedule.

    Create it before a checkpoint is loaded: the state of an optimizer holds the rate of its last step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, schedule: Schedule, steps: int) -> None:
        self.optimizer, self.schedule, self.steps = optimizer, schedule, steps
        self.base: float = optimizer.param_groups[0]["lr"]

    def set(self, step: int) -> None:
        """Set the learning rate of `step` (from 0)."""
        rate = self.base * self.schedule.factor(step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    @property
    def value(self) -> float:
        """The learning rate in use: what `set` set, times what Prodigy found (`d`)."""
        group = self.optimizer.param_groups[0]
        return float(group["lr"] * group.get("d", 1.0))


# ------------------------------------------------------------------ memory

PRIMES = (3, 5, 7, 11, 13)


def optimizer_bytes(make: MakeOptimizer, parameters: Iterable[nn.Parameter]) -> int:
    """Bytes of an optimizer's state: seen from one step on small parameters, an 8-bit one's from its layout."""
    counted = Counter(tuple(parameter.shape) for parameter in parameters)
    target: Any = getattr(make, "func", make)
    if getattr(target, "__module__", "").startswith("bitsandbytes") and "8bit" in getattr(target, "__name__", ""):
        # moments of a byte with a float32 scale a block of 256; small tensors stay in float32
        moments = 1 if any(base.__name__ == "Optimizer1State" for base in target.__mro__) else 2
        sizes = {shape: math.prod(shape) for shape in counted}
        each = {shape: moments * (n + 4 * math.ceil(n / 256) if n >= 4096 else 4 * n) for shape, n in sizes.items()}
    else:
        each = {shape: state_bytes(make, shape) for shape in counted}
    return sum(count * each[shape] for shape, count in counted.items())


def state_bytes(make: MakeOptimizer, shape: tuple[int, ...]) -> int:
    """Bytes of the state of one parameter of `shape`, of a dimension or more.

    Seen on a small parameter whose sides are different primes, so that a tensor of the state that has some of its sides
    (Adafactor's rows and columns) is told from one that has all of them.
    """
    sides = PRIMES[: len(shape)]
    parameter = nn.Parameter(torch.ones(sides))
    parameter.grad = torch.ones_like(parameter)
    optimizer = build(make, [parameter])
    optimizer.step()
    real, total = dict(zip(sides, shape, strict=True)), 0
    for value in optimizer.state[parameter].values():
        if not isinstance(value, torch.Tensor) or value.numel() == 1:
            continue
        whole = value.numel() == parameter.numel()
        count = math.prod(shape) if whole else math.prod(real.get(side, side) for side in value.shape)
        total += count * value.element_size()
    return total
