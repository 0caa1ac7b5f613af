"""flux2.weights.prequantized: weights that are in 4 bits in their file are taken over bit for bit where they can be."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import bitsandbytes.functional as bnb
import helpers
import pytest
import torch
from prequantized_helpers import CONFIG, FP8, NF4, Load, check_equal, check_stored, joined, of_size, published, weights
from torch import Tensor

from flux2.quantization.float8 import Float8Linear
from flux2.quantization.nf4 import Nf4Linear
from flux2.quantization.precision import Precision
from flux2.weights.key_names import swap_halves
from flux2.weights.loading import load_transformer
from flux2.weights.sources import ModelSource, WeightsError

pytest_plugins = ("prequantized_helpers",)


def in_four_bits(state: dict[str, Tensor], nested: bool = True) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What bitsandbytes saves of a model whose matrices are in NF4; and the values that those stand for."""
    stored, meant = dict(state), dict(state)
    for name, tensor in state.items():
        if tensor.ndim < 2:
            continue
        packed, quantization = bnb.quantize_4bit(tensor, blocksize=64, compress_statistics=nested, quant_type="nf4")
        told = quantization.as_dict(packed=True)
        stored |= {name: packed} | {f"{name}.{key}": value for key, value in told.items()}
        scales = quantization.absmax
        if nested:
            scales = bnb.dequantize_blockwise(scales, quantization.state2) + quantization.offset
        nibbles = torch.stack([packed >> 4, packed & 15], dim=-1).reshape(-1, 64).long()
        meant[name] = (quantization.code[nibbles] * scales[:, None]).reshape(tensor.shape)
    return stored, meant


def test_four_bits_in_diffusers_names_are_taken_over_bit_for_bit(load: Load) -> None:
    state = weights()
    stored, meant = in_four_bits(published(state))
    said: list[str] = []
    model = load(stored, NF4, say=said.append)
    check_equal(model, joined(meant, state))
    linear, fused = model.get_submodule("single_blocks.0.linear1"), model.get_submodule("double_blocks.0.txt_attn.qkv")
    assert isinstance(linear, Nf4Linear)
    assert isinstance(fused, Nf4Linear)
    name = "single_transformer_blocks.0.attn.to_qkv_mlp_proj.weight"
    assert torch.equal(linear.qweight, stored[name])
    assert torch.equal(linear.absmax, stored[f"{name}.absmax"])
    assert torch.equal(linear.nested_absmax.view(torch.float32), stored[f"{name}.nested_absmax"])
    parts = [stored[f"transformer_blocks.0.attn.add_{part}_proj.weight"] for part in "qkv"]
    assert torch.equal(fused.qweight, torch.cat(parts))
    assert not fused.nested  # each part's scales have an offset of their own
    (line,) = said
    assert re.search(r"/flux\.safetensors\b.*\b10 layers\b.*\b11 tensors\b.*dequanti[sz]ed", line)


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_four_bits_in_black_forest_labs_names_keep_their_quantized_scales(
    prefix: str, load: Load, tmp_path: Path
) -> None:
    stored, meant = in_four_bits(weights())
    model = load({prefix + name: tensor for name, tensor in stored.items()}, NF4, cache=tmp_path / "copies")
    check_equal(model, meant)
    assert all(module.nested for module in model.modules() if isinstance(module, Nf4Linear))
    assert not (tmp_path / "copies").exists()  # it would be as large as the file


def test_four_bits_without_quantized_scales_are_taken_over(load: Load) -> None:
    state = weights()
    stored, meant = in_four_bits(published(state), nested=False)
    model = load(stored, NF4)
    check_equal(model, joined(meant, state))
    assert not any(module.nested for module in model.modules() if isinstance(module, Nf4Linear))


@pytest.mark.parametrize(("heads", "nested"), [(4, False), (8, True)])
def test_halves_in_another_order_are_taken_over(heads: int, nested: bool, load: Load) -> None:
    """At 8 heads a half is whole blocks of scales, which then stay quantized."""
    state = weights(heads)
    stored, meant = in_four_bits(published(state))
    layer = r"final_layer\.adaLN_modulation\.1"
    model = load(stored, Precision(storage="nf4", layers=(layer,)), heads)
    check_equal(model, joined(meant, state))
    swapped = model.get_submodule("final_layer.adaLN_modulation.1")
    assert isinstance(swapped, Nf4Linear)
    assert swapped.nested == nested
    assert torch.equal(swapped.qweight, swap_halves(stored["norm_out.linear.weight"]))


def test_four_bits_are_dequantized_for_other_precisions(load: Load) -> None:
    state = weights()
    stored, meant = in_four_bits(published(state))
    wanted = joined(meant, state)
    check_equal(load(stored, torch.float32), wanted)
    name = "double_blocks.0.img_attn.qkv"
    layer = load(stored, FP8).get_submodule(name)
    assert isinstance(layer, Float8Linear)
    check_stored(layer, wanted[f"{name}.weight"])


def test_parts_in_different_forms_are_joined_as_floats(load: Load) -> None:
    """Quantizers leave out layers that they are told to."""
    state = weights()
    plain = published(state)
    stored, meant = in_four_bits(plain)
    name = "transformer_blocks.0.attn.to_k.weight"
    stored = {key: tensor for key, tensor in stored.items() if not key.startswith(name)}
    stored[name] = meant[name] = plain[name].bfloat16()
    meant[name] = meant[name].float()
    check_equal(load(stored, torch.float32), joined(meant, state))
    name = "double_blocks.0.img_attn.qkv"
    layer = load(stored, NF4).get_submodule(name)
    assert isinstance(layer, Nf4Linear)
    check_stored(layer, joined(meant, state)[f"{name}.weight"])


@pytest.mark.parametrize(
    ("suffix", "told"),
    [
        (".quant_state.bitsandbytes__nf4", "4 bits.*NF4.*quant_state"),
        (".quant_map", "quant_map"),
        (".nested_absmax", "nested_absmax"),
    ],
)
def test_a_4_bit_weight_that_is_not_whole_is_named(suffix: str, told: str, load: Load) -> None:
    stored, _ = in_four_bits(weights())
    name = "single_blocks.0.linear2.weight"
    del stored[name + suffix]
    with pytest.raises(WeightsError, match=rf"/flux\.safetensors: {name}\b.*{told}"):
        load(stored, NF4)


@pytest.mark.parametrize(
    ("suffix", "change", "told"),
    [
        ("absmax", lambda old: old.float(), r"absmax\b.*torch\.float32.*torch\.uint8"),
        ("nested_absmax", lambda old: old.half(), r"nested_absmax\b.*torch\.float16.*torch\.float32"),
    ],
)
def test_scales_of_4_bits_that_are_others_are_named(
    suffix: str, change: Callable[[Tensor], Tensor], told: str, load: Load
) -> None:
    stored, _ = in_four_bits(weights())
    name = "single_blocks.0.linear2.weight"
    stored[f"{name}.{suffix}"] = change(stored[f"{name}.{suffix}"])
    with pytest.raises(WeightsError, match=rf"/flux\.safetensors: {name}\b.*{told}"):
        load(stored, NF4)


@pytest.mark.parametrize("precision", [torch.float32, NF4], ids=["fp32", "nf4"])
@pytest.mark.parametrize("naming", [dict, published], ids=["ours", "diffusers'"])
@pytest.mark.parametrize("nested", [False, True], ids=["absmax", "nested_absmax"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3.4e38])
def test_a_scale_of_4_bits_that_is_not_finite_is_named(
    value: float, nested: bool, naming: Callable[..., dict], precision: Precision | torch.dtype, load: Load
) -> None:
    """Quantized scales overflow where the offset is added; unquantized ones of any finite size do not."""
    state = naming(weights())
    name = next(key for key in state if key.endswith(("linear2.weight", "0.attn.to_v.weight")))
    stored, _ = in_four_bits(state, nested)
    if nested:
        about = f"{name}.quant_state.bitsandbytes__nf4"
        content = json.loads(bytes(stored[about].tolist())) | {"nested_offset": 3.4e37}
        stored[about] = torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)
    key = "nested_absmax" if nested else "absmax"
    stored[f"{name}.{key}"].view(-1)[-1] = value
    if value == 3.4e38 and not nested:
        load(stored, precision)
        return
    with pytest.raises(WeightsError, match=rf"/flux\.safetensors: {name}\b.*weight\.{key}\b.*finite.*bfloat16"):
        load(stored, precision)


@pytest.mark.parametrize("nested", [False, True])
def test_a_block_of_zeros_has_the_scale_zero(nested: bool, load: Load) -> None:
    state, name = weights(), "single_blocks.0.linear2.weight"
    state[name][:, :64] = 0
    stored, meant = in_four_bits(state, nested)
    if not nested:
        assert (stored[f"{name}.absmax"] == 0).sum() == 64
    check_equal(load(stored, NF4), meant)


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [("dtype", "foo", "foo"), ("nested_dtype", "foo", "foo"), ("shape", "x", "shape")],
)
def test_a_description_of_4_bits_that_cannot_be_is_named(key: str, value: str, told: str, load: Load) -> None:
    stored, _ = in_four_bits(weights())
    name = "single_blocks.0.linear2.weight"
    state = f"{name}.quant_state.bitsandbytes__nf4"
    content = json.loads(bytes(stored[state].tolist())) | {key: value}
    stored[state] = torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)
    with pytest.raises(WeightsError, match=rf"/flux\.safetensors: {name}.*{told}"):
        load(stored, NF4)


def test_another_kind_of_4_bits_is_named(load: Load) -> None:
    stored, _ = in_four_bits(weights())
    name = "single_blocks.0.linear2.weight"
    stored[f"{name}.quant_state.bitsandbytes__fp4"] = stored.pop(f"{name}.quant_state.bitsandbytes__nf4")
    with pytest.raises(WeightsError, match=rf"{name}\b.*4 bits.*bitsandbytes__fp4"):
        load(stored, NF4)


def test_a_4_bit_weight_of_another_shape_is_misshaped(load: Load) -> None:
    state = weights()
    state["single_blocks.0.linear2.weight"] = torch.randn(64, 128)
    with pytest.raises(WeightsError, match=r"\b1 misshaped: single_blocks\.0\.linear2\.weight \(64, 128\)"):
        load(in_four_bits(state)[0], NF4)
    stored, _ = in_four_bits(weights())
    stored["single_blocks.0.linear2.weight.quant_state.bitsandbytes__nf4"] = torch.zeros(9, dtype=torch.uint8)
    with pytest.raises(WeightsError, match=r"quant_state\.bitsandbytes__nf4\b.*shape"):
        load(stored, NF4)


def test_a_4_bit_folder_is_what_diffusers_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written by diffusers with bitsandbytes, as the published 4-bit repositories are; values as diffusers has them."""
    from diffusers import BitsAndBytesConfig, Flux2Transformer2DModel
    from diffusers.quantizers.bitsandbytes import BnB4BitDiffusersQuantizer

    # diffusers wants a GPU here; bitsandbytes itself does not need one
    monkeypatch.setattr(BnB4BitDiffusersQuantizer, "validate_environment", lambda *_, **__: None)
    plain = helpers.randomize(helpers.reference_transformer(CONFIG), seed=3)
    plain.save_pretrained(tmp_path / "plain")
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    on_cpu = {"quantization_config": options, "device_map": {"": "cpu"}}
    Flux2Transformer2DModel.from_pretrained(tmp_path / "plain", **on_cpu).save_pretrained(
        tmp_path / "four" / "transformer"
    )
    theirs = Flux2Transformer2DModel.from_pretrained(tmp_path / "four" / "transformer", device_map={"": "cpu"})
    meant = {}
    for name, parameter in theirs.named_parameters():
        state = getattr(parameter, "quant_state", None)
        if state is not None:  # in rows of one block, as the CPU's kernel begins anew in each row
            shape, state.shape = state.shape, torch.Size((state.shape.numel() // 64, 64))
            state.dtype = torch.float32  # diffusers rounds to half precision
            parameter = bnb.dequantize_4bit(parameter.data, state).reshape(shape)
        meant[name] = parameter.float()
    model = load_transformer(ModelSource(of_size(4), str(tmp_path / "four")), "cpu", NF4)
    check_equal(model, joined(meant, weights()))
    assert sum(isinstance(module, Nf4Linear) for module in model.modules()) == 10


def test_the_state_that_is_written_for_joined_blocks_is_bitsandbytes_own(load: Load) -> None:
    """What a joined layer saves, bitsandbytes reads."""
    state = weights()
    stored, meant = in_four_bits(published(state))
    storage = load(stored, NF4).get_submodule("double_blocks.0.img_attn.qkv").storage()
    told = json.loads(bytes(storage["weight.quant_state.bitsandbytes__nf4"].tolist()))
    assert told["shape"] == [192, 64]
    quantization = bnb.QuantState.from_dict(
        {key: tensor for key, tensor in storage.items() if key != "weight"}, torch.device("cpu")
    )
    quantization.shape = torch.Size((192, 64))
    values = bnb.dequantize_4bit(storage["weight"], quantization)
    assert torch.equal(values, joined(meant, state)["double_blocks.0.img_attn.qkv.weight"])
