"""Settings that adapter types share: checks, the choice of layers, and the rank and alpha of each layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from flux2.adapters.formats import AdapterError
from flux2.layers.selection import layer_kinds, linear_names, matching_names

Targets = str | Sequence[str]
ALPHAS = 1e-6, 1e6  # beyond these limits the scale of an update rounds to nothing or to infinity


def require(key: str, value: Any, is_valid: bool, accepted: str, group: str = "adapter") -> Any:
    """Return `value`. Raises AdapterError, naming `group`.`key` and what is accepted, unless it is valid."""
    if not is_valid:
        raise AdapterError(f"{group}.{key}={value!r} must be {accepted}")
    return value


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_integer(key: str, value: Any, least: int = 1) -> int:
    is_valid = isinstance(value, int) and not isinstance(value, bool) and value >= least
    return require(key, value, is_valid, f"an integer >= {least}")


def check_alpha(key: str, value: Any, otherwise: str = "") -> float:
    is_valid = is_number(value) and ALPHAS[0] <= value <= ALPHAS[1]
    return require(key, value, is_valid, f"a number from {ALPHAS[0]:g} to {ALPHAS[1]:g}{otherwise}")


def check_flag(key: str, value: Any) -> bool:
    return require(key, value, isinstance(value, bool), "true or false")


def check_dropout(key: str, value: Any) -> float:
    return require(key, value, is_number(value) and 0 <= value <= 0.95, "a number from 0 to 0.95")


def target_layers(model: nn.Module, targets: Targets) -> list[str]:
    """Return the linear layers that match any of `targets`: presets and regular expressions for whole names.

    Raises AdapterError if a target is neither, or matches no linear layer.
    """
    patterns = [targets] if isinstance(targets, str) else targets
    is_valid = isinstance(patterns, Sequence) and all(isinstance(target, str) for target in patterns)
    require("targets", targets, is_valid, "a preset, a regular expression, or a list of these")
    try:
        return linear_names(model, patterns, "adapter.targets")
    except ValueError as error:
        raise AdapterError(str(error)) from error


def values_by_layer(
    key: str, pattern: Any, layers: Sequence[str], check: Callable[[str, Any], Any], group: str = "adapter"
) -> dict[str, Any]:
    """Return the values that `group`.`key`, a mapping of targets to numbers or None, gives to some of `layers`.

    Raises AdapterError if a pattern is not a regular expression, matches no layer, or has a value that `check` refuses;
    or if two match one layer, as files and command lines do not preserve the order that would decide.
    """
    pattern = {} if pattern is None else pattern
    accepted = "a mapping of presets or regular expressions to numbers"
    require(key, pattern, isinstance(pattern, Mapping), accepted, group)
    values: dict[str, Any] = {}
    target_of: dict[str, str] = {}
    for target, value in pattern.items():
        if not isinstance(target, str):
            raise AdapterError(f"{group}.{key}: {target!r} must be a preset or a regular expression")
        try:
            names = matching_names(layers, target)
        except re.error as error:
            raise AdapterError(f"{group}.{key}: {target!r} is not a regular expression ({error})") from error
        if not names:
            raise AdapterError(
                f"{group}.{key}: {target!r} matches none of the {len(layers)} layers of adapter.targets, which are "
                f"{layer_kinds(layers)}"
            )
        check(f"{key}: {target!r}", value)
        for name in names:
            if name in target_of:
                raise AdapterError(
                    f"{group}.{key}: {target_of[name]!r} and {target!r} both match {name}. Change them to match it once"
                )
            target_of[name], values[name] = target, value
    return values


def rank_arguments(
    model: nn.Module,
    targets: Targets,
    rank: int,
    alpha: float | None,
    rank_pattern: Mapping[str, int] | None,
    alpha_pattern: Mapping[str, float] | None,
    *,
    any_rank: bool = False,
) -> dict[str, Any]:
    """Return the arguments that PEFT's configurations of types with a rank share; LoRA calls `alpha` `lora_alpha`.

    Each layer's alpha comes from a pattern, else from `alpha`, else it is the layer's own rank. Raises AdapterError if
    a setting has the wrong type, or a rank is more than its layer has, unless `any_rank` accepts that: the type then
    trains whole matrices.
    """
    check_integer("rank", rank)
    if alpha is not None:
        check_alpha("alpha", alpha, ", or null for the rank")
    layers = target_layers(model, targets)
    ranks = values_by_layer("rank_pattern", rank_pattern, layers, check_integer)
    alphas = values_by_layer("alpha_pattern", alpha_pattern, layers, check_alpha)
    if not any_rank:
        check_ranks_fit(model, {name: ranks.get(name, rank) for name in layers})
    standard = rank if alpha is None else alpha
    if alpha is None:
        alphas = ranks | alphas
    return {
        "r": rank,
        "alpha": standard,
        "target_modules": layers,
        "rank_pattern": {re.escape(name): value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {re.escape(name): value for name, value in alphas.items() if value != standard},
    }


def check_ranks_fit(model: nn.Module, ranks: Mapping[str, int]) -> None:
    """Raise AdapterError if a rank is above that of the layer's weight: the excess trains nothing."""
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in ranks}
    shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
    smaller = [name for name, rank in ranks.items() if rank > min(shapes[name])]
    if smaller:
        name, (rows, columns) = smaller[0], shapes[smaller[0]]
        others = f", and {len(smaller) - 1} other layers also have less" if len(smaller) > 1 else ""
        raise AdapterError(
            f"adapter.rank={ranks[name]} is more than {name} has, a weight of {rows} x {columns}{others}. Use at most "
            f"{min(rows, columns)}, or set lower ranks for such layers (adapter.rank_pattern)"
        )
