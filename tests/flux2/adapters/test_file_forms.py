"""Saved LoRAs in the forms that PEFT, diffusers and ComfyUI read alike, at their ranks, alphas and scales."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import helpers
import peft
import pytest
import torch
from adapter_helpers import EVERY, attached, base, fresh, merged, predict, stirred, trained
from diffusers import Flux2Pipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from flux2 import adapters
from flux2.adapters import files as adapter_files
from flux2.adapters.files import layer_pairs
from flux2.adapters.formats import to_comfyui, to_diffusers
from flux2.adapters.loading import attach_pairs
from flux2.adapters.reading import PREFIX, from_state
from flux2.layers.selection import BLOCK_LINEARS


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", ["dev", "klein"])
def test_every_form_gives_back_the_same_model(kind: str, rslora: bool, tmp_path: Path) -> None:
    wrapped, model = trained(kind, rslora=rslora, targets=EVERY)
    wanted = predict(model, kind)
    adapters.save(wrapped, tmp_path / "adapter", base="small")
    save_file(to_comfyui(layer_pairs(model)), tmp_path / "comfyui.safetensors")
    places = [
        "adapter",
        "adapter/adapter_model.safetensors",
        "adapter/diffusers.safetensors",
        "comfyui.safetensors",
        ".",
    ]
    for place in places:
        loaded = fresh(kind)
        adapters.load(loaded, tmp_path / place)
        assert helpers.relative_error(predict(loaded, kind), wanted) <= 3e-6, place
        assert not adapters.adapter_parameters(loaded), "what was loaded to be used is frozen"
        assert len(layer_pairs(loaded)) == len(layer_pairs(model))
    by_peft = peft.PeftModel.from_pretrained(fresh(kind), str(tmp_path / "adapter"))
    assert helpers.relative_error(predict(by_peft.get_base_model(), kind), wanted) <= 3e-6


@pytest.mark.parametrize("kind", ["dev", "klein"])
def test_diffusers_reads_the_saved_file_and_predicts_the_same(kind: str, tmp_path: Path) -> None:
    wrapped, model = trained(kind, targets=EVERY)
    adapters.save(wrapped, tmp_path, base="small")
    _, reference = helpers.transformers(kind)
    reference.load_lora_adapter(load_file(tmp_path / adapter_files.DIFFUSERS_FILE))
    assert helpers.relative_error(predict(reference, kind), predict(model, kind)) <= 1e-5
    assert helpers.relative_error(predict(fresh(kind), kind), predict(model, kind)) > 0.1


def pipeline_with(kind: str) -> Flux2Pipeline:
    return Flux2Pipeline(**(helpers.reference_parts("dev") | {"transformer": helpers.transformers(kind)[1]}))


def test_load_lora_weights_reads_the_saved_folder(tmp_path: Path) -> None:
    wrapped, model = trained()
    adapters.save(wrapped, tmp_path, base="small")
    pipeline = pipeline_with("dev")
    pipeline.load_lora_weights(str(tmp_path), weight_name=adapter_files.DIFFUSERS_FILE)
    assert helpers.relative_error(predict(pipeline.transformer), predict(model)) <= 1e-5


def test_diffusers_own_converter_reads_the_comfyui_form(tmp_path: Path) -> None:
    _, model = trained()
    file = tmp_path / "comfyui.safetensors"
    save_file(to_comfyui(layer_pairs(model)), file)
    converted = Flux2Pipeline.lora_state_dict(str(file))
    wanted = to_diffusers(layer_pairs(model))
    assert converted.keys() == wanted.keys()
    assert all(torch.equal(converted[key], wanted[key]) for key in wanted)
    pipeline = pipeline_with("dev")
    pipeline.load_lora_weights(str(file))
    assert helpers.relative_error(predict(pipeline.transformer), predict(model)) <= 1e-5


def test_comfyui_keys_are_exactly_those_that_comfyui_knows() -> None:
    _, model = trained("klein")
    layers = [
        "double_blocks.0.img_attn.proj",
        "double_blocks.0.img_attn.qkv",
        "double_blocks.0.img_mlp.0",
        "double_blocks.0.img_mlp.2",
        "double_blocks.0.txt_attn.proj",
        "double_blocks.0.txt_attn.qkv",
        "double_blocks.0.txt_mlp.0",
        "double_blocks.0.txt_mlp.2",
        "single_blocks.0.linear1",
        "single_blocks.0.linear2",
        "single_blocks.1.linear1",
        "single_blocks.1.linear2",
    ]
    wanted = [f"diffusion_model.{layer}.lora_{side}.weight" for layer in layers for side in "AB"]
    assert sorted(to_comfyui(layer_pairs(model))) == wanted


def test_diffusers_keys_split_the_fused_layers() -> None:
    _, model = trained("klein")
    state = to_diffusers(layer_pairs(model))
    block, single = "transformer.transformer_blocks.0", "transformer.single_transformer_blocks"
    layers = [
        *(f"{block}.attn.{name}" for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")),
        *(f"{block}.attn.{name}" for name in ("to_out.0", "to_add_out")),
        *(f"{block}.{ff}.linear_{way}" for ff in ("ff", "ff_context") for way in ("in", "out")),
        *(f"{single}.{i}.attn.{name}" for i in range(2) for name in ("to_qkv_mlp_proj", "to_out")),
    ]
    assert sorted(state) == sorted(f"{layer}.lora_{side}.weight" for layer in layers for side in "AB")
    fused = layer_pairs(model)["double_blocks.0.img_attn.qkv"]
    thirds = [state[f"{block}.attn.to_{part}.lora_B.weight"] for part in "qkv"]
    assert torch.equal(torch.cat(thirds), fused.b)
    assert all(torch.equal(state[f"{block}.attn.to_{part}.lora_A.weight"], fused.a) for part in "qkv")


def test_the_halves_of_the_final_modulation_are_swapped_for_diffusers_only() -> None:
    _, model = trained(targets=[r"final_layer\.adaLN_modulation\.1"])
    ((layer, pair),) = layer_pairs(model).items()
    shift, scale = pair.b.chunk(2)
    state = to_diffusers({layer: pair})
    assert torch.equal(state["transformer.norm_out.linear.lora_B.weight"], torch.cat([scale, shift]))
    assert torch.equal(
        to_comfyui({layer: pair})["diffusion_model.final_layer.adaLN_modulation.1.lora_B.weight"], pair.b
    )
    assert torch.equal(from_state(state, fresh())[layer].b, pair.b)


def separate(names: Sequence[str], rank: int = 2) -> dict[str, Tensor]:
    """An adapter that was trained in diffusers: every layer has an A of its own."""
    reference, generator = helpers.transformers("dev")[1], torch.Generator().manual_seed(4)
    state = {}
    for name in names:
        rows, columns = reference.get_submodule(name).weight.shape
        state[f"transformer.{name}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) / columns**0.5
        state[f"transformer.{name}.lora_B.weight"] = torch.randn(rows, rank, generator=generator)
    return state


@pytest.mark.parametrize("parts", [("to_q", "to_k", "to_v"), ("to_q", "to_v"), ("to_v",), ("to_k", "add_q_proj")])
def test_separate_adapters_of_q_k_and_v_are_one_of_the_fused_layer(parts: tuple[str, ...]) -> None:
    state = separate([f"transformer_blocks.1.attn.{part}" for part in parts])
    _, reference = helpers.transformers("dev")
    reference.load_lora_adapter(dict(state))
    model = fresh()
    pairs = from_state(state, model)
    attach_pairs(model, pairs, "default")
    assert helpers.relative_error(predict(model), predict(reference)) <= 1e-5
    image = [part for part in parts if part.startswith("to_")]
    assert pairs["double_blocks.1.img_attn.qkv"].a.shape[0] == 2 * len(image)


def test_a_split_adapter_comes_back_at_its_own_rank() -> None:
    _, model = trained()
    pairs = layer_pairs(model)
    back = from_state(to_diffusers(pairs), fresh())
    assert back.keys() == pairs.keys()
    for layer, pair in pairs.items():
        assert torch.equal(back[layer].a, pair.a), layer
        assert torch.equal(back[layer].b, pair.b), layer


def test_layers_of_different_ranks_keep_them() -> None:
    """single_blocks.1 and double_blocks.1 share endings: PEFT's patterns must not mix them up."""
    state = separate(["transformer_blocks.1.attn.to_q", "transformer_blocks.1.attn.to_k"], rank=2)
    state |= separate(["single_transformer_blocks.1.attn.to_out", "transformer_blocks.1.ff.linear_in"], rank=5)
    state |= separate(["single_transformer_blocks.2.attn.to_out", "transformer_blocks.0.ff.linear_in"], rank=7)
    model = fresh()
    pairs = from_state(state, model)
    attach_pairs(model, pairs, "default")
    wanted = {
        "double_blocks.0.img_mlp.0": 7,
        "double_blocks.1.img_attn.qkv": 4,
        "double_blocks.1.img_mlp.0": 5,
        "single_blocks.1.linear2": 5,
        "single_blocks.2.linear2": 7,
    }
    assert {layer: pair.a.shape[0] for layer, pair in layer_pairs(model).items()} == wanted
    modules: dict[str, Any] = {layer: model.get_submodule(layer) for layer in wanted}
    assert {layer: module.r["default"] for layer, module in modules.items()} == wanted, "as PEFT knows them"
    assert helpers.relative_error(predict(model), predict(merged("dev", [pairs], [1.0]))) <= 1e-5


def test_an_alpha_in_the_file_scales_the_update() -> None:
    state = separate(["transformer_blocks.0.attn.to_out.0"], rank=4)
    key = "transformer.transformer_blocks.0.attn.to_out.0"
    plain = from_state(state, fresh())["double_blocks.0.img_attn.proj"]
    scaled = from_state(state | {f"{key}.alpha": torch.tensor(8.0)}, fresh())["double_blocks.0.img_attn.proj"]
    torch.testing.assert_close(scaled.b, 2 * plain.b)


def test_patterns_of_rank_and_alpha_in_a_peft_folder_are_kept(tmp_path: Path) -> None:
    config = peft.LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=r".*(linear1|proj)",
        rank_pattern={"single_blocks.1.linear1": 5},
        alpha_pattern={r"img_attn\.proj": 7},
        init_lora_weights=False,
    )
    wrapped = peft.get_peft_model(fresh(), config)
    wrapped.save_pretrained(str(tmp_path), save_embedding_layers=False)
    loaded = fresh()
    adapters.load(loaded, tmp_path)
    assert helpers.relative_error(predict(loaded), predict(wrapped.get_base_model())) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_add_up_each_at_its_scale(dtype: torch.dtype, tmp_path: Path) -> None:
    pairs = []
    for i, targets in enumerate((EVERY, list(BLOCK_LINEARS))):
        wrapped, model = trained(seed=i, targets=targets)
        adapters.save(wrapped, tmp_path / str(i), base="small")
        pairs.append(layer_pairs(model))
    model = fresh().to(dtype)
    adapters.load(model, tmp_path / "0", name="first", scale=0.5)
    adapters.load(model, tmp_path / "1", name="second", scale=-0.25)
    wanted = predict(merged("dev", pairs, [0.5, -0.25]))
    assert helpers.relative_error(predict(model), wanted) <= (1e-5 if dtype == torch.float32 else 0.05)
    lora = [parameter for name, parameter in model.named_parameters() if ".lora_" in name]
    assert {parameter.dtype for parameter in lora} == {torch.float32}
    with adapters.adapters_disabled(model):
        assert torch.equal(predict(model), predict(fresh().to(dtype)))


def test_scale_zero_is_the_base(tmp_path: Path) -> None:
    wrapped, _ = trained()
    adapters.save(wrapped, tmp_path, base="small")
    model = fresh()
    adapters.load(model, tmp_path, scale=0.0)
    assert torch.equal(predict(model), predict(fresh()))


WRAPPED: dict[str, Callable[[str], str]] = {
    "module.": lambda name: f"module.{name}",
    "_orig_mod.": lambda name: f"_orig_mod.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "each block": lambda name: re.sub(r"(blocks\.\d+)", r"\1._orig_mod", name),
}


@pytest.mark.parametrize("wrap", WRAPPED)
@pytest.mark.parametrize("kind", ["lora", "dora", "loha", "lokr", "oft"])
def test_names_of_compiled_and_parallel_models_are_those_of_the_model(kind: str, wrap: str, tmp_path: Path) -> None:
    """Also in the patterns of ranks and alphas, which would match nothing, escaped or not."""
    model, rename = base(), WRAPPED[wrap]
    adapters.save(stirred(attached(kind, model)), tmp_path / "plain", base="small")
    config = json.loads((tmp_path / "plain/adapter_config.json").read_text())
    state = load_file(tmp_path / "plain/adapter_model.safetensors")
    layer = "single_blocks.0.linear1"
    assert any(layer in key for key in state)
    if kind != "oft":
        config["alpha_pattern"] = {layer: 32}
    (tmp_path / "plain/adapter_config.json").write_text(json.dumps(config))
    for escaped in (False, True):
        folder = tmp_path / f"wrapped{escaped}"
        folder.mkdir()
        if kind != "oft":
            named = rename(layer)
            config["alpha_pattern"] = {re.escape(named) if escaped else named: 32}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        renamed = {f"{PREFIX}{rename(key.removeprefix(PREFIX))}": tensor for key, tensor in state.items()}
        save_file(renamed, folder / "adapter_model.safetensors")
        plain, wrapped = base(), base()
        adapters.load(plain, tmp_path / "plain")
        adapters.load(wrapped, folder)
        assert torch.equal(predict(wrapped), predict(plain))
