"""Small models with an adapter of every type, on every precision."""

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from typing import Any

import helpers
import peft
import torch

from flux2 import adapters
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
}
PRECISIONS = {
    "fp32": Precision(),
    "bf16": Precision(torch.bfloat16),
    "fp8": Precision(torch.bfloat16, "fp8"),
    "nf4": Precision(torch.bfloat16, "nf4"),
}


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
