"""The `adapter_config.json` of a PEFT folder: type and scale of the adapter.

The file is not trusted: numbers are checked, unknown types are refused by name, and the rest becomes a new
configuration with only what the type needs.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
from torch import Tensor

from flux2.utils import checks

PEFT_CONFIG = "adapter_config.json"
TYPES = {"LORA": "LoRA", "LOHA": "LoHa", "LOKR": "LoKr", "OFT": "OFT"}  # PEFT's name: ours
# what each type needs of its configuration, in addition to its layers
NEEDED = {
    "LORA": ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"),
    "LOHA": ("r", "alpha", "rank_pattern", "alpha_pattern"),
    "LOKR": ("r", "alpha", "rank_pattern", "alpha_pattern", "decompose_both", "decompose_factor"),
    "OFT": ("r", "oft_block_size", "block_share", "coft", "eps", "use_cayley_neumann", "num_cayley_neumann_terms"),
}


def type_name(config: peft.PeftConfig) -> str:
    """Return the name in docs/adapters.md; a saved PiSSA is a LoRA."""
    if isinstance(config, peft.LoraConfig):
        return "DoRA" if config.use_dora else "rsLoRA" if config.use_rslora else "LoRA"
    return TYPES[config.peft_type]


def is_plain(config: peft.PeftConfig) -> bool:
    """Return whether the update is `scale * B A` in every layer."""
    return isinstance(config, peft.LoraConfig) and not config.use_dora


def read_config(place: Path) -> peft.PeftConfig:
    """Return the configuration in the folder `place`. Raises ValueError unless it is complete, valid and supported."""
    if not (place / PEFT_CONFIG).exists():  # PEFT would query the Hub
        raise ValueError(f"{PEFT_CONFIG} is missing")
    try:
        config = peft.PeftConfig.from_pretrained(str(place))
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ValueError(f"{PEFT_CONFIG} cannot be read by PEFT {peft.__version__} ({error!r})") from error
    if config.peft_type not in TYPES:
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise ValueError(f"its type {kind} is not supported; it must be one of {', '.join(TYPES.values())}")
    if isinstance(config, peft.LoraConfig):
        if config.init_lora_weights not in (True, False, "gaussian", "eva"):
            raise ValueError(f"its init_lora_weights={config.init_lora_weights!r} changes the base")
        variants = [field.name for field in dataclasses.fields(config) if field.metadata.get("is_lora_variant")]
        if used := [name for name in variants if name != "use_dora" and getattr(config, name)]:
            raise ValueError(f"it is a variant of LoRA that is not supported ({', '.join(used)})")
    if replaced := getattr(config, "modules_to_save", None):
        raise ValueError(f"it replaces whole layers in addition to the adapter (modules_to_save={replaced!r})")
    check_numbers(config)
    return config


def minimal_config(config: peft.PeftConfig, layers: Sequence[str]) -> peft.PeftConfig:
    """Return a configuration for `layers` with only what its type needs."""
    needed = {key: getattr(config, key) for key in NEEDED[config.peft_type]}
    return type(config)(**needed, target_modules=list(layers))


def layer_config(config: peft.PeftConfig, layer: str, name: str) -> peft.PeftConfig:
    """Return a configuration for a single layer `name`, with the rank and alpha that `config` has for `layer`."""
    found: Any = minimal_config(config, [name])
    for key, pattern in (("r", "rank_pattern"), ("alpha", "alpha_pattern")):
        if hasattr(found, pattern):
            setattr(found, key, pattern_value(getattr(config, key), getattr(config, pattern), layer))
            setattr(found, pattern, {})
    return found


def check_numbers(config: Any) -> None:
    """Raise ValueError unless ranks are integers >= 1, alphas finite, and patterns regular expressions."""
    ranks, alphas = getattr(config, "rank_pattern", {}), getattr(config, "alpha_pattern", {})
    for key, pattern in (("rank_pattern", ranks), ("alpha_pattern", alphas)):
        if not isinstance(pattern, dict):
            raise ValueError(f"{PEFT_CONFIG}: {key}={pattern!r} must map layer names to numbers")
        for expression in pattern:
            try:
                re.compile(expression)
            except re.error as error:
                raise ValueError(f"{PEFT_CONFIG}: {key} has an invalid pattern {expression!r} ({error})") from error
    try:
        if isinstance(config, peft.OFTConfig):
            checks.integer("r", config.r, 0)
            checks.integer("oft_block_size", config.oft_block_size, 0)
            checks.integer("num_cayley_neumann_terms", config.num_cayley_neumann_terms, 1)
            checks.number("eps", config.eps)
            return
        alpha = "lora_alpha" if isinstance(config, peft.LoraConfig) else "alpha"
        for name, rank in {"r": config.r, **ranks}.items():
            checks.integer(name, rank, 1)
        for name, value in {alpha: getattr(config, alpha), **alphas}.items():
            checks.number(name, value)
        if isinstance(config, peft.LoKrConfig):
            checks.integer("decompose_factor", config.decompose_factor, -1)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{PEFT_CONFIG}: {error}") from error


def check_ranks(config: peft.LoraConfig, state: Mapping[str, Tensor]) -> None:
    """Raise ValueError if the rank of a tensor `LAYER.lora_A...` differs from that which its scale is computed from."""
    for key, tensor in state.items():
        layer, found, _ = key.rpartition(".lora_A")
        wanted = pattern_value(config.r, config.rank_pattern, layer)
        if found and tensor.ndim == 2 and tensor.shape[0] != wanted:
            raise ValueError(
                f"{layer} has rank {tensor.shape[0]} instead of {wanted} in {PEFT_CONFIG}: the two files belong to "
                "different adapters"
            )


def pattern_value(default: float, pattern: Mapping[str, float], layer: str) -> float:
    """Return the value for a layer as PEFT looks it up: patterns are regular expressions for the end of its name."""
    return next((v for key, v in pattern.items() if re.match(rf"(.*\.)?({key})$", layer)), default)


def layer_scale(config: peft.LoraConfig, layer: str) -> float:
    """Return alpha / rank of one layer, as PEFT computes it."""
    rank = pattern_value(config.r, config.rank_pattern, layer)
    alpha = pattern_value(config.lora_alpha, config.alpha_pattern, layer)
    return alpha / (rank**0.5 if config.use_rslora else rank)
