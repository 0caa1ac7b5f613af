"""flux2.adapter_types: every type of adapter on every precision, from its beginning to its end."""

from collections.abc import Callable
from typing import Any

import helpers
import peft
import pytest
import torch
from torch import Tensor, nn

from flux2 import adapters
from flux2.adapter_types import attach, attach_dora, attach_loha, attach_lokr, attach_oft, attach_pissa, detach
from flux2.linear import FusedLora
from flux2.model import Transformer
from flux2.precision import Precision, convert

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
EACH_TYPE = pytest.mark.parametrize("kind", TYPES)
EACH_PRECISION = pytest.mark.parametrize("precision", PRECISIONS)


def base(precision: str = "fp32", model: str = "dev") -> Transformer:
    """A frozen random transformer in a precision."""
    found = helpers.transformers(model)[0].to(PRECISIONS[precision].dtype)
    convert(found, PRECISIONS[precision])
    return found


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


@torch.no_grad()
def predict(model: nn.Module, autocast: bool = False) -> Tensor:
    model = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return model(**helpers.transformer_inputs(model.config))


# ------------------------------------------------------------------ beginning and end


@EACH_PRECISION
@EACH_TYPE
def test_a_fresh_adapter_changes_nothing_bit_for_bit(kind: str, precision: str) -> None:
    model, autocast = base(precision), precision != "fp32"
    before, without = predict(model, autocast), predict(model)
    beginning = torch.get_rng_state()
    wrapped = attached(kind, model, targets="all_linear").train()
    assert {parameter.dtype for parameter in adapters.adapter_parameters(wrapped)} == {torch.float32}
    assert torch.equal(predict(model, autocast), before)
    assert torch.equal(predict(model), without), "without autocast too"
    assert torch.equal(torch.get_rng_state(), beginning), "neither attaching nor a forward draws from the process"


@EACH_PRECISION
@EACH_TYPE
def test_detaching_gives_the_base_back_as_it_was(kind: str, precision: str) -> None:
    model = base(precision)
    model.img_in.requires_grad_(True)
    before, state = predict(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = {name: (module, type(module)) for name, module in model.named_modules()}
    wrapped = stirred(attached(kind, model))
    assert not torch.equal(predict(model), before)
    again = detach(wrapped)
    assert again is model
    assert {name: (module, type(module)) for name, module in again.named_modules()} == modules
    assert all(torch.equal(tensor, state[name]) for name, tensor in again.state_dict().items())
    assert [name for name, one in again.named_parameters() if one.requires_grad] == ["img_in.weight"]
    assert torch.equal(predict(again), before)
    other = attached("lora", again)
    assert any(isinstance(module, FusedLora) for module in other.modules()), "and takes another"


def test_a_base_that_an_adapter_was_merged_into_is_not_given_back() -> None:
    wrapped = stirred(attached("lora", base()))
    wrapped.merge_adapter()
    with pytest.raises(adapters.AdapterError, match=r"cannot be given back: an adapter is merged into double_blocks"):
        detach(wrapped)
