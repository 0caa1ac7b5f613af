"""Small models with an adapter of every type, on every precision."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import helpers
import peft
import pytest
import torch
from torch import Tensor, nn

from flux2 import adapters
from flux2.adapters.formats import LoraPair
from flux2.adapters.tlora import attach_tlora
from flux2.adapters.tuners import attach, attach_dora, attach_loha, attach_lokr, attach_oft, attach_pissa
from flux2.models.transformer import Transformer
from flux2.quantization.precision import Precision, convert

Attach = Callable[..., peft.PeftModel]

TYPES: dict[str, tuple[Attach, dict[str, Any]]] = {
    "lora": (attach, {"rank": 4, "alpha": 8}),
    "rslora": (attach, {"rank": 4, "alpha": 8, "rslora": True}),
    "dora": (attach_dora, {"rank": 4, "alpha": 8}),
    "pissa": (attach_pissa, {"rank": 4, "alpha": 8}),
    "loha": (attach_loha, {"rank": 4, "alpha": 8}),
    "lokr": (attach_lokr, {"rank": 4, "alpha": 8}),
    "oft": (attach_oft, {"block_size": 16}),
    "tlora": (attach_tlora, {"rank": 4, "alpha": 8}),
}
PRECISIONS = {
    "fp32": Precision(),
    "bf16": Precision(torch.bfloat16),
    "fp8": Precision(torch.bfloat16, "fp8"),
    "int8": Precision(torch.bfloat16, "int8"),
    "nf4": Precision(torch.bfloat16, "nf4"),
}
EACH_TYPE = pytest.mark.parametrize("kind", TYPES)
NAMES = {
    "lora": "LoRA",
    "dora": "DoRA",
    "oft": "OFT",
    "loha": "LoHa",
    "lokr": "LoKr",
    "tlora": "T-LoRA",
}  # as messages call them
EVERY = [".*"]  # every linear, the modulation and the final layer too


@cache
def made_base(precision: str, model: str) -> Transformer:
    """What `base` copies, made once in a process: not to be changed."""
    found = helpers.transformer(model).to(PRECISIONS[precision].dtype)
    convert(found, PRECISIONS[precision])
    return found


def base(precision: str = "fp32", model: str = "klein") -> Transformer:
    """A frozen random transformer in a precision."""
    return deepcopy(made_base(precision, model))


def attached(kind: str, model: Transformer, **options: Any) -> peft.PeftModel:
    make, settings = TYPES[kind]
    return make(model, **(settings | options))


@torch.no_grad()
def stirred(wrapped: peft.PeftModel, by: float = 0.05, seed: int = 3) -> peft.PeftModel:
    """Every trained weight moved, as training does."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapters.adapter_parameters(wrapped):
        parameter += by * torch.randn(parameter.shape, generator=generator)
    return wrapped


def trained(kind: str = "dev", seed: int = 3, **options: Any) -> tuple[peft.PeftModel, Transformer]:
    """A transformer with an adapter whose A and B are random, as after training."""
    return train(kind, seed, **options) if options else deepcopy(made_trained(kind, seed))


@cache
def made_trained(kind: str, seed: int) -> tuple[peft.PeftModel, Transformer]:
    """What `trained` copies, made once in a process: not to be changed."""
    return train(kind, seed)


def train(kind: str, seed: int, **options: Any) -> tuple[peft.PeftModel, Transformer]:
    model = helpers.transformer(kind)
    wrapped = adapters.attach(model, **({"rank": 3, "alpha": 6} | options))
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapters.adapter_parameters(model):
        parameter.data = torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5
    return wrapped, model


def draw_adapter(model: nn.Module, by: float = 0.1, seed: int = 0) -> None:
    """Draw every trained weight: B too, which starts at zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapters.adapter_parameters(model):
        parameter.data = by * torch.randn(parameter.shape, generator=generator)


def write_adapter(folder: Path, seed: int = 0, kind: str = "dev") -> None:
    """Save a LoRA that changes pictures."""
    wrapped = adapters.attach(helpers.transformer(kind), rank=2, seed=seed)
    draw_adapter(wrapped, 0.3, seed)
    adapters.save(wrapped, folder, base="small")


def fresh(kind: str = "dev") -> Transformer:
    return helpers.transformer(kind)


@torch.no_grad()
def predict(model: nn.Module, kind: str = "dev", autocast: bool = False) -> Tensor:
    """The prediction for the small inputs: of ours, with an adapter or without, or of diffusers' model of `kind`."""
    model = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    ours = isinstance(model, Transformer)
    inputs = helpers.transformer_inputs(model.config if ours else helpers.TRANSFORMERS[kind])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return model(**inputs) if ours else helpers.reference_forward(model, inputs)


@torch.no_grad()
def merged(kind: str, updates: Sequence[dict[str, LoraPair]], scales: Sequence[float]) -> Transformer:
    """A transformer without adapters whose weights are W + scale * B A: what adapters must amount to."""
    model = fresh(kind)
    for pairs, scale in zip(updates, scales, strict=True):
        for layer, pair in pairs.items():
            model.get_submodule(layer).weight += scale * (pair.b @ pair.a)
    return model
