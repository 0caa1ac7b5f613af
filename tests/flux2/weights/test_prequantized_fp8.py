"""flux2.weights.prequantized: weights that are in FP8 in their file are taken over with their scales."""

import re
from collections.abc import Callable

import pytest
import torch
from prequantized_helpers import FP8, NF4, Load, check_equal, check_stored, joined, published, weights
from torch import Tensor

from flux2.quantization.nf4 import Nf4Linear
from flux2.quantization.precision import Precision
from flux2.weights.key_names import swap_halves
from flux2.weights.sources import WeightsError

pytest_plugins = ("prequantized_helpers",)


def in_eight_bits(
    state: dict[str, Tensor], spelling: str, inputs: str | None = None, rows: bool = False
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A file in e4m3 with scales, and the values that it stands for; matrices of blocks alone are in it."""
    stored, meant = dict(state), dict(state)
    for name, tensor in state.items():
        if "blocks." not in name or tensor.ndim < 2:
            continue
        scale = (tensor.abs().amax(dim=1, keepdim=True) if rows else tensor.abs().max()) / 448
        module = name.removesuffix("weight")
        stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
        stored[module + spelling] = scale
        if inputs is not None:
            stored[module + inputs] = torch.tensor(1.0)
        meant[name] = stored[name].float() * scale
    return stored, meant


SPELLINGS = [("weight_scale", None), ("weight_scale", "input_scale"), ("scale_weight", "scale_input")]


@pytest.mark.parametrize(("spelling", "inputs"), SPELLINGS)
def test_fp8_with_a_scale_a_tensor_is_taken_over(spelling: str, inputs: str | None, load: Load) -> None:
    stored, meant = in_eight_bits(weights(), spelling, inputs)
    stored["scaled_fp8"] = torch.empty(2, dtype=torch.float8_e4m3fn)
    said: list[str] = []
    model = load({f"model.diffusion_model.{name}": tensor for name, tensor in stored.items()}, FP8, say=said.append)
    check_equal(model, meant)
    layer = model.get_submodule("double_blocks.0.img_attn.qkv")
    assert torch.equal(layer.qweight.view(torch.float8_e4m3fn), stored["double_blocks.0.img_attn.qkv.weight"])
    assert layer.scale.view(torch.float32) == stored[f"double_blocks.0.img_attn.qkv.{spelling}"]
    (line,) = said
    assert "10 layers" in line
    assert ("10 input scales" in line) == (inputs is not None)


@pytest.mark.parametrize("rows", [False, True], ids=["one a tensor", "one a row"])
@pytest.mark.parametrize("spelling", ["weight_scale", "scale_weight"])
def test_fp8_in_diffusers_names_is_taken_over_with_a_scale_a_row_where_they_differ(
    spelling: str, rows: bool, load: Load
) -> None:
    state = weights()
    stored, meant = in_eight_bits(published(state), spelling, rows=rows)
    said: list[str] = []
    model = load(stored, FP8, say=said.append)
    assert "10 layers" in said[0]
    assert not re.search(r"dequanti[sz]ed", said[0])
    wanted = joined(meant, state)
    check_equal(model, wanted)
    fused = model.get_submodule("double_blocks.0.img_attn.qkv")
    assert fused.rowwise
    assert torch.equal(fused.qweight[:64].view(torch.float8_e4m3fn), stored["transformer_blocks.0.attn.to_q.weight"])
    assert model.get_submodule("single_blocks.0.linear1").rowwise == rows
    x = torch.randn(3, fused.in_features)
    error = fused(x) - x @ wanted["double_blocks.0.img_attn.qkv.weight"].t()
    assert error.norm() < 0.05 * fused(x).norm()  # of the inputs' rounding

    for part in "qkv":  # as some quantizers see to
        stored[f"transformer_blocks.0.attn.to_{part}.{spelling}"] = torch.tensor(0.5)
    layer = load(stored, FP8).get_submodule("double_blocks.0.img_attn.qkv")
    assert not layer.rowwise
    assert layer.scale.view(torch.float32) == 0.5


@pytest.mark.parametrize("scale", [0.0, float("nan"), -1.0])
def test_a_scale_that_is_none_is_named(scale: float, load: Load) -> None:
    stored, _ = in_eight_bits(weights(), "weight_scale")
    stored["single_blocks.0.linear2.weight_scale"] = torch.tensor(scale)
    with pytest.raises(WeightsError, match=r"single_blocks\.0\.linear2\.weight\b.*scale.*(zero|negative|finite)"):
        load(stored, FP8)


@pytest.mark.parametrize("precision", [FP8, NF4], ids=["fp8", "nf4"])
def test_weights_that_are_no_numbers_or_of_an_unusual_dtype(precision: Precision, load: Load) -> None:
    state, name = weights(), "single_blocks.0.linear2.weight"
    in_float64 = load({key: tensor.double() for key, tensor in state.items()}, precision)
    assert torch.equal(
        in_float64.get_submodule(name[:-7]).qweight, load(state, precision).get_submodule(name[:-7]).qweight
    )
    with pytest.raises(WeightsError, match=rf"/flux\.safetensors: {name}\b.*torch\.int32\b"):
        load(state | {name: state[name].int()}, precision)
    broken = state[name].clone()
    broken[3, 5] = float("nan")
    with pytest.raises(WeightsError, match=rf"/flux\.safetensors: {name}\b.*finite"):
        load(state | {name: broken}, precision)


@pytest.mark.parametrize("rows", [False, True], ids=["one a tensor", "one a row"])
@pytest.mark.parametrize("naming", [dict, published], ids=["ours", "diffusers'"])
def test_fp8_is_dequantized_for_other_precisions(rows: bool, naming: Callable[..., dict], load: Load) -> None:
    state = weights()
    stored, meant = in_eight_bits(naming(state), "weight_scale", rows=rows)
    wanted = joined(meant, state) if naming is published else meant
    check_equal(load(stored, torch.float32), wanted)
    name = "single_blocks.0.linear1"
    layer = load(stored, NF4).get_submodule(name)
    assert isinstance(layer, Nf4Linear)
    check_stored(layer, wanted[f"{name}.weight"])


def test_fp8_halves_in_another_order_have_their_scales(load: Load) -> None:
    state = weights()
    stored = published(state)
    name = "norm_out.linear"
    scale = stored[f"{name}.weight"].abs().amax(dim=1, keepdim=True) / 448
    stored[f"{name}.weight"] = (stored[f"{name}.weight"] / scale).to(torch.float8_e4m3fn)
    stored[f"{name}.weight_scale"] = scale
    meant = swap_halves(stored[f"{name}.weight"].float() * scale)
    assert torch.equal(load(stored).final_layer.adaLN_modulation[1].weight, meant)


def test_fp8_without_scales_is_what_it_says(load: Load) -> None:
    state = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in weights().items()}
    wanted = {name: tensor.float() for name, tensor in state.items()}
    check_equal(load(state), wanted)
    model = load(state, FP8)
    check_equal(model, wanted)
    assert model.get_submodule("single_blocks.0.linear1").scale.view(torch.float32) == 1
    five = {name: tensor.to(torch.float8_e5m2) for name, tensor in weights().items()}
    check_equal(load(five), {name: tensor.float() for name, tensor in five.items()})


def test_a_scale_of_another_shape_is_named(load: Load) -> None:
    stored, _ = in_eight_bits(weights(), "weight_scale")
    stored["single_blocks.0.linear1.weight_scale"] = torch.ones(3)
    with pytest.raises(WeightsError, match=r"single_blocks\.0\.linear1\.weight\b.*scale.*\(3,\)"):
        load(stored, FP8)


def test_scales_of_weights_that_are_not_in_fp8_are_unexpected(load: Load) -> None:
    state = weights() | {"single_blocks.0.linear1.weight_scale": torch.ones(1)}
    with pytest.raises(WeightsError, match=r"\b1 unexpected: single_blocks\.0\.linear1\.weight_scale"):
        load(state)
