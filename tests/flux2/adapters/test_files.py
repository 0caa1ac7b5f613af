"""flux2.adapters.files: LoRAs that change what they should, in files that PEFT, diffusers and ComfyUI read alike."""

import json
import os
import re
import socket
import stat
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import helpers
import peft
import pytest
import torch
import torch.nn.functional as F
from diffusers import Flux2Pipeline
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flux2 import adapters
from flux2.adapters import files as adapter_files
from flux2.adapters.files import layer_pairs
from flux2.adapters.formats import AdapterError, LoraPair, from_state, to_comfyui, to_diffusers
from flux2.adapters.loading import attach_pairs
from flux2.layers.selection import BLOCK_LINEARS
from flux2.models.transformer import Transformer
from flux2.weights.key_names import transformer_module

EVERY = [".*"]  # every linear, the modulation and the final layer too
BLOCK = [*(f"{stream}_{layer}" for stream in ("img", "txt") for layer in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2"))]


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


def fresh(kind: str = "dev") -> Transformer:
    return helpers.transformer(kind)


@torch.no_grad()
def predict(model: nn.Module, kind: str = "dev") -> Tensor:
    inputs = helpers.transformer_inputs(helpers.TRANSFORMERS[kind])
    model.eval()
    return model(**inputs) if isinstance(model, Transformer) else helpers.reference_forward(model, inputs)


@torch.no_grad()
def merged(kind: str, updates: Sequence[dict[str, LoraPair]], scales: Sequence[float]) -> Transformer:
    """A transformer without adapters whose weights are W + scale * B A: what adapters must amount to."""
    model = fresh(kind)
    for pairs, scale in zip(updates, scales, strict=True):
        for layer, pair in pairs.items():
            model.get_submodule(layer).weight += scale * (pair.b @ pair.a)
    return model


# ------------------------------------------------------------------ attaching


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["dev", "klein"])
def test_a_fresh_adapter_changes_nothing_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    model = fresh(kind).to(dtype)
    before = predict(model, kind)
    adapters.attach(model, targets=EVERY)
    assert (
        len(layer_pairs(model)) == len([name for name, _ in model.named_modules() if name.endswith(".base_layer")]) > 20
    )
    assert torch.equal(predict(model, kind), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_adapter_trains_and_it_is_float32_on_any_base(dtype: torch.dtype) -> None:
    model = fresh().to(dtype)
    model.requires_grad_(True)
    adapters.attach(model, rank=2)
    for name, parameter in model.named_parameters():
        is_adapter = ".lora_A." in name or ".lora_B." in name
        assert parameter.requires_grad == is_adapter, name
        assert parameter.dtype == (torch.float32 if is_adapter else dtype), name
    model(**helpers.transformer_inputs(model.config)).float().square().mean().backward()
    b = [parameter for name, parameter in model.named_parameters() if ".lora_B." in name]
    assert len(b) == 22
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in b)
    assert len(adapters.adapter_parameters(model)) == 44


def test_the_beginning_is_the_seeds_whatever_the_bases_precision() -> None:
    models = [fresh(), fresh().bfloat16(), fresh()]
    torch.manual_seed(1)
    wanted = torch.randn(2)
    torch.manual_seed(1)
    for model, seed in zip(models, (0, 0, 1), strict=True):
        adapters.attach(model, seed=seed)
    assert torch.equal(torch.randn(2), wanted), "the process's own generator has not moved"
    first, half, other = (layer_pairs(model) for model in models)
    assert all(torch.equal(first[layer].a, half[layer].a) for layer in first)
    assert not any(torch.equal(first[layer].a, other[layer].a) for layer in first)
    assert not any(pair.b.any() for pair in first.values())


def test_the_default_targets_are_the_block_linears() -> None:
    model = fresh()
    adapters.attach(model)
    wanted = [f"double_blocks.{i}.{layer}" for i in range(2) for layer in BLOCK]
    wanted += [f"single_blocks.{i}.linear{j}" for i in range(3) for j in (1, 2)]
    assert sorted(layer_pairs(model)) == sorted(wanted)


@pytest.mark.parametrize(
    "targets",
    [
        [r"single_blocks\.[02]\.linear1"],
        [r"(?!double_blocks\.1\.img_mlp\.2)(double|single)_blocks.*"],  # 21 layers: PEFT shortens such lists
        [r"time_in\.in_layer", r".*\.proj"],
    ],
)
def test_targets_name_whole_layers_in_every_way_of_attaching(targets: list[str], tmp_path: Path) -> None:
    wrapped, model = trained(targets=targets)
    linears = [name for name, module in fresh().named_modules() if isinstance(module, nn.Linear)]
    wanted = {name for name in linears if any(re.fullmatch(target, name) for target in targets)}
    assert set(layer_pairs(model)) == wanted
    adapters.save(wrapped, tmp_path, base="small_dev")
    loaded = fresh()
    adapters.load(loaded, tmp_path)
    by_peft = fresh()
    peft.PeftModel.from_pretrained(by_peft, str(tmp_path))
    assert set(layer_pairs(loaded)) == set(layer_pairs(by_peft)) == wanted


@pytest.mark.parametrize(("rslora", "scale"), [(False, 6 / 3), (True, 6 / 3**0.5)])
def test_the_update_is_b_a_times_alpha_over_rank(rslora: bool, scale: float) -> None:
    _, model = trained(rslora=rslora, targets=EVERY)
    for layer, pair in layer_pairs(model).items():
        module: Any = model.get_submodule(layer)
        torch.testing.assert_close(pair.b, scale * module.lora_B["default"].weight.data)
    wanted = predict(merged("dev", [layer_pairs(model)], [1.0]))
    assert helpers.relative_error(predict(model), wanted) <= 1e-5
    assert helpers.relative_error(predict(model), predict(fresh())) > 0.1


def test_alpha_is_the_rank_unless_given() -> None:
    model = fresh()
    adapters.attach(model, rank=5)
    assert {module.scaling["default"] for module in model.modules() if isinstance(module, LoraLayer)} == {1.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_disabled_is_the_base_bit_for_bit_and_ends(dtype: torch.dtype) -> None:
    base = predict(fresh().to(dtype))
    _, model = trained()
    model.to(dtype)
    changed = predict(model)
    with adapters.adapters_disabled(model):
        assert torch.equal(predict(model), base)
    assert torch.equal(predict(model), changed)
    assert not torch.equal(changed, base)
    with pytest.raises(InterruptedError), adapters.adapters_disabled(model):
        raise InterruptedError
    assert torch.equal(predict(model), changed), "an exception must not leave it off"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"targets": [r".*linear1", "to_q"]},
            r"adapter\.targets.*'to_q'.*single_blocks\.N\.linear1",
        ),
        ({"targets": ["("]}, r"adapter\.targets.*'\('.*regular expression"),
        ({"targets": []}, r"adapter\.targets"),
        ({"targets": "linear1"}, r"adapter\.targets.*'linear1'.*single_blocks"),
        ({"targets": 3}, r"adapter\.targets=3\b"),
        ({"targets": [3]}, r"adapter\.targets=\[3\]"),
        ({"rank": 0}, r"adapter\.rank=0\b"),
        ({"rank": 2.0}, r"adapter\.rank=2\.0\b"),
        ({"alpha": -1}, r"adapter\.alpha=-1\b"),
        ({"dropout": 1.0}, r"adapter\.dropout=1\.0\b.*\[0, 1\)"),
    ],
)
def test_settings_that_cannot_be_are_errors_that_name_them(options: dict[str, Any], message: str) -> None:
    model = fresh()
    with pytest.raises(AdapterError, match=message):
        adapters.attach(model, **options)
    assert not layer_pairs(model)


def test_targets_are_whole_names_and_not_parts() -> None:
    with pytest.raises(AdapterError, match=r"adapter\.targets.*'linear1'"):
        adapters.attach(fresh(), targets=["linear1"])


# ------------------------------------------------------------------ gradients


@pytest.mark.parametrize("kind", ["dev", "klein"])
def test_gradients_are_those_of_diffusers_with_peft(kind: str) -> None:
    """Same weights, batch, noise and times. A fused qkv adapter is q, k and v adapters that share one A."""
    _, model = trained(kind, targets=EVERY)
    _, reference = helpers.transformers(kind)
    inputs = helpers.transformer_inputs(model.config)
    flow = torch.randn(2, 12, 128, generator=torch.Generator().manual_seed(9))
    loss = F.mse_loss(model(**inputs), flow)
    loss.backward()

    layers: dict[str, Any] = {layer: model.get_submodule(layer) for layer in layer_pairs(model)}
    raw = {
        layer: LoraPair(m.lora_A["default"].weight.data, m.lora_B["default"].weight.data) for layer, m in layers.items()
    }
    state = to_diffusers(raw)
    names = sorted({key.removeprefix("transformer.").rsplit(".lora_", 1)[0] for key in state})
    peft.inject_adapter_in_model(peft.LoraConfig(r=3, lora_alpha=6, target_modules=names), reference)
    theirs: dict[str, Any] = {name: reference.get_submodule(name) for name in names}
    for name, module in theirs.items():
        module.lora_A["default"].weight.data = state[f"transformer.{name}.lora_A.weight"].clone()
        module.lora_B["default"].weight.data = state[f"transformer.{name}.lora_B.weight"].clone()
    theirs_loss = F.mse_loss(helpers.reference_forward(reference, inputs), flow)
    theirs_loss.backward()

    assert loss.item() == pytest.approx(theirs_loss.item(), rel=1e-5)
    assert len(layers) == len([m for m in fresh(kind).modules() if isinstance(m, nn.Linear)])
    for layer, module in layers.items():
        parts = transformer_module(layer)
        a = sum(theirs[name].lora_A["default"].weight.grad for name in parts.names)
        b = parts.join([theirs[name].lora_B["default"].weight.grad for name in parts.names])
        for ours, wanted in ((module.lora_A["default"].weight.grad, a), (module.lora_B["default"].weight.grad, b)):
            assert F.cosine_similarity(ours.flatten().double(), wanted.flatten().double(), dim=0) >= 0.99999, layer
            torch.testing.assert_close(ours.norm(), wanted.norm(), rtol=1e-4, atol=0)


# ------------------------------------------------------------------ files


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


# ------------------------------------------------------------------ saving


def test_a_saved_folder_holds_whole_files_and_nothing_else(tmp_path: Path) -> None:
    for seed in (0, 1):  # the second over the first
        wrapped, model = trained(seed=seed)
        adapters.save(wrapped, tmp_path / "adapter", base="dev", license="FLUX Non-Commercial License")
    for place in ("adapter", "adapter/diffusers.safetensors"):
        loaded = fresh()
        adapters.load(loaded, tmp_path / place)
        assert helpers.relative_error(predict(loaded), predict(model)) <= 1e-6
    assert sorted(file.name for file in (tmp_path / "adapter").iterdir()) == [
        *["README.md", "adapter_config.json", "adapter_model.safetensors", "diffusers.safetensors"]
    ]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 3, 6)
    assert config["base_model_name_or_path"] == "dev"
    assert "FLUX Non-Commercial License" in (tmp_path / "adapter" / "README.md").read_text()
    with safe_open(tmp_path / "adapter" / "diffusers.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata.pop("modelspec.hash_sha256").startswith("0x")
    assert metadata == {
        "format": "pt",
        "base_model": "dev",
        "base_model_license": "FLUX Non-Commercial License",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "Flux.2-dev/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "LoRA for dev",
        "modelspec.license": "FLUX Non-Commercial License",
    }


def test_saved_files_can_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        adapters.save(trained()[0], tmp_path, base="dev")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()} == {0o640}


def test_an_adapter_of_any_name_is_saved_in_the_folder_itself(tmp_path: Path) -> None:
    wrapped, model = trained(name="style")
    adapters.save(wrapped, tmp_path, base="small", name="style")
    loaded = fresh()
    adapters.load(loaded, tmp_path)
    assert helpers.relative_error(predict(loaded), predict(model)) <= 1e-6


def test_a_failed_save_leaves_the_earlier_one_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrapped, model = trained()
    adapters.save(wrapped, tmp_path, base="small")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(adapter_files, "save_file", fail)
    for parameter in adapters.adapter_parameters(model):
        parameter.data += 1
    with pytest.raises(OSError, match="no space left"):
        adapters.save(wrapped, tmp_path, base="small")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_saving_and_loading_ask_nothing_of_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    asked: list[Any] = []

    def refuse(*arguments: Any, **_: Any) -> None:
        asked.append(arguments)
        raise OSError("no network in tests")

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    wrapped, _ = trained()
    adapters.save(wrapped, tmp_path, base="black-forest-labs/FLUX.2-dev")
    adapters.load(fresh(), tmp_path)
    peft.PeftModel.from_pretrained(fresh(), str(tmp_path))
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(AdapterError, match=r"adapter_config\.json"):
        adapters.load(fresh(), tmp_path)
    assert asked == []


def test_restore_goes_on_from_the_saved_weights(tmp_path: Path) -> None:
    wrapped, model = trained()
    adapters.save(wrapped, tmp_path, base="small")
    again = fresh()
    wrapped_again = adapters.attach(again, rank=3, alpha=6, seed=8)
    adapters.restore(wrapped_again, tmp_path)
    assert torch.equal(predict(again), predict(model))
    assert len(adapters.adapter_parameters(again)) == 44, "and still trains"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 4}, r"\(3, 48\).*\(4, 48\).*adapter\.rank"),
        ({"targets": [r".*linear1"]}, r"adapter\.targets"),
    ],
)
def test_restoring_into_another_adapter_is_an_error(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    adapters.save(trained()[0], tmp_path, base="small")
    wrapped, model = trained(**options)
    before = predict(model)
    with pytest.raises(AdapterError, match=message):
        adapters.restore(wrapped, tmp_path)
    assert torch.equal(predict(model), before), "nothing was changed half"


# ------------------------------------------------------------------ finding and refusing


def test_a_run_folder_gives_its_final_adapter_else_its_newest_checkpoint(tmp_path: Path) -> None:
    for place in ("checkpoints/step_000250/adapter", "checkpoints/step_001000/adapter"):
        adapters.save(trained()[0], tmp_path / place, base="small")
    assert adapters.find(tmp_path) == tmp_path / "checkpoints/step_001000/adapter"
    assert adapters.find(tmp_path / "checkpoints/step_000250") == tmp_path / "checkpoints/step_000250/adapter"
    adapters.save(trained()[0], tmp_path / "adapter", base="small")
    assert adapters.find(tmp_path) == adapters.find(tmp_path / "adapter") == tmp_path / "adapter"
    assert adapters.find(tmp_path / "adapter" / "diffusers.safetensors").name == "diffusers.safetensors"


def test_nothing_to_load_is_an_error_that_says_what_can_be_given(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=r"gone'.*adapter_model\.safetensors"):
        adapters.find(tmp_path / "gone")
    with pytest.raises(AdapterError, match=rf"{tmp_path}.*adapter_model\.safetensors"):
        adapters.find(tmp_path)


def test_the_adapter_of_another_model_is_an_error_and_changes_nothing(tmp_path: Path) -> None:
    adapters.save(trained("dev")[0], tmp_path, base="small")
    model = fresh("klein")
    for place in (tmp_path, tmp_path / "diffusers.safetensors"):
        with pytest.raises(AdapterError, match=r"(double|single|transformer)_blocks\.") as error:
            adapters.load(model, place)
        assert str(place) in str(error.value)
    assert torch.equal(predict(model, "klein"), predict(fresh("klein"), "klein"))


LAYER = "diffusion_model.single_blocks.0.linear2"
DIFFUSERS_LAYER = "transformer.transformer_blocks.0.attn"


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, "no tensors"),
        ({"lora_unet_single_blocks_0_linear2.lora_down.weight": (2, 192)}, "linear2.*lora_A"),
        ({f"{LAYER}.lora_A.weight": (2, 192)}, r"single_blocks\.0\.linear2.*lora_A"),
        (
            {f"{LAYER}.lora_A.weight": (2, 64), f"{LAYER}.lora_B.weight": (48, 2)},
            r"single_blocks\.0\.linear2.*64.*48.*192.*48",
        ),
        (
            {"diffusion_model.single_blocks.9.linear2.lora_A.weight": (2, 192)},
            r"single_blocks\.9\.linear2",
        ),
        (
            {"transformer.transformer_blocks.0.attn.to_k.lora_A.weight": (2, 48)},
            r"to_k.*lora_A",
        ),
        (
            {f"{LAYER}.lora_A.weight": (2, 192), f"{LAYER}.lora_B.weight": (48, 3)},
            r"lora_A.*\(2, 192\).*lora_B.*\(48, 3\).*\(rank, in\).*\(out, rank\)",
        ),
        ({f"{LAYER}.lora_A.weight": (), f"{LAYER}.lora_B.weight": (48, 2)}, r"lora_A.*\(\).*lora_B"),
        ({f"{LAYER}.lora_A.weight": (0, 192), f"{LAYER}.lora_B.weight": (48, 0)}, r"lora_A.*\(0, 192\)"),
        (
            {f"{LAYER}.lora_A.weight": (2, 192), f"{LAYER}.lora_B.weight": (48, 2), f"{LAYER}.alpha": (2,)},
            r"single_blocks\.0\.linear2.*alpha.*\(2,\)",
        ),
        (
            {
                f"{DIFFUSERS_LAYER}.to_q.lora_A.weight": (2, 48),
                f"{DIFFUSERS_LAYER}.to_q.lora_B.weight": (48, 2),
                f"{DIFFUSERS_LAYER}.to_k.lora_A.weight": (2, 40),
                f"{DIFFUSERS_LAYER}.to_k.lora_B.weight": (48, 2),
            },
            r"to_k.*40.*48.*48.*48",
        ),
    ],
)
def test_files_that_do_not_fit_are_refused_by_name(
    state: dict[str, tuple[int, ...]], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "lora.safetensors"
    save_file({key: torch.zeros(shape) for key, shape in state.items()}, file)
    with pytest.raises(AdapterError, match=message) as error:
        adapters.load(fresh(), file)
    assert str(file) in str(error.value)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    file = tmp_path / "lora.safetensors"
    state = {f"{LAYER}.lora_A.weight": torch.zeros(2, 192), f"{LAYER}.lora_B.weight": torch.full((48, 2), value)}
    save_file(state, file)
    with pytest.raises(AdapterError, match=r"lora\.safetensors.*linear2\.lora_B\.weight.*NaN"):
        adapters.load(fresh(), file)


@pytest.mark.parametrize(
    ("scale", "kind"), [("0.5", TypeError), (True, TypeError), (float("nan"), ValueError), (float("inf"), ValueError)]
)
def test_a_scale_that_is_no_finite_number_changes_nothing(scale: Any, kind: type[Exception], tmp_path: Path) -> None:
    adapters.save(trained()[0], tmp_path, base="small")
    model = fresh()
    with pytest.raises(kind, match=r"scale="):
        adapters.load(model, tmp_path, scale=scale)
    assert torch.equal(predict(model), predict(fresh()))


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    adapters.save(trained()[0], tmp_path, base="small")
    file = tmp_path / adapter_files.PEFT_FILE
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors.*incomplete"):
        adapters.load(fresh(), tmp_path)


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, r"DoRA.*missing double_blocks.*lora_magnitude_vector"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"peft_type": "LOHA"}, r"LoHa.*missing .*hada_w1_a.*unknown .*lora_A"),
        ({"peft_type": "NOTHING"}, r"adapter_config\.json.*PEFT .*NOTHING"),
        ({"r": 32}, r"rank 3\b.*32.*adapter_config\.json"),
        ({"r": 0}, "adapter_config.json"),
        ({"r": "x"}, "adapter_config.json"),
        ({"r": None}, "adapter_config.json"),
        ({"lora_alpha": None}, r"adapter_config\.json.*lora_alpha=None"),
        ({"lora_alpha": "x"}, r"adapter_config\.json.*lora_alpha='x'"),
        ({"rank_pattern": {"(": 4}}, r"adapter_config\.json.*rank_pattern.*'\('"),
        ({"rank_pattern": {"linear1": 0}}, r"adapter_config\.json.*linear1=0"),
        ({"alpha_pattern": {"linear1": "x"}}, r"adapter_config\.json.*linear1='x'"),
        ({"alpha_pattern": []}, "adapter_config.json"),
    ],
)
def test_a_peft_folder_that_is_no_plain_lora_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    adapters.save(trained()[0], tmp_path, base="small")
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(AdapterError, match=message) as error:
        adapters.load(fresh(), tmp_path)
    assert str(tmp_path) in str(error.value)


def test_a_folder_loads_into_a_model_of_its_layout(model_folders: Callable[[str], Path], tmp_path: Path) -> None:
    from flux2.weights.loading import load_transformer
    from flux2.weights.sources import ModelSource

    wrapped, model = trained()
    adapters.save(wrapped, tmp_path, base="small")
    loaded = load_transformer(ModelSource(helpers.VARIANTS["dev"], str(model_folders("dev"))))
    adapters.load(loaded, tmp_path)
    assert helpers.relative_error(predict(loaded), predict(model)) <= 1e-6
