"""The `adapter_config.json` of a PEFT folder: which type of adapter it is, and of which scale.

What a file says is not believed: numbers are checked, what is not one of our types is refused by its name, and of the
rest a configuration of its own is made that has nothing but what the type needs.
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
TYPES = {"LORA": "LoRA", "LOHA": "LoHa", "LOKR": "LoKr", "OFT": "OFT"}
# what each type needs of its configuration, besides its layers
NEEDED = {
    "LORA": ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora"),
    "LOHA": ("r", "alpha", "rank_pattern", "alpha_pattern"),
    "LOKR": ("r", "alpha", "rank_pattern", "alpha_pattern", "decompose_both", "decompose_factor"),
    "OFT": ("r", "oft_block_size", "block_share", "coft", "eps", "use_cayley_neumann", "num_cayley_neumann_terms"),
}


def type_name(config: peft.PeftConfig) -> str:
    """As it is called in docs/adapters.md; PiSSA is a LoRA by then."""
    if isinstance(config, peft.LoraConfig):
        return "DoRA" if config.use_dora else "rsLoRA" if config.use_rslora else "LoRA"
    return TYPES[str(getattr(config.peft_type, "value", config.peft_type))]


def is_plain(config: peft.PeftConfig) -> bool:
    """Whether the update is `scale * B A` in every layer."""
    return isinstance(config, peft.LoraConfig) and not config.use_dora


def read_config(place: Path) -> peft.PeftConfig:
    """The configuration in the folder `place`. Raises ValueError unless it is whole, sane and of a type of ours."""
    if not (place / PEFT_CONFIG).exists():  # PEFT would look for it on the Hub
        raise ValueError(f"{PEFT_CONFIG} is missing")
    try:
        config = peft.PeftConfig.from_pretrained(str(place))
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ValueError(f"{PEFT_CONFIG} is not understood by PEFT {peft.__version__} ({error!r})") from error
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind not in TYPES:
        raise ValueError(f"it is of the kind {kind}, of which nothing is known here: {', '.join(TYPES.values())} are")
    if isinstance(config, peft.LoraConfig):
        if config.init_lora_weights not in (True, False, "gaussian", "eva"):
            raise ValueError(f"it was made with init_lora_weights={config.init_lora_weights!r}, which changes the base")
        variants = [field.name for field in dataclasses.fields(config) if field.metadata.get("is_lora_variant")]
        if used := [name for name in variants if name != "use_dora" and getattr(config, name)]:
            raise ValueError(f"it is a variant of LoRA of which nothing is known here ({', '.join(used)})")
    if beside := getattr(config, "modules_to_save", None):
        raise ValueError(f"it replaces whole layers beside the adapter (modules_to_save={beside!r})")
    check_numbers(config)
    return config


def minimal_config(config: peft.PeftConfig, layers: Sequence[str]) -> peft.PeftConfig:
    """A configuration for `layers` with nothing of `config` but what its type needs."""
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    needed: dict[str, Any] = {key: getattr(config, key) for key in NEEDED[kind]}
    return type(config)(**needed, target_modules=list(layers))


def layer_config(config: peft.PeftConfig, layer: str, name: str) -> peft.PeftConfig:
    """A configuration for a layer `name` that stands alone, with the rank and alpha that `config` has for `layer`."""
    found: Any = minimal_config(config, [name])
    for key, pattern in (("r", "rank_pattern"), ("alpha", "alpha_pattern")):
        if hasattr(found, pattern):
            setattr(found, key, pattern_value(getattr(config, key), getattr(config, pattern), layer))
            setattr(found, pattern, {})
    return found


def check_numbers(config: Any) -> None:
    """Raises ValueError unless ranks are whole numbers from 1, alphas finite, and patterns regular expressions."""
    patterns: dict[str, Any] = {"rank_pattern": {}, "alpha_pattern": {}}
    for key in patterns:
        pattern = patterns[key] = getattr(config, key, {})
        if not isinstance(pattern, dict):
            raise ValueError(f"{PEFT_CONFIG}: {key}={pattern!r} must map names of layers to numbers")
        for expression in pattern:
            try:
                re.compile(expression)
            except re.error as error:
                raise ValueError(f"{PEFT_CONFIG}: {key} has {expression!r}, no regular expression ({error})") from error
    try:
        if isinstance(config, peft.OFTConfig):
            checks.whole("r", config.r, 0)
            checks.whole("oft_block_size", config.oft_block_size, 0)
            checks.whole("num_cayley_neumann_terms", config.num_cayley_neumann_terms, 1)
            checks.number("eps", config.eps)
            return
        alpha = "lora_alpha" if isinstance(config, peft.LoraConfig) else "alpha"
        for name, rank in {"r": config.r, **patterns["rank_pattern"]}.items():
            checks.whole(name, rank, 1)
        for name, value in {alpha: getattr(config, alpha), **patterns["alpha_pattern"]}.items():
            checks.number(name, value)
        if isinstance(config, peft.LoKrConfig):
            checks.whole("decompose_factor", config.decompose_factor, -1)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{PEFT_CONFIG}: {error}") from error


def check_ranks(config: peft.LoraConfig, state: Mapping[str, Tensor]) -> None:
    """Raises ValueError if a tensor `LAYER.lora_A...` has another rank than its scale would be computed from."""
    for key, tensor in state.items():
        layer, found, _ = key.rpartition(".lora_A")
        wanted = pattern_value(config.r, config.rank_pattern, layer)
        if found and tensor.ndim == 2 and tensor.shape[0] != wanted:
            raise ValueError(
                f"{layer} has rank {tensor.shape[0]}, but {PEFT_CONFIG} says {wanted}: the two files are not of one "
                "adapter"
            )


def pattern_value(default: float, pattern: Mapping[str, float], layer: str) -> float:
    """As PEFT looks it up: patterns are regular expressions for the end of a layer's name."""
    return next((v for key, v in pattern.items() if re.match(rf"(.*\.)?({key})$", layer)), default)


def layer_scale(config: peft.LoraConfig, layer: str) -> float:
    """alpha / rank of one layer, as PEFT computes it."""
    rank = pattern_value(config.r, config.rank_pattern, layer)
    alpha = pattern_value(config.lora_alpha, config.alpha_pattern, layer)
    return alpha / (rank**0.5 if config.use_rslora else rank)
