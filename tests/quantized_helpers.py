"""Quantized layers of every kind, weights and tokens for them: what the tests of layers in FP8, INT8 and NF4 share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flux2.quantization.base import QuantizedLinear
from flux2.quantization.float8 import Float8Linear
from flux2.quantization.int8 import Int8Linear
from flux2.quantization.nf4 import Nf4Linear

IN, OUT = 64, 160
FLOAT8 = torch.float8_e4m3fn
FP8 = ["fp8", "fp8_rows", "fp8_both_layouts", "fp8_bf16_backward", "fp8_dequantized"]
INT8 = ["int8", "int8_rotated", "int8_both_layouts", "int8_bf16_backward", "int8_dequantized"]
KINDS = [*FP8, *INT8, "nf4"]
OPTIONS: dict[str, dict[str, bool]] = {
    "fp8": {},
    "fp8_rows": {"rowwise": True},
    "fp8_both_layouts": {"cache_transposed_weights": True},
    "fp8_bf16_backward": {"backward_8bit": False},
    "fp8_dequantized": {"forward_8bit": False, "backward_8bit": False},
    "fp8_rows_dequantized": {"rowwise": True, "forward_8bit": False, "backward_8bit": False},
    "int8": {},
    "int8_rotated": {"rotate": True},
    "int8_both_layouts": {"cache_transposed_weights": True},
    "int8_bf16_backward": {"backward_8bit": False},
    "int8_dequantized": {"forward_8bit": False, "backward_8bit": False},
    "int8_rotated_dequantized": {"rotate": True, "forward_8bit": False, "backward_8bit": False},
}


def random_weight(seed: int = 0, rows: int = OUT, columns: int = IN) -> Tensor:
    """Rows of very different sizes, so that scales matter."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.logspace(-1, 0.5, rows)[:, None]
    return torch.randn(rows, columns, generator=generator) * sizes[torch.randperm(rows, generator=generator)] / 8


def class_of(kind: str) -> Any:
    return {"fp8": Float8Linear, "int8": Int8Linear, "nf4": Nf4Linear}[kind.partition("_")[0]]


def layer(kind: str, weight: Tensor | None = None, **more: Any) -> QuantizedLinear:
    weight = random_weight() if weight is None else weight
    sizes = (weight.shape[1], weight.shape[0])
    made = class_of(kind)(*sizes, **OPTIONS.get(kind, {}), **more)
    made.store(weight)
    return made


def rows(count: int = 5, width: int = IN, seed: int = 1) -> Tensor:
    """Tokens of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, count, width, generator=generator) * torch.logspace(-3, 2, count)[:, None]
