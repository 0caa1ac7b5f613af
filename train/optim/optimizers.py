"""Construction of optimizers, and checks of their settings."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from train.optim.parameter_groups import parameter_groups
from train.optim.schedules import Constant, Restarts, Schedule, StableDecay
from train.utils.checks import is_count, is_number

MakeOptimizer = Callable[..., torch.optim.Optimizer]
EXTRA = ("prodigyopt", "schedulefree")  # packages of the extra `optimizers`
MATRICES_ONLY = "Muon only supports 2D parameters"


def check_installed(target: object) -> None:
    """Raise ValueError if the package of the optimizer `target` is not installed."""
    package = str(target).partition(".")[0]
    if package in EXTRA and find_spec(package) is None:
        raise ValueError(
            f"optimizer._target_={target} needs the package {package}: pip install 'flux2-lora[optimizers]'"
        )


def averages_weights(optimizer: object) -> bool:
    """Return whether an optimizer has `eval()`, which puts averaged weights into the parameters, and `train()`."""
    return hasattr(optimizer, "train") and hasattr(optimizer, "eval")


def is_share(value: object) -> bool:
    return is_number(value, 0, 1) and value != 1


# condition of each setting, for every optimizer that has it, and its description
ACCEPTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    # with less, even a million steps change nothing
    **dict.fromkeys(("lr", "d0", "d_coef"), (partial(is_number, low=1e-12), "a number >= 1e-12")),
    # in float32 a smaller one is 0, and a larger one outweighs the gradient
    "eps": (partial(is_number, low=1e-37, high=1.0), "a number from 1e-37 to 1"),
    **dict.fromkeys(("weight_decay", "weight_lr_power", "r"), (partial(is_number, low=0), "a number >= 0")),
    **dict.fromkeys(("momentum", "beta1", "beta2", "beta3"), (is_share, "a number >= 0 and < 1")),
    **dict.fromkeys(("warmup_steps", "min_8bit_size"), (is_count, "an integer >= 0")),
    **dict.fromkeys(("ns_steps", "slice_p"), (partial(is_count, low=1), "an integer >= 1")),
    **dict.fromkeys(
        ("amsgrad", "capturable", "decouple", "differentiable", "foreach", "is_paged", "maximize", "nesterov",
         "safeguard_warmup", "use_bias_correction"),
        (lambda value: isinstance(value, bool), "true or false"),
    ),
    "fused": (lambda value: value in (None, "auto") or isinstance(value, bool), "true, false or auto"),
    "growth_rate": (lambda value: value == math.inf or (is_number(value, 1) and value != 1), "above 1, or .inf"),
}  # fmt: skip
# the same for the items of lists, which are as long as the optimizer's default
LISTS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "betas": (is_share, "in [0, 1)"),
    "eps": (partial(is_number, low=1e-37, high=1e3), "from 1e-37 to 1000"),
    "ns_coefficients": (is_number, "that are finite"),
}
# usual learning rates by the beginning of an optimizer's class name: below training learns nothing, above it diverges
USUAL_RATES: dict[str, tuple[float, float]] = {
    "Prodigy": (0.1, 1.0),  # a factor of the rate that it estimates
    "Lion": (1e-7, 1e-3),  # the size of every update
    **dict.fromkeys(("Adam", "Adafactor", "RAdam", "NAdam", "Muon"), (1e-7, 0.1)),
    "": (1e-9, 1.0),  # any other
}
MOST_SHRINKING = 0.1  # of the weights in a step, from which on weight decay is probably unintended


def settings_of(make: MakeOptimizer) -> dict[str, Any]:
    return dict(getattr(make, "keywords", {}))


def class_name(make: MakeOptimizer) -> str:
    return str(getattr(getattr(make, "func", make), "__name__", ""))


def refusal(make: MakeOptimizer, problem: str) -> ValueError:
    settings = ", ".join(f"optimizer.{key}={value!r}" for key, value in settings_of(make).items())
    return ValueError(f"{problem}: {settings}")


def check_settings(make: MakeOptimizer) -> None:
    """Raise ValueError for a senseless value, which many optimizers accept. Null is allowed where it is the default."""
    try:
        parameters = inspect.signature(getattr(make, "func", make)).parameters
        own = {name: parameter.default for name, parameter in parameters.items()}
    except ValueError:
        own = {}
    for key, value in {"lr": None, **settings_of(make)}.items():
        default = own.get(key)
        if value is None and key in own and default is None:
            continue
        items = default if isinstance(default, list | tuple) else (0.9, 0.9) if key == "betas" else ()
        if key in LISTS and items:
            accepts, what = LISTS[key]
            right = isinstance(value, list | tuple) and len(value) == len(items)
            if not right or not all(accepts(a) or a is b is None for a, b in zip(value, items, strict=True)):
                raise ValueError(f"optimizer.{key}={value!r} must be {len(items)} numbers {what}")
        elif key in ACCEPTED and not ACCEPTED[key][0](value):
            raise ValueError(f"optimizer.{key}={value!r} must be {ACCEPTED[key][1]}")


def unusual_settings(make: MakeOptimizer, schedule: Schedule, steps: int, factors: Sequence[float] = ()) -> list[str]:
    """Return warnings about optimizer and schedule settings that are valid but probably unintended.

    `factors` are those of the learning rates of parameters.
    """
    warnings = unusual_rate(make, factors or [1.0]) or unusual_effects(make, steps)
    if not isinstance(schedule, Constant):
        return warnings
    warmup, after = schedule.warmup(steps), steps - schedule.warmup(steps)
    if warmup >= steps:
        reached = schedule.factor(steps - 1, steps)
        warnings.append(
            f"schedule.warmup_steps={schedule.warmup_steps} takes all of steps={steps}: the rate only reaches "
            f"{reached:.0%} of optimizer.lr"
        )
    elif isinstance(schedule, Restarts) and 2 * schedule.cycles > after:
        warnings.append(
            f"schedule.cycles={schedule.cycles} in {after} steps (after the warm-up) leaves less than two steps for "
            "each: the rate does not follow a cosine"
        )
    elif isinstance(schedule, StableDecay) and schedule.decay * after < 1:
        warnings.append(f"schedule.decay={schedule.decay:g} of {after} steps is less than one: the rate never decays")
    return warnings


def unusual_rate(make: MakeOptimizer, factors: Sequence[float]) -> list[str]:
    """Return a warning if the learning rate of any parameter is probably that of another optimizer."""
    rate, name = settings_of(make).get("lr"), class_name(make)
    if rate is None:  # its default, which is allowed if the optimizer chooses the rate
        return []
    low, high = next(span for start, span in USUAL_RATES.items() if name.startswith(start))
    wrong = [factor for factor in factors if not low <= rate * factor <= high]
    if not wrong:
        return []
    factor = max(wrong, key=lambda factor: abs(math.log(factor)))
    is_low = rate * factor < low
    side, effect = ("below", "little or nothing is learned") if is_low else ("above", "training probably diverges")
    scaled = "" if factor == 1 else f" times {factor:g} (optimizer.lora_plus_ratio, optimizer.layer_rates)"
    hint = ". It is a factor of the rate that Prodigy estimates: leave it at 1" if name == "Prodigy" else ""
    return [
        f"optimizer.lr={rate:g}{scaled} is far {side} the usual rates of {name} ({low:g} to {high:g}): {effect}{hint}"
    ]


def unusual_effects(make: MakeOptimizer, steps: int) -> list[str]:
    """Return warnings about settings with which an optimizer updates little, or undoes its updates."""
    settings, name = settings_of(make), class_name(make)
    warnings, shrinking = [], (settings.get("lr") or 0) * (settings.get("weight_decay") or 0)
    # Prodigy multiplies the rate by its estimate, and Adam adds the decay to the gradient
    if shrinking >= MOST_SHRINKING and name not in ("Prodigy", "Adam"):
        warnings.append(
            f"optimizer.weight_decay={settings['weight_decay']:g} times optimizer.lr={settings['lr']:g} takes "
            f"{min(shrinking, 1):.0%} of the weights away in each step: little or nothing is learned"
        )
    if (settings.get("warmup_steps") or 0) >= steps:
        warnings.append(
            f"optimizer.warmup_steps={settings['warmup_steps']} takes all of steps={steps}: optimizer.lr is not reached"
        )
    factor = settings.get("d_coef")
    if factor is not None and not 0.1 <= factor <= 10:
        warnings.append(
            f"optimizer.d_coef={factor:g} is far from 1: the rate that Prodigy estimates is multiplied by it"
        )
    return warnings


def float_lists(make: MakeOptimizer) -> dict[str, list[float | None]]:
    """Return the settings that are lists of numbers with floats in place of integers, which PyTorch rejects (`0`)."""
    given = {key: value for key, value in settings_of(make).items() if key in LISTS and isinstance(value, list | tuple)}
    return {key: [None if item is None else float(item) for item in value] for key, value in given.items()}


def build_optimizer(
    make: MakeOptimizer, parameters: Sequence[nn.Parameter], factors: Sequence[float] | None = None
) -> torch.optim.Optimizer:
    """Build the configured optimizer, ready to train. Raise ValueError naming the settings that it rejects.

    `factors` are those of each parameter's learning rate, which `LearningRate` applies; None is 1 for all. `fused:
    auto` is true if all parameters are on a GPU; on a CPU the fused kernel rounds differently.
    """
    check_settings(make)
    factors = factors or [1.0] * len(parameters)
    if len(set(factors)) > 1 and class_name(make) == "Prodigy":
        raise ValueError(
            "optimizer.lora_plus_ratio and optimizer.layer_rates do not work with optimizer=prodigy, which estimates "
            "one learning rate for all parameters. Set both to null, or choose another optimizer"
        )
    make = partial(make, **float_lists(make))
    fused = {"fused": all(parameter.is_cuda for parameter in parameters) or None}
    try:
        optimizer = make(
            parameter_groups(parameters, factors), **(fused if settings_of(make).get("fused") == "auto" else {})
        )
    except (TypeError, ValueError, AssertionError, IndexError, RuntimeError) as error:
        if MATRICES_ONLY in str(error):
            dims = " and ".join(map(str, sorted({parameter.ndim for parameter in parameters} - {2})))
            raise ValueError(
                f"optimizer=muon trains only matrices, and this adapter has tensors of {dims} dimensions. Choose "
                "another optimizer, or adapter=lora"
            ) from error
        raise refusal(make, f"the optimizer refused its settings ({error})") from error
    if averages_weights(optimizer):
        optimizer.train()  # type: ignore[attr-defined]
    return optimizer


def try_out(make: MakeOptimizer, device: torch.device) -> None:
    """Update a small matrix once, as some settings are only checked then. Raise ValueError if this fails."""
    parameter = nn.Parameter(torch.ones(4, 4, device=device))
    parameter.grad = torch.ones_like(parameter)
    optimizer = build_optimizer(make, [parameter])
    try:
        optimizer.step()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # libraries raise various types
        raise refusal(make, f"the optimizer refused its settings ({type(error).__name__}: {error})") from error
    if not torch.isfinite(parameter).all():
        raise refusal(make, "an update with these settings is not finite")
