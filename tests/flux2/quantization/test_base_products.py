"""Products of layers in FP8, INT8 and NF4: with which numbers, in which dtype, and how many."""

from __future__ import annotations

import copy
from typing import Any

import bitsandbytes as bnb
import helpers
import pytest
import torch
from quantized_helpers import FLOAT8, IN, KINDS, OPTIONS, OUT, layer, random_weight, rows
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flux2.quantization.float8 import quantize_rows
from flux2.quantization.nf4 import Nf4Linear, Workspace


def rounded(x: Tensor) -> Tensor:
    """Every row of x through e4m3 at its own scale, in float64."""
    scale = x.abs().amax(-1, keepdim=True) / 448
    return (x / scale).to(FLOAT8).double() * scale.double()


# ------------------------------------------------------------------ fp8: products


@pytest.mark.parametrize("kind", ["fp8", "fp8_rows", "fp8_both_layouts"])
def test_fp8_products_are_those_of_rows_rounded_to_e4m3(kind: str) -> None:
    linear = layer(kind)
    weight = linear.weight.double()
    x, dy = rows(), rows(width=OUT, seed=2)
    assert helpers.relative_error(linear.product(x), rounded(x) @ weight.t()) < 1e-6
    values = linear.values().double()  # type: ignore[operator]
    if linear.rowwise:  # the gradient takes the scales of the rows before it is rounded
        folded = dy * linear.scales()
        assert helpers.relative_error(linear.input_gradient(dy), rounded(folded) @ values) < 1e-6
    else:
        assert helpers.relative_error(linear.input_gradient(dy), rounded(dy) @ weight) < 1e-6
    assert helpers.relative_error(linear.product(x), x.double() @ weight.t()) > 1e-3
    assert helpers.relative_error(linear.input_gradient(dy), dy.double() @ weight) > 1e-3


@pytest.mark.parametrize("kind", [*(kind for kind in OPTIONS if "dequantized" in kind or "bf16" in kind), "nf4"])
def test_products_that_are_not_in_fp8_are_those_of_the_dequantized_weight(kind: str) -> None:
    linear = layer(kind)
    weight = linear.weight.double()
    x, dy = rows(), rows(width=OUT, seed=2)
    if "bf16" not in kind:
        assert helpers.relative_error(linear.product(x), x.double() @ weight.t()) < 1e-6
    assert helpers.relative_error(linear.input_gradient(dy), dy.double() @ weight) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_autograd_gives_the_two_products_and_no_more(kind: str) -> None:
    linear = layer(kind)
    x, dy = rows().requires_grad_(), rows(width=OUT, seed=2)
    y = linear(x)
    y.backward(dy)
    assert torch.equal(y.detach(), linear.product(x.detach()))
    assert x.grad is not None
    assert torch.equal(x.grad, linear.input_gradient(dy))
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in linear.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_in_the_dtype_of_their_input_or_of_autocast(kind: str) -> None:
    linear = layer(kind)
    exact = linear(rows())
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        assert linear(rows().to(dtype)).dtype == dtype
        assert linear.input_gradient(rows(width=OUT).to(dtype)).dtype == dtype
    x = rows().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = linear(x)
    assert y.dtype == torch.bfloat16
    assert helpers.relative_error(y.detach(), exact) < 0.04
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


class Matrices(TorchDispatchMode):
    """Notes the arguments of every product of matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("mm", "addmm", "bmm", "matmul", "linear", "_scaled_mm", "_int_mm"):
            self.seen.append((name, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_backward_are_one_product_each_and_none_is_a_weight_gradient(kind: str) -> None:
    linear = layer(kind)
    x = rows().requires_grad_()
    with Matrices() as products:
        linear(x).sum().backward()
    shapes = [tuple(tuple(argument.shape) for argument in args[:2]) for _, args, _ in products.seen]
    rotations = [((10, IN), (IN, IN))] * (2 if kind == "int8_rotated" else 0)  # of the input and of its gradient
    assert sorted(shapes) == sorted([((10, IN), (IN, OUT)), ((10, OUT), (OUT, IN)), *rotations])
    in_8_bits = [name in ("_scaled_mm", "_int_mm") for name, args, _ in products.seen if args[1].shape != (IN, IN)]
    backward = kind != "nf4" and "dequantized" not in kind and "bf16" not in kind
    assert in_8_bits == [backward or "bf16" in kind, backward]


def strided_products(kind: str, device: str) -> list[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """The products in 8 bits of a part of a wider input, with a gradient that comes transposed."""
    linear = layer(kind).to(device)
    x = torch.randn(2, 5, 3 * IN, device=device)[..., IN : 2 * IN].requires_grad_()
    with Matrices() as products:
        linear(x).backward(torch.randn(OUT, 5, 2, device=device).permute(2, 1, 0))
    return [seen for seen in products.seen if seen[0] in ("_scaled_mm", "_int_mm")]


@pytest.mark.parametrize("kind", ["int8", "int8_rotated", "int8_both_layouts"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_int8_products_keep_to_the_rules_of_cuda(kind: str, device: str) -> None:
    """A row-major and B column-major, for which every GPU has a kernel, and sides that are multiples of 8."""
    products = strided_products(kind, device)
    assert [name for name, _, _ in products] == ["_int_mm"] * 2
    for (_, (a, b), _), (inner, outer) in zip(products, ((IN, OUT), (OUT, IN)), strict=True):
        assert (a.dtype, b.dtype) == (torch.int8, torch.int8)
        assert (a.shape, a.stride()) == ((10, inner), (inner, 1))
        assert (b.shape, b.stride()) == ((inner, outer), (1, inner))
        assert inner % 8 == outer % 8 == 0


@pytest.mark.parametrize("kind", ["fp8", "fp8_rows", "fp8_both_layouts"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_fp8_products_keep_to_the_rules_of_cuda(kind: str, device: str) -> None:
    """A row-major, B column-major, sides multiples of 16, one scale a row and one a column, contiguous, in float32.
    The CPU would take less strict arguments, the meta device checks some of these itself."""
    products = strided_products(kind, device)
    assert [name for name, _, _ in products] == ["_scaled_mm"] * 2
    for (_, args, _), (inner, outer) in zip(products, ((IN, OUT), (OUT, IN)), strict=True):
        a, b, a_scale, b_scale = args[:4]
        assert (a.dtype, b.dtype, a_scale.dtype, b_scale.dtype) == (FLOAT8, FLOAT8, torch.float32, torch.float32)
        assert (a.shape, a.stride()) == ((10, inner), (inner, 1))
        assert (b.shape, b.stride()) == ((inner, outer), (1, inner))
        assert inner % 16 == outer % 16 == 0
        assert (a_scale.shape, b_scale.shape) == ((10, 1), (1, outer))
        assert a_scale.is_contiguous()
        assert b_scale.is_contiguous()
        assert b_scale.stride() == (outer, 1)
        assert args[7] is True  # use_fast_accum


def test_the_second_layout_is_kept_only_if_asked_for() -> None:
    kept, copied = layer("fp8_both_layouts"), layer("fp8")
    assert torch.equal(kept.transposed().float(), copied.transposed().float())  # type: ignore[operator]
    assert kept.transposed().data_ptr() == kept.qweight_t.data_ptr()  # type: ignore[operator]
    bytes_of = [sum(parameter.nbytes for parameter in linear.parameters()) for linear in (kept, copied)]
    assert bytes_of == [2 * IN * OUT + 4, IN * OUT + 4]
    kept.adopt(layer("fp8", random_weight(seed=5)).storage())
    assert torch.equal(kept.transposed().float(), kept.values().t().float())  # type: ignore[operator]


def test_what_is_not_finite_is_not_hidden() -> None:
    for bad in (float("nan"), float("inf")):
        x = rows()
        x[0, 2, 7] = bad
        values, scale = quantize_rows(x.flatten(0, 1))
        whole = values.float() * scale
        assert not whole[2].isfinite().all()
        assert whole[[0, 1, 3]].isfinite().all()
        for kind in KINDS:
            assert not layer(kind)(x)[0, 2].isfinite().all()


# ------------------------------------------------------------------ nf4


def test_the_layers_of_a_model_dequantize_into_one_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, whose kernel writes where it is told to; here that is put on top of the CPU's."""
    original, written = bnb.functional.dequantize_4bit, []

    def with_out(packed: Tensor, state: Any, out: Tensor | None = None) -> Tensor:
        if out is None:
            return original(packed, state)
        assert (out.shape, out.dtype) == (state.shape, state.dtype)
        written.append(out.data_ptr())
        return out.copy_(original(packed, state))

    space = Workspace()
    small, large = (layer("nf4", random_weight(rows=out), workspace=space) for out in (32, OUT))
    x, separate = rows(), [layer("nf4", random_weight(rows=out)) for out in (32, OUT)]
    expected = [linear(x) for linear in separate] + [linear.input_gradient(linear(x)) for linear in separate]
    monkeypatch.setattr(bnb.functional, "dequantize_4bit", with_out)
    monkeypatch.setattr(Nf4Linear, "out_devices", ("cpu",))
    ours = [linear(x) for linear in (small, large)]
    ours += [linear.input_gradient(y) for linear, y in zip((small, large), ours, strict=True)]
    assert all(torch.equal(one, other) for one, other in zip(ours, expected, strict=True))
    assert len(written) == 4
    assert len(set(written)) == 1
    (buffer,) = space._buffers.values()
    assert buffer.numel() == IN * OUT
    read = small.weight + 0  # is not in the buffer
    large(x)
    assert torch.equal(read, separate[0].weight + 0)
    assert copy.deepcopy(small).workspace._buffers == {}


@pytest.mark.parametrize("kind", ["fp8", "fp8_rows", "int8", "int8_rotated", "nf4"])
def test_a_compiled_layer_is_one_graph_with_the_same_results(kind: str) -> None:
    linear, plain = layer(kind), layer(kind)
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    x, other = rows().requires_grad_(), rows().requires_grad_()
    y, expected = compiled(x), plain(other)
    y.sum().backward()
    expected.sum().backward()
    assert torch.equal(y.detach(), expected.detach())
    assert x.grad is not None
    assert other.grad is not None
    assert torch.equal(x.grad, other.grad)
