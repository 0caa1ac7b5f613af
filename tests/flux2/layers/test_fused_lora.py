"""flux2.layers.fused_lora: the fused LoRA layer gives PEFT's numbers, keeps only (x, h), and leaves everything unusual
to PEFT.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers
import peft
import pytest
import torch
import torch.nn.functional as F
from peft.tuners import lora
from torch import Tensor, nn

from flux2 import adapters
from flux2.layers.frozen_linear import FrozenProduct, input_gradient, product
from flux2.layers.fused_lora import FusedLora, LoraProduct, fuse_lora

IN, OUT, RANK = 12, 20, 4


class Stored(nn.Linear):
    """A linear that keeps its weight in a form of its own, as the quantized ones do."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight.shape[1], weight.shape[0], bias=False)
        self.weight = nn.Parameter(torch.full_like(weight, torch.nan), requires_grad=False)
        self.halves = weight / 2

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, 2 * self.halves)

    def input_gradient(self, dy: Tensor) -> Tensor:
        return dy @ (2 * self.halves)

    def forward(self, x: Tensor) -> Tensor:
        return FrozenProduct.apply(self, x)


def layer(dtype: torch.dtype = torch.float64, bias: bool = False, **options: Any) -> peft.PeftModel:
    """PEFT's wrapper around a module with one frozen linear `a` and a LoRA whose weights are not zero."""
    torch.manual_seed(0)
    module = nn.ModuleDict({"a": nn.Linear(IN, OUT, bias=bias, dtype=dtype)})
    config = peft.LoraConfig(r=RANK, lora_alpha=3 * RANK, target_modules=["a"], **options)
    wrapped = peft.get_peft_model(module, config)
    draw(wrapped, dtype)
    return wrapped


def draw(wrapped: nn.Module, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if ".lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=dtype)


def fused(wrapped: peft.PeftModel) -> peft.PeftModel:
    """A copy whose LoRA layers are fused."""
    other = copy.deepcopy(wrapped)
    fuse_lora(other)
    return other


def keeping(saved: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """A hook that notes what autograd saves."""

    def note(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    return note


def the_layer(wrapped: nn.Module) -> FusedLora:
    (found,) = [module for module in wrapped.modules() if isinstance(module, lora.Linear)]
    return found


def outcome(wrapped: nn.Module, dtype: torch.dtype = torch.float64, seed: int = 2) -> dict[str, Tensor]:
    """Output of the layer, and the gradients of its input and of all its parameters."""
    generator = torch.Generator().manual_seed(seed)
    x, dy = (torch.randn(2, 5, width, generator=generator, dtype=torch.float64) for width in (IN, OUT))
    x = x.to(dtype).requires_grad_()
    wrapped.zero_grad()
    torch.manual_seed(3)  # of dropout
    y = the_layer(wrapped)(x)
    y.backward(dy.to(y.dtype))
    gradients = {name: p.grad.clone() for name, p in wrapped.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **gradients}


def assert_alike(ours: dict[str, Tensor], theirs: dict[str, Tensor], bound: float) -> None:
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert ours[name].dtype == theirs[name].dtype
        assert helpers.relative_error(ours[name], theirs[name]) <= bound, name


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The linears that the fused Function multiplied with."""
    seen: list[nn.Module] = []

    apply = LoraProduct.apply

    def watch(of: nn.Module, *args: Any) -> Tensor:
        seen.append(of)
        return apply(of, *args)

    monkeypatch.setattr(LoraProduct, "apply", watch)
    return seen


# ------------------------------------------------------------------ products


@pytest.mark.parametrize("kind", [lambda w: plain(w), Stored])
def test_a_frozen_product_has_the_gradient_of_a_linear_and_saves_nothing(kind: Callable[[Tensor], nn.Module]) -> None:
    weight = torch.randn(OUT, IN, dtype=torch.float64)
    x = torch.randn(3, IN, dtype=torch.float64, requires_grad=True)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(keeping(saved), lambda t: t):
        y = FrozenProduct.apply(kind(weight), x)
    dy = torch.randn_like(y)
    y.backward(dy)
    assert saved == []
    torch.testing.assert_close(y, x @ weight.t())
    torch.testing.assert_close(x.grad, dy @ weight)


def plain(weight: Tensor) -> nn.Linear:
    module = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    module.weight = nn.Parameter(weight)
    return module


def test_the_backward_reads_the_weight_where_it_lies_then() -> None:
    module = plain(torch.randn(OUT, IN))
    x = torch.randn(3, IN, requires_grad=True)
    y = FrozenProduct.apply(module, x)
    moved = module.weight.detach().clone()
    module.weight.data = torch.empty(0)  # given back, as a streamed block's memory is
    module.weight.data = moved
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(3, OUT) @ moved)
    assert module.weight.grad is None


def test_a_linear_with_a_bias_keeps_it() -> None:
    module = nn.Linear(IN, OUT)
    x = torch.randn(2, IN)
    assert torch.equal(product(module, x), module(x))
    torch.testing.assert_close(input_gradient(module, torch.ones(2, OUT)), torch.ones(2, OUT) @ module.weight)


# ------------------------------------------------------------------ fused


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_output_and_gradients_are_those_of_pefts_layer(bias: bool, scale: float, products: list[nn.Module]) -> None:
    theirs = layer(bias=bias)
    theirs.base_model.model["a"].scaling["default"] = scale
    ours = fused(theirs)
    assert_alike(outcome(ours), outcome(theirs), 1e-10)
    assert products == [the_layer(ours).base_layer]
    assert sorted(name.split(".")[-3] for name in outcome(ours) if "lora" in name) == ["lora_A", "lora_B"]


def test_a_base_with_a_storage_of_its_own_gives_the_same() -> None:
    theirs = layer()
    ours = fused(theirs)
    the_layer(ours).base_layer = Stored(the_layer(theirs).base_layer.weight.detach())
    assert_alike(outcome(ours), outcome(theirs), 1e-10)


def test_only_the_input_and_the_narrow_product_are_kept_beside_the_adapter() -> None:
    ours = fused(layer())
    a, b = (parameter for name, parameter in ours.named_parameters() if ".lora_" in name)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(keeping(saved), lambda t: t):
        x = torch.randn(2, 5, IN, dtype=torch.float64, requires_grad=True)
        the_layer(ours)(x)
    beside = [tensor for tensor in saved if all(tensor.data_ptr() != p.data_ptr() for p in (a, b))]
    assert [tuple(tensor.shape) for tensor in beside] == [(2, 5, IN), (10, RANK)]
    assert beside[0].data_ptr() == x.data_ptr()


def test_a_frozen_adapter_keeps_no_activation() -> None:
    ours = fused(layer()).requires_grad_(False)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(keeping(saved), lambda t: t):
        x = torch.randn(7, IN, dtype=torch.float64, requires_grad=True)
        y = the_layer(ours)(x)
    assert {tuple(tensor.shape) for tensor in saved} == {(RANK, IN), (OUT, RANK)}
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_tokens_that_are_not_contiguous_give_the_same() -> None:
    ours, x = the_layer(fused(layer())), torch.randn(5, 2, IN, dtype=torch.float64)
    torch.testing.assert_close(ours(x.transpose(0, 1)), ours(x).transpose(0, 1))


def test_under_autocast_products_are_in_its_dtype_and_the_adapters_gradients_in_their_own() -> None:
    theirs = layer(dtype=torch.bfloat16)
    draw(theirs, torch.float32)
    ours = fused(theirs)
    with torch.autocast("cpu", torch.bfloat16):
        with_peft, with_ours = outcome(theirs, torch.float32), outcome(ours, torch.float32)
    assert with_ours["y"].dtype == torch.bfloat16
    assert all(value.dtype == torch.float32 for name, value in with_ours.items() if name != "y")
    assert_alike(with_ours, with_peft, 0.01)
    exact = layer(dtype=torch.bfloat16).float()
    draw(exact, torch.float32)
    reference = outcome(exact, torch.float32)
    for name, value in with_ours.items():
        assert helpers.relative_error(value, reference[name]) < 0.01, name


def test_without_autocast_an_adapter_in_float32_follows_a_base_in_bfloat16() -> None:
    ours = fused(layer(dtype=torch.bfloat16))
    draw(ours, torch.float32)
    values = outcome(ours, torch.bfloat16)
    assert values["y"].dtype == values["x"].dtype == torch.bfloat16
    assert {value.dtype for name, value in values.items() if "lora" in name} == {torch.float32}


# ------------------------------------------------------------------ left to PEFT


def with_second_adapter(wrapped: peft.PeftModel) -> peft.PeftModel:
    wrapped.add_adapter("other", peft.LoraConfig(r=2, target_modules=["a"]))
    draw(wrapped, torch.float64)
    the_layer(wrapped).set_adapter(["default", "other"])
    return wrapped


def with_trained_base(wrapped: peft.PeftModel) -> peft.PeftModel:
    the_layer(wrapped).base_layer.weight.requires_grad_()
    return wrapped


def merged(wrapped: peft.PeftModel) -> peft.PeftModel:
    the_layer(wrapped).merge()
    return wrapped


def without_active(wrapped: peft.PeftModel) -> peft.PeftModel:
    the_layer(wrapped)._active_adapter = ["absent"]
    return wrapped


@pytest.mark.parametrize(
    "make",
    [
        lambda: layer(lora_dropout=0.5).train(),
        lambda: layer(use_dora=True),
        lambda: layer(bias=True, lora_bias=True),
        lambda: with_second_adapter(layer()),
        lambda: with_trained_base(layer()),
        lambda: merged(layer()),
        lambda: without_active(layer()),
    ],
    ids=["dropout", "dora", "bias", "two", "trained base", "merged", "none active"],
)
def test_what_is_no_plain_lora_is_computed_by_peft(
    make: Callable[[], peft.PeftModel], products: list[nn.Module]
) -> None:
    theirs = make()
    ours = fused(theirs)
    with_ours, with_peft = outcome(ours), outcome(theirs)
    assert with_ours.keys() == with_peft.keys()
    assert all(torch.equal(with_ours[name], with_peft[name]) for name in with_peft)
    assert products == []


def test_what_can_change_is_looked_at_in_every_call(products: list[nn.Module]) -> None:
    ours = fused(layer(lora_dropout=0.5))
    x = torch.randn(3, IN, dtype=torch.float64)

    def is_fused() -> bool:
        products.clear()
        the_layer(ours)(x)
        return bool(products)

    ours.train()
    assert not is_fused()
    ours.eval()
    assert is_fused()
    with adapters.adapters_disabled(ours):
        assert not is_fused()
        assert torch.equal(the_layer(ours)(x), the_layer(ours).base_layer(x))
    the_layer(ours).merge()
    assert not is_fused()
    the_layer(ours).unmerge()
    assert is_fused()
    with_second_adapter(ours)
    assert not is_fused()
    the_layer(ours).set_adapter("other")
    assert is_fused()
    assert helpers.relative_error(the_layer(ours)(x), lora.Linear.forward(the_layer(ours), x)) < 1e-10


def test_a_base_with_a_forward_of_its_own_and_no_product_is_left_to_peft(products: list[nn.Module]) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    ours = fused(layer())
    base = Doubled(IN, OUT, bias=False, dtype=torch.float64).requires_grad_(False)
    the_layer(ours).base_layer = base
    x = torch.randn(3, IN, dtype=torch.float64)
    with adapters.adapters_disabled(ours):
        assert torch.equal(the_layer(ours)(x), base(x))
    torch.testing.assert_close(the_layer(ours)(x), lora.Linear.forward(the_layer(ours), x))
    assert products == []


# ------------------------------------------------------------------ with adapters


def test_an_attached_adapter_is_fused_and_is_still_pefts(tmp_path: Path, products: list[nn.Module]) -> None:
    model = helpers.transformer("klein")
    inputs = helpers.transformer_inputs(model.config)
    plain_prediction = model(**inputs)
    wrapped = adapters.attach(model, rank=3)
    draw(wrapped, torch.float32)
    prediction = model(**inputs)
    layers = [module for module in model.modules() if isinstance(module, lora.Linear)]
    assert len(layers) == 8 + 2 * 2
    assert all(type(module) is FusedLora for module in layers)
    assert len(products) == len(layers)
    assert not torch.equal(prediction, plain_prediction)
    with adapters.adapters_disabled(model):
        assert torch.equal(model(**inputs), plain_prediction)

    adapters.save(wrapped, tmp_path, base="klein")
    products.clear()
    other = helpers.transformer("klein")
    adapters.load(other, tmp_path)
    torch.testing.assert_close(other(**inputs), prediction, rtol=1e-5, atol=1e-5)
    assert len(products) == len(layers)  # one adapter for inference is fused too
    adapters.load(other, tmp_path, name="twice")
    products.clear()
    assert not torch.allclose(other(**inputs), prediction)
    assert products == []  # two are PEFT's
