"""flux2.weights.prequantized: weights that are in FP8 in their file are taken over with their scales."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from prequantized_helpers import FP8, NF4, Load, check_equal, check_stored, joined, of_size, published, weights
from safetensors.torch import load_file, save_file
from torch import Tensor

from flux2.quantization.nf4 import Nf4Linear
from flux2.quantization.precision import Precision
from flux2.weights.key_names import swap_halves
from flux2.weights.loading import load_text_encoder, load_text_projection, load_transformer
from flux2.weights.sources import TINY_FOLDER, ModelSource, WeightsError, model_source

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


def test_the_part_whose_scale_is_zero_is_named(load: Load) -> None:
    stored, _ = in_eight_bits(published(weights()), "weight_scale")
    name = "transformer_blocks.0.attn.to_k"
    stored[f"{name}.weight_scale"] = torch.tensor(0.0)
    with pytest.raises(WeightsError, match=rf"{name}\.weight\b.*scale is zero"):
        load(stored, FP8)
    stored[f"{name}.weight"] = torch.zeros_like(stored[f"{name}.weight"])
    layer = load(stored, FP8).get_submodule("double_blocks.0.img_attn.qkv")
    assert not layer.weight.float()[64:128].any()
    assert layer.weight.float()[:64].any()


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


def in_blocks(weight: Tensor, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix in e4m3 with a scale per block, the scales, and the values that they stand for, block by block."""
    counts = -(-weight.shape[0] // rows), -(-weight.shape[1] // columns)
    stored, scales, meant = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty(counts), weight.clone()
    for i in range(counts[0]):
        for j in range(counts[1]):
            place = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            scales[i, j] = weight[place].abs().max() / 448
            stored[place] = (weight[place] / scales[i, j]).to(torch.float8_e4m3fn)
            meant[place] = stored[place].float() * scales[i, j]
    return stored, scales, meant


@pytest.fixture
def encoder_folder(tmp_path: Path) -> Path:
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(TINY_FOLDER / part, tmp_path / part)
    return tmp_path


def change_encoder(folder: Path, change: Callable[[str, Tensor], dict[str, Tensor]]) -> ModelSource:
    """Replace each projection of the language model in `folder` by what `change` gives."""
    file = folder / "text_encoder" / "model.safetensors"
    state = load_file(file)
    for name in [name for name in state if name.endswith("_proj.weight") and "vision" not in name]:
        state |= change(name, state.pop(name).float())
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, file)
    return model_source("tiny", None, None, str(folder))


SHAPES = [None, (1,), "rows", (48, 40)]


@pytest.mark.parametrize("leaf", ["weight_scale", "weight_scale_inv", "scale_weight"])
@pytest.mark.parametrize("shape", SHAPES, ids=["scalar", "one", "rows", "blocks"])
def test_a_text_encoder_in_fp8_is_read_with_its_scales(shape: object, leaf: str, encoder_folder: Path) -> None:
    wanted: dict[str, Tensor] = {}

    def change(name: str, weight: Tensor) -> dict[str, Tensor]:
        rows, columns = weight.shape
        size = shape if isinstance(shape, tuple) and len(shape) == 2 else (1 if shape == "rows" else rows, columns)
        stored, scales, wanted[name] = in_blocks(weight, *size)
        if shape is None or shape == (1,):
            scales = scales.reshape(shape or ())
        module = name.removesuffix("weight")
        inputs = {module + "activation_scale": torch.tensor(3.0)}  # as Mistral publishes them; not for weights
        return {name: stored, module + leaf: scales} | inputs

    source = change_encoder(encoder_folder, change)
    config = encoder_folder / "text_encoder" / "config.json"
    about = {"quant_method": "fp8", "weight_block_size": [48, 40] if shape == (48, 40) else None}
    config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": about}))
    encoder = load_text_encoder(source, dtype=torch.float32)
    for name, tensor in encoder.model.state_dict().items():
        if name.endswith("_proj.weight"):
            (key,) = (key for key in wanted if key.endswith(name) and "vision" not in key)
            assert torch.equal(tensor, wanted[key]), name
    plain = load_text_encoder(model_source("tiny"), dtype=torch.float32).encode(["a cup"])
    assert float((encoder.encode(["a cup"]) - plain).norm() / plain.norm()) < 0.1


@pytest.mark.parametrize("leaf", ["weight_scale_inv", "weight_zero_point", "bias", "lora_A.weight"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
def test_what_is_next_to_a_weight_of_the_encoder_and_not_read_is_refused(
    leaf: str, dtype: torch.dtype, encoder_folder: Path
) -> None:
    def change(name: str, weight: Tensor) -> dict[str, Tensor]:
        module = name.removesuffix("weight")
        both = {module + "weight_scale": torch.ones(1)} if dtype == torch.float8_e4m3fn else {}
        return {name: weight.to(dtype), module + leaf: torch.ones(1)} | both

    with pytest.raises(WeightsError, match=rf"unexpected: .*{re.escape(leaf)}"):
        load_text_encoder(change_encoder(encoder_folder, change))


def test_the_projection_of_embeddings_is_read_with_its_scale(tmp_path: Path) -> None:
    state = load_file(next((TINY_FOLDER / "transformer").glob("*.safetensors")))
    name = "context_embedder.weight"
    state[name], scales, meant = in_blocks(state[name].float(), 32, 32)
    save_file(state | {"context_embedder.weight_scale_inv": scales}, tmp_path / "x.safetensors")
    projection = load_text_projection(model_source("tiny", str(tmp_path / "x.safetensors")), "cpu", torch.float32)
    assert torch.equal(projection.weight, meant)


@pytest.mark.parametrize("naming", [dict, published], ids=["ours", "diffusers'"])
@pytest.mark.parametrize("precision", [torch.float32, FP8], ids=["fp32", "fp8"])
def test_a_transformer_with_a_scale_per_block_is_dequantized(
    naming: Callable[..., dict], precision: Precision | torch.dtype, load: Load
) -> None:
    state = weights()
    stored, meant = naming(state), naming(state)
    for name in [name for name in stored if "blocks." in name and stored[name].ndim == 2]:
        stored[name], stored[f"{name}_scale_inv"], meant[name] = in_blocks(stored[name], 32, 64)
    wanted = joined(meant, state) if naming is published else meant
    model = load(stored, precision)
    if precision is FP8:
        name = "double_blocks.0.img_attn.qkv"
        check_stored(model.get_submodule(name), wanted[f"{name}.weight"])
    else:
        check_equal(model, wanted)


@pytest.mark.parametrize(
    "scale", [torch.ones(2, 3), torch.ones(1, 64), torch.ones(4, 16), torch.ones(64, dtype=torch.uint8)], ids=str
)
def test_scales_of_no_known_meaning_are_refused(scale: Tensor, load: Load, tmp_path: Path) -> None:
    """Of a weight of 64 rows: as many scales as rows are not one per row if they have another shape."""
    name = "double_blocks.0.img_attn.proj"
    (tmp_path / "config.json").write_text('{"quantization_config": {"weight_block_size": [128, 128]}}')
    state = weights()
    assert state[f"{name}.weight"].shape == (64, 64)
    state[f"{name}.weight"] = state[f"{name}.weight"].to(torch.float8_e4m3fn)
    with pytest.raises(WeightsError, match=rf"{name}\.weight\b.*scale.*(shape|MXFP8)"):
        load(state | {f"{name}.weight_scale": scale})


def test_scales_in_one_row_are_one_per_row_unless_config_json_has_blocks(load: Load, tmp_path: Path) -> None:
    stored, key, scale = weights(), "single_blocks.0.linear2", torch.rand(1, 64) + 0.5
    stored[f"{key}.weight"] = stored[f"{key}.weight"].to(torch.float8_e4m3fn)  # (64, 256)
    stored[f"{key}.weight_scale"] = scale
    values = stored[f"{key}.weight"].float()
    assert torch.equal(load(stored).get_submodule(key).weight, values * scale.t())
    assert load(stored, FP8).get_submodule(key).rowwise
    (tmp_path / "config.json").write_text('{"quantization_config": {"weight_block_size": [64, 4]}}')
    assert torch.equal(load(stored).get_submodule(key).weight, values * scale.repeat_interleave(4, 1))


@pytest.mark.parametrize("columns", [64, 64 * 64], ids=["columns?", "blocks?"])
def test_scales_in_one_row_that_mean_two_things_are_refused(columns: int, load: Load) -> None:
    key, stored = "single_blocks.0.linear2", weights()
    stored[f"{key}.weight"] = torch.ones(64, columns).to(torch.float8_e4m3fn)
    stored[f"{key}.weight_scale"] = torch.ones(1, 64)
    with pytest.raises(WeightsError, match=rf"{key}\.weight\b.*\(1, 64\).*per row.*\(64, 1\).*weight_block_size"):
        load(stored)


def marker(**about: object) -> Tensor:
    return torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)


def test_fp8_that_comfyui_marked_is_read(load: Load) -> None:
    stored, meant = in_eight_bits(weights(), "weight_scale", "input_scale")
    for name in [name for name in stored if name.endswith(".weight_scale")]:
        stored[name.replace("weight_scale", "comfy_quant")] = marker(
            format="float8_e4m3fn", full_precision_matrix_mult=True
        )
    check_equal(load({f"model.diffusion_model.{name}": tensor for name, tensor in stored.items()}, FP8), meant)


@pytest.mark.parametrize(
    ("about", "remedy"),
    [
        ({"format": "nvfp4"}, "nvfp4"),
        ({"format": "mxfp8"}, "mxfp8"),
        ({"format": "float8_e5m2"}, "float8_e4m3fn"),  # the weight's own dtype
        ({"format": "float8_e4m3fn", "convrot": True}, "convrot"),
        ({"formats": 3}, "None"),
        ([], "JSON table"),
    ],
)
def test_other_markers_of_comfyui_are_refused_by_name(about: object, remedy: str, load: Load) -> None:
    stored, _ = in_eight_bits(weights(), "weight_scale")
    key = "single_blocks.0.linear1.comfy_quant"
    stored[key] = torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)
    with pytest.raises(WeightsError, match=rf"single_blocks\.0\.linear1\b.*{remedy}.*bfloat16"):
        load(stored, FP8)


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ('{"layers": {"single_blocks.0.linear1": {"format": "nvfp4"}}}', r"single_blocks\.0\.linear1\b.*nvfp4"),
        ('{"layers": {"x": "float8_e4m3fn"}}', r"\bx\b"),
        ('{"layers": [3]}', "layers"),
        ("{}", "layers"),
        ("[" * 99_999, "JSON"),
    ],
)
def test_the_headers_of_comfyui_are_read_too(text: str, remedy: str, load: Load, tmp_path: Path) -> None:
    stored, meant = in_eight_bits(weights(), "weight_scale")
    good = json.dumps({"format_version": "1.0", "layers": {"single_blocks.0.linear1": {"format": "float8_e4m3fn"}}})
    source = ModelSource(of_size(4), str(tmp_path / "x.safetensors"))
    save_file(stored, tmp_path / "x.safetensors", {"_quantization_metadata": good})
    check_equal(load_transformer(source), meant)
    save_file(stored, tmp_path / "x.safetensors", {"_quantization_metadata": text})
    with pytest.raises(WeightsError, match=rf"x\.safetensors.*{remedy}"):
        load_transformer(source)


def test_a_number_in_fp8_with_several_scales_is_refused(load: Load) -> None:
    stored = weights()
    name = "single_blocks.0.linear1"
    stored[f"{name}.weight"] = torch.tensor(1.0).to(torch.float8_e4m3fn)
    with pytest.raises(WeightsError, match=rf"{name}\.weight\b.*scale.*\(3,\)"):
        load(stored | {f"{name}.weight_scale": torch.ones(3)})


@pytest.mark.parametrize(
    ("leaf", "kind"),
    [("weight_scale_2", "NVFP4"), ("weight_global_scale", "NVFP4"), ("qweight", "GPTQ"), ("SCB", "8-bit")],
)
def test_formats_that_are_not_read_are_refused_by_name(leaf: str, kind: str, load: Load) -> None:
    name = "single_blocks.0.linear1"
    stored = weights() | {f"{name}.weight": torch.zeros(8, 8, dtype=torch.uint8), f"{name}.{leaf}": torch.ones(1)}
    with pytest.raises(WeightsError, match=rf"{name}\.{leaf}\b.*{kind}.*bfloat16"):
        load(stored)
