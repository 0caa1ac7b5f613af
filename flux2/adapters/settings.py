"""The settings that types of adapters share: checks, which layers, and the rank and alpha of each layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from flux2.adapters.formats import AdapterError
from flux2.layers.selection import kinds, linear_names, matched

Targets = str | Sequence[str]
ALPHAS = 1e-6, 1e6  # beyond, what an update is scaled by rounds to nothing, or to infinity


def check_integer(key: str, value: object, least: int = 1) -> int:
    """`value`. Raises AdapterError, naming adapter.`key`, unless it is a whole number from `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise AdapterError(f"adapter.{key}={value!r} must be a whole number from {least}")
    return value


def check_alpha(key: str, value: object, otherwise: str = "") -> float:
    """`value`. Raises AdapterError unless it is a number that an alpha may be."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not ALPHAS[0] <= value <= ALPHAS[1]:
        raise AdapterError(f"adapter.{key}={value!r} must be a number from {ALPHAS[0]:g} to {ALPHAS[1]:g}{otherwise}")
    return value


def check_flag(key: str, value: object) -> bool:
    """`value`. Raises AdapterError unless it is a bool."""
    if not isinstance(value, bool):
        raise AdapterError(f"adapter.{key}={value!r} must be true or false")
    return value


def check_dropout(key: str, value: object) -> float:
    """`value`. Raises AdapterError unless it is a number in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise AdapterError(f"adapter.{key}={value!r} must be a number in [0, 1)")
    return value


def target_layers(model: nn.Module, targets: Targets) -> list[str]:
    """Names of the linear layers that any of `targets` means: presets and regular expressions for whole names.

    Raises:
        AdapterError: a target is neither, or matches no linear layer.
    """
    given = [targets] if isinstance(targets, str) else targets
    if not isinstance(given, Sequence) or not all(isinstance(target, str) for target in given):
        raise AdapterError(f"adapter.targets={targets!r} must be a preset, a regular expression, or a list of those")
    try:
        return linear_names(model, given, "adapter.targets")
    except ValueError as error:
        raise AdapterError(str(error)) from error


def values_by_layer(
    key: str, pattern: object, layers: Sequence[str], check: Callable[[str, Any], Any]
) -> dict[str, Any]:
    """What `adapter.<key>`, a mapping of targets to numbers, says of each of `layers`; not all need be named.

    Raises:
        AdapterError: a pattern is no regular expression, means none of `layers`, has a number that `check` refuses, or
            two mean one layer: which would hold depends on an order that files and command lines do not keep.
    """
    if not isinstance(pattern, Mapping):
        raise AdapterError(f"adapter.{key}={pattern!r} must map presets or regular expressions to numbers")
    found: dict[str, Any] = {}
    by: dict[str, str] = {}
    for target, value in pattern.items():
        if not isinstance(target, str):
            raise AdapterError(f"adapter.{key}: {target!r} must be a preset or a regular expression")
        try:
            names = matched(layers, target)
        except re.error as error:
            raise AdapterError(f"adapter.{key}: {target!r} is not a regular expression ({error})") from error
        if not names:
            raise AdapterError(
                f"adapter.{key}: {target!r} matches none of the {len(layers)} layers that adapter.targets gives, which "
                f"are {kinds(layers)}"
            )
        check(f"{key}: {target!r}", value)
        for name in names:
            if name in by:
                raise AdapterError(
                    f"adapter.{key}: {by[name]!r} and {target!r} both match {name}: let each layer be matched once"
                )
            by[name], found[name] = target, value
    return found


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
    """The arguments that PEFT's configurations of types with a rank share; `alpha` is to be renamed for LoRA.

    Each layer's alpha is what a pattern says, else `alpha`, else the layer's own rank.

    Args:
        any_rank: let ranks be larger than the layers have: of a type that then trains whole matrices.

    Raises:
        AdapterError: a setting is of the wrong kind, or a rank is more than its layer has.
    """
    check_integer("rank", rank)
    if alpha is not None:
        check_alpha("alpha", alpha, ", or null for the rank")
    layers = target_layers(model, targets)
    ranks = values_by_layer("rank_pattern", {} if rank_pattern is None else rank_pattern, layers, check_integer)
    alphas = values_by_layer("alpha_pattern", {} if alpha_pattern is None else alpha_pattern, layers, check_alpha)
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
    """Raises AdapterError where the rank of a layer is more than its weight has: what is beyond trains nothing new."""
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in ranks}
    most_of = {name: min(layer.in_features, layer.out_features) for name, layer in layers.items()}
    smaller = [name for name, rank in ranks.items() if rank > most_of[name]]
    if not smaller:
        return
    name = smaller[0]
    layer, rank, most = layers[name], ranks[name], most_of[name]
    others = f", and {len(smaller) - 1} other layers have less too" if len(smaller) > 1 else ""
    raise AdapterError(
        f"adapter.rank={rank} is more than {name} has, a weight of {layer.out_features} x {layer.in_features}{others}: "
        f"give at most {most}, or such layers ranks of their own (adapter.rank_pattern)"
    )
