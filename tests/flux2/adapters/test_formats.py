"""flux2.adapters.formats: kohya's keys, a DoRA in diffusers' keys, and files that mix or hold what is not known."""

from collections.abc import Sequence
from pathlib import Path

import helpers
import peft
import pytest
import torch
from adapter_helpers import fresh, predict
from diffusers import Flux2Pipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flux2 import adapters
from flux2.adapters.formats import AdapterError, LoraPair, to_comfyui, to_diffusers, to_kohya
from flux2.adapters.reading import from_state
from flux2.weights.key_names import transformer_module

QKV = "double_blocks.1.img_attn.qkv"


def random_pairs(
    kind: str = "dev", layers: Sequence[str] | None = None, rank: int = 3, seed: int = 0
) -> dict[str, LoraPair]:
    generator = torch.Generator().manual_seed(seed)
    pairs = {}
    for name, module in fresh(kind).named_modules():
        if isinstance(module, nn.Linear) and (layers is None or name in layers):
            a = torch.randn(rank, module.in_features, generator=generator) / module.in_features**0.5
            pairs[name] = LoraPair(a, 0.5 * torch.randn(module.out_features, rank, generator=generator))
    return pairs


def kohya(layer: str, rank: int, alpha: float | None, prefix: str = "lora_unet_") -> dict[str, Tensor]:
    """A layer as kohya's scripts write it: an alpha of its own, and B not scaled."""
    (pair,) = random_pairs(layers=[layer], rank=rank).values()
    name = f"{prefix}{layer}" if prefix.endswith(".") else prefix + layer.replace(".", "_")
    state = {f"{name}.lora_down.weight": pair.a, f"{name}.lora_up.weight": pair.b}
    return state if alpha is None else state | {f"{name}.alpha": torch.tensor(alpha)}


@pytest.mark.parametrize("kind", ["dev", "klein"])
def test_kohyas_keys_are_names_with_underscores_and_come_back(kind: str) -> None:
    pairs = random_pairs(kind)
    state = to_kohya(pairs)
    assert "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight" in state
    assert "lora_unet_final_layer_adaLN_modulation_1.lora_up.weight" in state
    assert len(state) == 3 * len(pairs)
    assert {state[key].item() for key in state if key.endswith(".alpha")} == {3.0}
    back = from_state(state, fresh(kind))
    assert back.keys() == pairs.keys()
    for layer, pair in pairs.items():
        assert torch.equal(back[layer].a, pair.a), layer
        assert torch.equal(back[layer].b, pair.b), layer


@pytest.mark.parametrize("prefix", ["lora_unet_", "diffusion_model."])
@pytest.mark.parametrize(("alpha", "strength"), [(2.0, 0.5), (4.0, 1.0), (12.0, 3.0), (None, 1.0)])
def test_alpha_over_rank_is_the_strength_of_a_kohya_file(
    alpha: float | None, strength: float, prefix: str, tmp_path: Path
) -> None:
    state = kohya(QKV, rank=4, alpha=alpha, prefix=prefix)
    down, up = (next(tensor for key, tensor in state.items() if side in key) for side in ("lora_down", "lora_up"))
    save_file(state, tmp_path / "lora.safetensors")
    model, wanted = fresh(), fresh()
    adapters.load(model, tmp_path / "lora.safetensors")
    wanted.get_submodule(QKV).weight.data += strength * (up @ down)
    assert helpers.relative_error(predict(model), predict(wanted)) <= 1e-5
    assert helpers.relative_error(predict(fresh()), predict(wanted)) > 0.01
    if prefix == "lora_unet_":  # diffusers' own reading of the same file
        reference = helpers.transformers("dev")[1]
        reference.load_lora_adapter(Flux2Pipeline.lora_state_dict(str(tmp_path / "lora.safetensors")))
        assert helpers.relative_error(predict(reference), predict(model)) <= 1e-5


def test_diffusers_own_converter_reads_kohyas_form_of_the_blocks() -> None:
    pairs = {layer: pair for layer, pair in random_pairs().items() if "_blocks." in layer}
    converted = Flux2Pipeline.lora_state_dict(dict(to_kohya(pairs)))
    wanted = to_diffusers(pairs)
    assert converted.keys() == wanted.keys()
    assert all(torch.equal(converted[key], wanted[key]) for key in wanted)


def test_kohyas_keys_with_diffusers_names_are_read_too() -> None:
    """As OneTrainer writes them, and some of kohya's forks."""
    pairs = random_pairs()
    published = to_diffusers(pairs)
    for prefix in ("lora_transformer_", "lora_unet_"):
        state = {}
        for key, tensor in published.items():
            layer, side = key.removeprefix("transformer.").split(".lora_")
            name = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight"}[side]
            state[f"{prefix}{layer.replace('.', '_')}.{name}"] = tensor
        back = from_state(state, fresh())
        assert all(torch.equal(back[layer].b, pair.b) for layer, pair in pairs.items())


@pytest.mark.parametrize("alpha", [torch.tensor(True), torch.tensor(1 + 1j)])
def test_an_alpha_that_is_no_number_is_refused(alpha: Tensor) -> None:
    with pytest.raises(AdapterError, match=r"alpha has dtype"):
        from_state(kohya(QKV, 2, None) | {"lora_unet_double_blocks_1_img_attn_qkv.alpha": alpha}, fresh())


def test_an_alpha_is_read_under_the_name_of_its_pair() -> None:
    (pair,) = random_pairs(layers=[QKV], rank=2).values()
    state = {f"{QKV}.lora.down.weight": pair.a, f"{QKV}.lora.up.weight": pair.b, f"{QKV}.lora.alpha": torch.tensor(1.0)}
    back = from_state(state, fresh())[QKV]
    assert torch.equal(back.b @ back.a, 0.5 * pair.b @ pair.a)


def comfy_pair(layer: str = QKV) -> dict[str, Tensor]:
    return to_comfyui(random_pairs(layers=[layer]))


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            comfy_pair() | {"lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.zeros(2, 4)},
            "text encoder.*lora_te1_text_model_encoder_layers_0_mlp_fc1",
        ),
        (
            kohya(QKV, 2, 2.0) | {"lora_unet_down_blocks_0_resnets_0_conv1.lora_down.weight": torch.zeros(2, 4)},
            "lora_unet_down_blocks_0_resnets_0_conv1",
        ),
        (
            kohya(QKV, 2, 2.0) | {"lora_unet_single_blocks_77_linear1.lora_down.weight": torch.zeros(2, 4)},
            "lora_unet_single_blocks_77_linear1",
        ),
        (
            comfy_pair() | {"emb_params": torch.zeros(3), "string_to_param": torch.zeros(3)},
            r"\b2\b.*\b4\b.*diffusers, ComfyUI or kohya.*emb_params, string_to_param$",
        ),
        (
            kohya(QKV, 2, 2.0) | {"lora_unet_double_blocks_0_img_attn_qkv.dora_scale": torch.zeros(3, 1)},
            r"double_blocks\.0\.img_attn\.qkv\b.*only dora_scale",
        ),
        ({"lora_unet_single_blocks_0_linear1.hada_w1_a": torch.zeros(3, 1)}, "only hada_w1_a"),
        ({"diffusion_model.single_blocks.0.linear1.lokr_w1": torch.zeros(3, 1)}, "only lokr_w1"),
        (
            comfy_pair() | kohya("single_blocks.0.linear1", 2, 2.0),
            r"formats.*diffusion_model.*A\.weight \(ComfyUI\), lora_u",
        ),
        (comfy_pair() | to_diffusers(random_pairs(layers=["img_in"])), r"formats.*\(ComfyUI\).*\(diffusers\)"),
        (
            comfy_pair() | {f"diffusion_model.{QKV}.lora_up.weight": torch.zeros(144, 3)},
            r"lora_up\.weight\b.*lora_B\b.*double_blocks\.1\.img_attn\.qkv\b",
        ),
        (
            comfy_pair() | {f"diffusion_model.{QKV}.lora_magnitude_vector": torch.ones(5)},
            r"lora_magnitude_vector\b.*\(5,\).*\(144,\)",
        ),
        (
            to_diffusers(random_pairs(layers=[QKV]))
            | {"transformer.transformer_blocks.1.attn.to_q.lora_magnitude_vector": torch.ones(48)},
            r"transformer_blocks\.1\.attn\.to_q\b.*DoRA.*to_k",
        ),
        (
            comfy_pair() | comfy_pair("img_in") | {f"diffusion_model.{QKV}.lora_magnitude_vector": torch.ones(144)},
            r"DoRA.*double_blocks\.1\.img_attn\.qkv\b.*LoRA",
        ),
    ],
)
def test_mixed_and_alien_keys_fail_by_name(state: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    save_file(state, tmp_path / "lora.safetensors")
    model = fresh()
    with pytest.raises(AdapterError, match=message) as error:
        adapters.load(model, tmp_path / "lora.safetensors")
    assert "lora.safetensors" in str(error.value)
    assert torch.equal(predict(model), predict(fresh()))


@pytest.mark.parametrize("parts", [("to_q", "to_k", "to_v"), ("to_q", "to_k"), ("to_out.0",)])
def test_a_dora_that_was_trained_in_diffusers_is_the_same_here(parts: tuple[str, ...], tmp_path: Path) -> None:
    """Each of q, k, v has an A and lengths of its own. Of a part of them, the lengths of the others are the base's."""
    names = [f"transformer_blocks.1.attn.{part}" for part in parts]
    reference = helpers.transformers("dev")[1]
    config = peft.LoraConfig(r=2, lora_alpha=2, use_dora=True, target_modules=names)
    peft.inject_adapter_in_model(config, reference)
    generator = torch.Generator().manual_seed(1)
    for key, parameter in reference.named_parameters():
        if "lora_" in key:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    state = {f"transformer.{key}": value for key, value in peft.get_peft_model_state_dict(reference).items()}
    assert any("lora_magnitude_vector" in key for key in state)
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "dora.safetensors")
    model = fresh()
    if len(parts) == 2:
        with pytest.raises(AdapterError, match=r"DoRA.*transformer_blocks\.1\.attn\.to_k, .*to_q\b"):
            adapters.load(model, tmp_path / "dora.safetensors")
        return
    assert adapters.load(model, tmp_path / "dora.safetensors").kind == "DoRA"
    assert helpers.relative_error(predict(model), predict(reference)) <= 1e-5
    assert helpers.relative_error(predict(fresh()), predict(model)) > 0.01


def test_every_form_says_of_every_layer_what_the_others_say() -> None:
    """Through each form in turn, the final modulation's swapped halves and the split q, k, v too."""
    pairs, model = random_pairs(), fresh()
    found = pairs
    for form in (to_kohya, to_diffusers, to_comfyui, to_diffusers, to_kohya):
        found = from_state(form(found), model)
    assert found.keys() == pairs.keys() == {n for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    for layer, pair in pairs.items():
        assert helpers.relative_error(found[layer].b @ found[layer].a, pair.b @ pair.a) <= 1e-6, layer
        assert transformer_module(layer).names


def test_a_published_file_of_one_half_says_which_is_missing(tmp_path: Path) -> None:
    state = to_kohya(random_pairs(layers=[QKV]))
    del state["lora_unet_double_blocks_1_img_attn_qkv.lora_up.weight"]
    save_file(state, tmp_path / "lora.safetensors")
    assert len(load_file(tmp_path / "lora.safetensors")) == 2
    with pytest.raises(AdapterError, match=r"img_attn\.qkv\b.*(lora_A and alpha|alpha and lora_A)"):
        adapters.load(fresh(), tmp_path / "lora.safetensors")
