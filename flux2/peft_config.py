"""The `adapter_config.json` of a PEFT folder: whether its update is a plain `scale * B A`, and of which scale."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import peft
from torch import Tensor

from flux2 import checks

PEFT_CONFIG = "adapter_config.json"


def plain_lora(place: Path) -> peft.LoraConfig:
    """The configuration in the folder `place`. Raises ValueError unless it is that of a plain LoRA, whole and sane."""
    if not (place / PEFT_CONFIG).exists():  # PEFT would look for it on the Hub
        raise ValueError(f"{PEFT_CONFIG} is missing")
    try:
        config = peft.PeftConfig.from_pretrained(str(place))
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ValueError(f"{PEFT_CONFIG} is not understood by PEFT {peft.__version__} ({error!r})") from error
    if not isinstance(config, peft.LoraConfig) or config.use_dora:
        raise ValueError(f"it is of the kind {config.peft_type} (DoRA: {getattr(config, 'use_dora', False)})")
    if config.init_lora_weights not in (True, False, "gaussian", "eva"):
        raise ValueError(f"it was made with init_lora_weights={config.init_lora_weights!r}, which changes the base")
    check_numbers(config)
    return config


def check_numbers(config: peft.LoraConfig) -> None:
    """Raises ValueError unless ranks are whole numbers from 1, alphas finite, and patterns regular expressions."""
    for key, pattern in (("rank_pattern", config.rank_pattern), ("alpha_pattern", config.alpha_pattern)):
        if not isinstance(pattern, dict):
            raise ValueError(f"{PEFT_CONFIG}: {key}={pattern!r} must map names of layers to numbers")
        for expression in pattern:
            try:
                re.compile(expression)
            except re.error as error:
                raise ValueError(f"{PEFT_CONFIG}: {key} has {expression!r}, no regular expression ({error})") from error
    try:
        for name, rank in {"r": config.r, **config.rank_pattern}.items():
            checks.whole(name, rank, 1)
        for name, alpha in {"lora_alpha": config.lora_alpha, **config.alpha_pattern}.items():
            checks.number(name, alpha)
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


def scale(config: peft.LoraConfig, layer: str) -> float:
    """alpha / rank of one layer, as PEFT computes it."""
    rank = pattern_value(config.r, config.rank_pattern, layer)
    alpha = pattern_value(config.lora_alpha, config.alpha_pattern, layer)
    return alpha / (rank**0.5 if config.use_rslora else rank)
