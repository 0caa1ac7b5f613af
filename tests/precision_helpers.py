"""Small models in every way of storing and multiplying weights."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import cache

import helpers
import pytest
import torch
from torch import nn

from flux2.models.transformer import Transformer
from flux2.quantization.base import QuantizedLinear
from flux2.quantization.precision import Precision, convert

FP8, INT8, NF4 = Precision(storage="fp8", matmul="fp8"), Precision(storage="int8"), Precision(storage="nf4")
PRECISIONS = {
    "fp8": FP8,
    "fp8_rows": replace(FP8, rowwise=True),
    "fp8_bf16_backward": replace(FP8, backward="bf16"),
    "fp8_dequantized": replace(FP8, matmul="dequantized"),
    "int8": INT8,
    "int8_rotated": replace(INT8, rotate=True),
    "int8_dequantized": replace(INT8, matmul="dequantized"),
    "nf4": NF4,
}
EACH = pytest.mark.parametrize("name", list(PRECISIONS))


def model_in(kind: Precision | str | None, model: str = "dev") -> Transformer:
    """A small random model, converted."""
    return deepcopy(made_in(PRECISIONS[kind] if isinstance(kind, str) else kind, model))


@cache
def made_in(precision: Precision | None, model: str) -> Transformer:
    """What `model_in` copies, made once in a process: not to be changed."""
    made = helpers.transformer(model)
    if precision is not None:
        convert(made, precision)
    return made


def dequantized(model: Transformer) -> Transformer:
    """The same weights in plain layers, in float32."""
    for name, module in list(model.named_modules()):
        if isinstance(module, QuantizedLinear):
            plain = nn.Linear(module.in_features, module.out_features, bias=False)
            plain.weight = nn.Parameter(module.dequantize(torch.float32), requires_grad=False)
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, plain)
    return model


def converted(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]
