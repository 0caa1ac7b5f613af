"""Small models with a LoRA that does something, and training steps of them: what the tests of streaming share."""

from copy import deepcopy
from functools import cache
from typing import Any

import helpers
import torch
from adapter_helpers import draw_adapter
from torch import Tensor

from flux2 import adapters
from flux2.layers.fused_lora import fuse_lora
from flux2.memory.activation_checkpointing import set_policy
from flux2.models.transformer import Transformer
from flux2.quantization.precision import Precision, convert

PRECISIONS = {
    "fp32": Precision(),
    "bf16": Precision(torch.bfloat16),
    "fp8": Precision(storage="fp8", matmul="fp8"),
    "fp8 stored": Precision(torch.bfloat16, storage="fp8", rowwise=True, matmul="dequantized"),
    "fp8 twice": Precision(torch.bfloat16, storage="fp8", matmul="fp8", cache_transposed_weights=True),
    "int8": Precision(torch.bfloat16, storage="int8", rotate=True, cache_transposed_weights=True),
    "nf4": Precision(storage="nf4"),
}


@cache
def converted(precision: str) -> Transformer:
    """A small random model, made once in a process: not to be changed."""
    model = helpers.transformer("dev").to(PRECISIONS[precision].dtype)
    convert(model, PRECISIONS[precision])
    return model


def adapted(precision: str = "fp32", policy: str = "full", dropout: float = 0.0, **options: Any) -> Transformer:
    """A small random model with a LoRA that does something, as a run trains it."""
    model = deepcopy(converted(precision))
    adapters.attach(model, rank=2, dropout=dropout, **options)
    draw_adapter(model)
    # enough for two of five blocks
    set_policy(model, policy, budget_gb=3e-4 if policy == "budget" else None)
    fuse_lora(model)
    return model.train()


def predict(model: Transformer, **inputs: Any) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=model.img_in.weight.dtype == torch.bfloat16):
        return model(**helpers.transformer_inputs(model.config, **inputs)).float()


def gradients(model: Transformer) -> list[Tensor]:
    """Of the adapter; none is left behind."""
    parameters = adapters.adapter_parameters(model)
    found = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
    model.zero_grad()
    assert len(found) == len(parameters)
    return found


def step(model: Transformer) -> list[Tensor]:
    """Loss and gradients."""
    torch.manual_seed(0)
    loss = predict(model).square().mean()
    loss.backward()
    return [loss.detach(), *gradients(model)]


def preserving_step(model: Transformer) -> list[Tensor]:
    """Two passes that are both differentiated, and between them one of the base without a gradient."""
    torch.manual_seed(0)
    first = predict(model)
    with torch.no_grad(), adapters.adapters_disabled(model):
        base = predict(model, seed=2)
    second = predict(model, seed=2)
    loss = first.square().mean() + (second - base).square().mean()
    loss.backward()
    return [loss.detach(), *gradients(model)]


def equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
