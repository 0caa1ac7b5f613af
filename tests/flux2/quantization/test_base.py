"""Layers in FP8, INT8 and NF4: what they store, how it is read, and what they refuse."""

from __future__ import annotations

import math
from pathlib import Path

import bitsandbytes as bnb
import helpers
import pytest
import torch
from quantized_helpers import FLOAT8, IN, KINDS, OPTIONS, OUT, class_of, layer, random_weight, rows
from safetensors.torch import load_file, save_file
from torch import Tensor

from flux2.quantization import eight_bit, nf4
from flux2.quantization.float8 import Float8Linear
from flux2.quantization.nf4 import Nf4Linear

# ------------------------------------------------------------------ fp8: what is stored


@pytest.mark.parametrize("rowwise", [False, True])
def test_fp8_weights_are_scaled_to_the_range_of_e4m3(rowwise: bool) -> None:
    weight = random_weight()
    linear = Float8Linear(IN, OUT, rowwise=rowwise)
    linear.store(weight)
    scale = weight.abs().amax(1, keepdim=True) / 448 if rowwise else weight.abs().amax() / 448
    assert torch.equal(linear.weight + 0, (weight / scale).to(FLOAT8).float() * scale)
    assert linear.values().float().abs().max() == 448
    assert linear.scales().shape == ((OUT,) if rowwise else (1,))
    assert helpers.relative_error(linear.weight, weight) < (0.028 if rowwise else 0.034)


def test_a_weight_of_zeros_and_one_with_rows_of_zeros_are_exact() -> None:
    for weight in (torch.zeros(32, 16), torch.cat([torch.zeros(16, 16), torch.ones(16, 16)])):
        for kind in ("fp8", "fp8_rows", "int8", "nf4"):
            linear = layer(kind, weight)
            assert torch.equal(linear.weight + 0, weight)
            assert torch.equal(linear(torch.zeros(3, 16)), torch.zeros(3, 32))


def test_quantizing_in_pieces_changes_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in ("fp8", "fp8_rows", "int8", "nf4"):
        whole = dict(layer(kind).named_parameters())
        with monkeypatch.context() as patch:
            for module, size in ((eight_bit, "CHUNK"), (nf4, "PART")):
                patch.setattr(module, size, 640)
            pieces = dict(layer(kind).named_parameters())
        assert whole.keys() == pieces.keys()
        assert all(torch.equal(whole[name], pieces[name]) for name in whole)


# ------------------------------------------------------------------ nf4


def test_nf4_is_stored_as_bitsandbytes_stores_it_bit_for_bit() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        weight = random_weight().to(dtype)
        theirs = bnb.nn.Linear4bit(IN, OUT, bias=False, compress_statistics=True, quant_type="nf4")
        theirs.weight = bnb.nn.Params4bit(
            weight.clone(), requires_grad=False, compress_statistics=True, quant_type="nf4"
        )
        theirs = theirs.to("cpu")  # quantizes
        expected = theirs.state_dict()
        ours = layer("nf4", weight).storage()
        assert ours.keys() == expected.keys()
        assert "weight.nested_absmax" in ours
        assert all(ours[key].dtype == expected[key].dtype for key in ours)
        assert all(torch.equal(ours[key], expected[key]) for key in ours)
        state = bnb.functional.QuantState.from_dict(
            {key.removeprefix("weight."): value for key, value in ours.items() if key != "weight"}, torch.device("cpu")
        )
        assert (state.dtype, tuple(state.shape), state.quant_type) == (dtype, (OUT, IN), "nf4")
        assert torch.equal(
            bnb.functional.dequantize_4bit(ours["weight"], state), layer("nf4", weight).dequantize(dtype)
        )


@pytest.mark.parametrize(("out", "columns"), [(48, 48), (10, 96), (5, 7), (3, 64), (160, 64)])
def test_nf4_blocks_run_through_the_weight_whatever_its_width(out: int, columns: int) -> None:
    """bitsandbytes' CPU kernel begins a block at every row, which gives other weights where 64 does not divide it."""
    weight = random_weight(rows=out, columns=columns)
    with torch.compiler.set_stance("force_eager"):  # bitsandbytes compiles what is no multiple of 64, for ten seconds
        linear = layer("nf4", weight)
        found = linear.weight + 0
    packed = linear.qweight.flatten()
    codes = torch.stack([packed >> 4, packed & 15], dim=1).flatten()[: weight.numel()].long()
    absmax = linear.absmax.flatten().long()
    offset = linear.offset.view(torch.float32)
    nested = linear.nested_absmax.view(torch.float32).repeat_interleave(256)[: len(absmax)]
    scales = bnb.functional.create_dynamic_map()[absmax] * nested + offset
    table = bnb.functional.get_4bit_type("nf4", device="cpu")
    expected = (table[codes] * scales.repeat_interleave(64)[: weight.numel()]).view(out, columns)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    assert helpers.relative_error(found, weight) < 0.11


def test_nf4_with_scales_that_are_not_quantized_is_read_too() -> None:
    weight = random_weight()
    packed, state = bnb.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=False)
    tensors = {"weight": packed} | {f"weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    linear = Nf4Linear(IN, OUT, device="meta")
    linear.adopt(tensors)
    assert not linear.nested
    assert torch.equal(linear.weight + 0, bnb.functional.dequantize_4bit(packed, state))
    assert linear.storage().keys() == tensors.keys()
    assert all(torch.equal(linear.storage()[key], tensors[key]) for key in tensors)
    linear.store(weight)
    assert linear.storage().keys() == layer("nf4").storage().keys()


# ------------------------------------------------------------------ storage


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", ["meta", "cpu"])
def test_storage_comes_back_bit_for_bit_through_a_file(kind: str, start: str, tmp_path: Path) -> None:
    first = layer(kind)
    save_file({key: tensor.contiguous() for key, tensor in first.storage().items()}, tmp_path / "layer.safetensors")
    second = type(first)(IN, OUT, device=start, **OPTIONS.get(kind, {}))
    second.adopt(load_file(tmp_path / "layer.safetensors"))
    ours, theirs = dict(first.named_parameters()), dict(second.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(first(rows()), second(rows()))
    assert first.storage().keys() == second.storage().keys()


def test_a_scale_decides_whether_a_layer_is_rowwise() -> None:
    rowwise = Float8Linear(IN, OUT, device="meta")
    rowwise.adopt(layer("fp8_rows").storage())
    assert rowwise.rowwise
    assert torch.equal(rowwise.weight + 0, layer("fp8_rows").weight + 0)
    spread = Float8Linear(IN, OUT, rowwise=True)
    spread.adopt(layer("fp8").storage() | {"weight_scale": layer("fp8").storage()["weight_scale"].reshape(1)})
    assert spread.rowwise
    assert torch.equal(spread.weight + 0, layer("fp8").weight + 0)


def changed(kind: str, **other: Tensor | None) -> dict[str, Tensor]:
    tensors = layer(kind).storage() | {key.replace("__", "."): value for key, value in other.items()}
    return {key: tensor for key, tensor in tensors.items() if tensor is not None}


@pytest.mark.parametrize(
    ("kind", "tensors", "said"),
    [
        ("fp8", changed("fp8", weight_scale=None), r"\bweight_scale missing"),
        ("fp8", changed("fp8", weight_scale=torch.ones(3)), r"scale.*\(3,\)"),
        ("fp8", changed("fp8", weight=torch.zeros(OUT, IN)), r"weight.*torch\.float32"),
        ("fp8", layer("fp8", random_weight(rows=32)).storage(), r"weight.*\(32, 64\)"),
        ("int8", changed("int8", weight_scale=None), r"\bweight_scale missing"),
        ("int8", changed("int8", weight=layer("fp8").storage()["weight"]), r"weight.*float8_e4m3fn.*torch\.int8"),
        ("nf4", changed("nf4", weight__absmax=None), r"\bweight\.absmax missing"),
        ("nf4", changed("nf4", weight__nested_quant_map=None), r"\bweight\.nested_quant_map missing"),
        ("nf4", layer("nf4", random_weight(rows=32)).storage(), r"\(32, 64\).*\(160, 64\)"),
        ("nf4", changed("nf4", weight__quant_map=torch.linspace(-1, 1, 16)), "quant_map"),
        ("nf4", changed("nf4", weight=torch.zeros(9, 1, dtype=torch.uint8)), r"\b9\b.*\b5120\b"),
    ],
)
def test_a_weight_that_is_not_the_layers_is_refused(kind: str, tensors: dict[str, Tensor], said: str) -> None:
    linear = layer(kind)
    before = {name: parameter.clone() for name, parameter in linear.named_parameters()}
    with pytest.raises(ValueError, match=said) as error:
        linear.adopt(tensors)
    assert f"in_features={IN}" in str(error.value)
    assert all(torch.equal(parameter, before[name]) for name, parameter in linear.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fp8_is_stored_as_in_every_version_bit_for_bit(dtype: torch.dtype) -> None:
    """Divided in the dtype of the weight: quantized copies of before are those of now."""
    weight = torch.randn(64, 48, generator=torch.Generator().manual_seed(0)).to(dtype)
    layer = Float8Linear(48, 64)
    layer.store(weight)
    scale = weight.abs().max().float() / 448
    assert torch.equal(layer.qweight, (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8))
    assert torch.equal(layer.scale.view(torch.float32), scale[None])


def test_a_weight_of_another_shape_is_not_stored() -> None:
    for kind in ("fp8", "int8", "nf4"):
        with pytest.raises(ValueError, match=r"\(64, 160\).*Linear\(in_features=64"):
            layer(kind).store(random_weight().t())


@pytest.mark.parametrize("kind", KINDS)
def test_changing_the_dtype_of_a_model_changes_no_bit_of_what_is_stored(kind: str) -> None:
    linear = layer(kind)
    before = {name: parameter.clone() for name, parameter in linear.named_parameters()}
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.float32):
        linear.to(dtype)
        assert linear.weight.dtype == linear.dtype == dtype
        assert all(torch.equal(parameter, before[name]) for name, parameter in linear.named_parameters())
    assert torch.equal(linear(rows()), layer(kind)(rows()))
    assert {parameter.dtype for parameter in linear.parameters()} == {torch.uint8}
    assert not list(linear.buffers())


@pytest.mark.parametrize(("out", "columns"), [(OUT, IN), (48, 48), (36864, 6144)])
def test_a_layer_without_memory_has_the_bytes_that_it_will_have(out: int, columns: int) -> None:
    size, blocks = out * columns, math.ceil(out * columns / 64)
    expected = {
        "fp8": size + 4,
        "fp8_rows": size + 4 * out,
        "fp8_both_layouts": 2 * size + 4,
        "int8": size + 4 * out,
        "int8_both_layouts": 2 * size + 4 * out,
        "nf4": size // 2 + blocks + 4 * math.ceil(blocks / 256) + 4,
    }
    for kind, count in expected.items():
        linear = class_of(kind)(columns, out, device="meta", **OPTIONS.get(kind, {}))
        assert all(parameter.is_meta for parameter in linear.parameters())
        assert sum(parameter.nbytes for parameter in linear.parameters()) == count
        if out < 1000:
            linear.store(random_weight(rows=out, columns=columns))
            assert sum(parameter.nbytes for parameter in linear.parameters()) == count
            assert not linear.qweight.is_meta


# ------------------------------------------------------------------ the weight that is read


@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_is_read_as_a_plain_tensor(kind: str) -> None:
    linear = layer(kind)
    weight = linear.weight
    assert isinstance(linear, torch.nn.Linear)
    assert (tuple(weight.shape), weight.dtype, weight.device.type) == ((OUT, IN), torch.float32, "cpu")
    values = linear.dequantize(torch.float32)
    for read in (weight.clone(), weight.data, weight + 0, weight.detach(), weight.float() * 1):
        assert torch.equal(read, values)
    assert type(weight + 0) is type(weight.t()) is type(weight[0]) is Tensor
    assert torch.equal(weight @ torch.eye(IN), values)


@pytest.mark.parametrize("kind", KINDS)
def test_writing_the_weight_is_refused_with_what_to_do(kind: str) -> None:
    linear = layer(kind)
    before = linear.weight.clone()

    def added() -> None:
        linear.weight.data += 1

    def replaced() -> None:
        linear.weight = torch.zeros(OUT, IN)

    def data() -> None:
        linear.weight.data = torch.zeros(OUT, IN)

    for write in (added, replaced, data, lambda: linear.weight.add_(1), lambda: linear.weight.copy_(before)):
        with pytest.raises(ValueError, match="precision=bf16 or fp32"):
            write()
    assert torch.equal(linear.weight + 0, before)
