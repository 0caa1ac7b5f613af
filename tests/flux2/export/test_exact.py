"""python -m flux2.export of LoKr, LoHa and DoRA: the weights that ComfyUI and diffusers make of the files.

`comfyui` and `musubi` compute them from ComfyUI's formulas (comfy/weight_adapter) and musubi-tuner's (networks/lokr.py
and loha.py), in float64; diffusers reads the files itself.
"""

import re
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import helpers
import numpy as np
import peft
import pytest
import torch
from adapter_helpers import attached, fresh, predict, stirred
from diffusers import Flux2Pipeline
from export_helpers import changes, loaded
from safetensors.torch import load_file
from torch import Tensor

import flux2
from flux2 import adapters
from flux2.adapters import AdapterError
from flux2.adapters.tuners import attach_lokr
from flux2.export import command as export
from flux2.export import exact
from flux2.export.arguments import arguments
from flux2.export.deltas import AdapterDelta
from flux2.models.variants import VARIANTS
from flux2.weights.key_names import swap_halves
from flux2.weights.sources import TINY_FOLDER


def comfyui(file: Path, base: dict[str, Tensor], strength: float = 1.0) -> dict[str, Tensor]:
    """What ComfyUI adds to each weight of `base`, in float64."""
    state = {key.removeprefix("diffusion_model."): tensor.double() for key, tensor in load_file(file).items()}
    for name in [key.removesuffix(".weight") for key in base]:
        kohya = f"lora_unet_{name.replace('.', '_')}."
        state = {key.replace(kohya, f"{name}."): tensor for key, tensor in state.items()}
    layers = {re.sub(r"\.(lo(ra|kr|ha)|hada|alpha|dora).*", "", key) for key in state}
    found = {}
    for layer in layers:
        own = {key.removeprefix(f"{layer}."): state.pop(key) for key in list(state) if key.startswith(f"{layer}.")}
        weight, alpha, rank = base[f"{layer}.weight"].double(), own.pop("alpha", None), None
        if "hada_w1_a" in own:
            rank = len(own["hada_w1_b"])
            delta = (own.pop("hada_w1_a") @ own.pop("hada_w1_b")) * (own.pop("hada_w2_a") @ own.pop("hada_w2_b"))
        elif "lora_A.weight" in own:
            rank = len(own["lora_A.weight"])
            delta = own.pop("lora_B.weight") @ own.pop("lora_A.weight")
        else:
            factors = []
            for factor in ("lokr_w1", "lokr_w2"):
                if factor in own:
                    factors.append(own.pop(factor))
                else:
                    rank = len(own[f"{factor}_b"])
                    factors.append(own.pop(f"{factor}_a") @ own.pop(f"{factor}_b"))
            delta = torch.kron(*factors)
        if alpha is not None and rank is not None:
            delta = delta * (alpha / rank)
        if (lengths := own.pop("dora_scale", None)) is not None:
            assert lengths.shape == (len(weight), 1), "ComfyUI takes other shapes for lengths of columns"
            delta = (weight + delta) * lengths / (weight.norm(dim=1, keepdim=True) + 2**-23) - weight
        assert not own, own.keys()
        found[layer] = strength * delta
    assert not state, state.keys()
    return found


def musubi(file: Path, base: dict[str, Tensor]) -> dict[str, Tensor]:
    """What musubi-tuner adds to each weight of `base`, in float64."""
    state, found = load_file(file), {}
    for layer in (key.removesuffix(".weight") for key in base):
        name = f"lora_unet_{layer.replace('.', '_')}."
        own = {key.removeprefix(name): state.pop(key).double() for key in list(state) if key.startswith(name)}
        if "lokr_w1" in own:
            w2 = own["lokr_w2"] if "lokr_w2" in own else own["lokr_w2_a"] @ own["lokr_w2_b"]
            rank = max(w2.shape) if "lokr_w2" in own else own["lokr_w2_a"].shape[1]
            found[layer] = torch.kron(own["lokr_w1"], w2) * own["alpha"] / rank
        elif own:
            delta = (own["hada_w1_a"] @ own["hada_w1_b"]) * (own["hada_w2_a"] @ own["hada_w2_b"])
            found[layer] = delta * own["alpha"] / len(own["hada_w1_b"])
    assert not state, state.keys()
    return found


def check(found: dict[str, Tensor], wanted: dict[str, Tensor], scale: float = 1.0) -> None:
    assert found.keys() == wanted.keys()
    for layer, delta in wanted.items():
        assert helpers.relative_error(found[layer], scale * delta) <= 1e-5, layer


def written(folder: Path, kind: str, **options: object) -> Path:
    """A PEFT folder of an adapter on every layer, with other options than the fixture's."""
    wrapped = stirred(attached(kind, fresh(), targets="all_linear", **options), by=0.1)
    adapters.save(wrapped, folder, base="tiny")
    return folder


LOKR = {
    "w2 is a product": {"rank": 3, "alpha": 5},
    "both are products": {"rank": 2, "alpha": 5, "decompose_both": True},
    "both are whole": {"rank": 64, "alpha": 7},  # readers ignore alpha
    "of 4 rows": {"rank": 3, "alpha": 5, "decompose_factor": 4},
    "of several ranks": {"rank": 3, "alpha": 5, "rank_pattern": {"single_blocks": 64, "double_mlp": 2}},
}


@pytest.mark.parametrize("scale", [1, -0.5])
@pytest.mark.parametrize("form", ["comfyui", "diffusers", "kohya"])
@pytest.mark.parametrize("case", LOKR)
def test_a_lokr_is_exact_in_comfyui_diffusers_and_musubi(
    case: str, form: str, scale: float, command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = written(tmp_path / "adapter", "lokr", **LOKR[case])
    out = tmp_path / "out.safetensors"
    assert command(f"{place}:{scale:g}", "--format", form, "--out", out, path=False) == 0
    assert ("note: only ComfyUI and musubi-tuner" in capsys.readouterr().err) == (form == "kohya")
    if form == "kohya":
        for read in (musubi, comfyui):
            check(read(out, fresh().state_dict()), changes(place), scale)
        check(changes(out), changes(place), scale)
        return
    if form == "comfyui":
        check(comfyui(out, fresh().state_dict()), changes(place), scale)
        assert any(key.endswith(".alpha") for key in load_file(out)) == (case != "both are whole")
        return
    reference = helpers.transformers("dev")[1]
    reference.load_lora_adapter(Flux2Pipeline.lora_state_dict(str(out)))
    assert helpers.relative_error(predict(reference), predict(loaded((place, float(scale))))) <= 1e-5
    assert helpers.relative_error(predict(reference), predict(fresh())) > 0.01


def test_diffusers_reads_comfyuis_file_of_a_lokr_too(
    command: Callable[..., int], saved: Callable[..., Path], tmp_path: Path
) -> None:
    place, out = saved("lokr"), tmp_path / "out.safetensors"
    assert command(place, "--format", "comfyui", "--out", out, path=False) == 0
    reference = helpers.transformers("dev")[1]
    reference.load_lora_adapter(Flux2Pipeline.lora_state_dict(str(out)))
    assert helpers.relative_error(predict(reference), predict(loaded((place, 1.0)))) <= 1e-5


@pytest.mark.parametrize(("rows", "is_possible"), [(3, False), (4, True), (1, True)])
def test_a_lokr_whose_halves_cannot_be_swapped_is_converted(rows: int, is_possible: bool) -> None:
    """Of three rows of blocks the middle is inside the second: that is no Kronecker product with swapped halves."""
    factors = {"lokr_w1": torch.randn(rows, 2), "lokr_w2": torch.randn(12 // rows, 3)}
    update = AdapterDelta(
        Path("x"), "LoKr", 1.0, fresh(), tensors={"final_layer.adaLN_modulation.1": factors}, config=peft.LoKrConfig()
    )
    assert exact.obstacle([update], "comfyui") is None
    assert (exact.obstacle([update], "diffusers") is None) == is_possible
    if is_possible:
        state = exact.tensors(update, "diffusers", lambda: pytest.fail("read the base"), torch.device("cpu"))
        w1, w2 = (state[f"transformer.norm_out.linear.lokr_w{i}"] for i in (1, 2))
        assert torch.equal(torch.kron(w1, w2), swap_halves(torch.kron(*factors.values())))


@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("form", ["comfyui", "kohya"])
def test_a_loha_is_exact_in_comfyui_and_musubi(
    form: str, scale: float, command: Callable[..., int], tmp_path: Path
) -> None:
    place, out = written(tmp_path / "adapter", "loha", rank=3, alpha=5), tmp_path / "out.safetensors"
    assert command(f"{place}:{scale}", "--format", form, "--out", out, path=False) == 0
    check(comfyui(out, fresh().state_dict()), changes(place), scale)
    check(changes(out), changes(place), scale)
    if form == "kohya":
        check(musubi(out, fresh().state_dict()), changes(place), scale)


def test_a_dora_is_exact_in_comfyui_and_read_by_no_mistake_here(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place, out = written(tmp_path / "adapter", "dora", rank=3, alpha=5), tmp_path / "out.safetensors"
    assert command(place, "--format", "comfyui", "--out", out) == 0
    assert "only ComfyUI" in capsys.readouterr().err
    check(comfyui(out, fresh().state_dict()), changes(place))
    check(comfyui(out, fresh().state_dict(), strength=0.5), changes(place), 0.5)
    with pytest.raises(AdapterError, match=r"out\.safetensors.*ComfyUI only.*folder"):
        loaded((out, 1.0))
    assert command(f"{place}:0.5", "--format", "comfyui", "--out", "half.safetensors") == 0
    assert re.search(r"scale 0\.5.*converted", capsys.readouterr().err)


@pytest.mark.parametrize("kind", ["lokr", "loha", "dora"])
def test_bfloat16_rounds_the_factors_and_not_the_lengths(
    kind: str, command: Callable[..., int], saved: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    assert command(saved(kind), "--format", "comfyui", "--dtype", "bf16", "--out", out) == 0
    state = load_file(out)
    kept = {key for key in state if key.endswith((".alpha", ".dora_scale"))}
    assert {state[key].dtype for key in state.keys() - kept} == {torch.bfloat16}
    assert {state[key].dtype for key in kept} <= {torch.float32}
    found = comfyui(out, fresh().state_dict())
    for layer, delta in changes(saved(kind)).items():
        assert 1e-6 < helpers.relative_error(found[layer], delta) < 0.02, layer


def test_a_dora_in_bfloat16_keeps_its_lengths_for_diffusers(
    command: Callable[..., int], saved: Callable[..., Path], tmp_path: Path
) -> None:
    assert command(saved("dora"), "--format", "diffusers", "--dtype", "bf16", "--out", "out.safetensors") == 0
    found = changes(tmp_path / "out.safetensors")
    for layer, delta in changes(saved("dora")).items():
        assert helpers.relative_error(found[layer], delta) < 0.004, layer


def test_a_rank_or_several_adapters_ask_for_the_nearest_lora(
    command: Callable[..., int], saved: Callable[..., Path], tmp_path: Path
) -> None:
    for name, given in {"a": [saved("lokr"), "--rank", 2], "b": [saved("lokr"), saved("lokr")]}.items():
        assert command(*given, "--format", "comfyui", "--out", f"{name}.safetensors") == 0
        assert all("lora_" in key for key in load_file(tmp_path / f"{name}.safetensors"))


@pytest.mark.parametrize("form", ["comfyui", "diffusers"])
def test_diffusers_draws_the_same_picture_with_a_lokr(form: str, tmp_path: Path) -> None:
    ours = flux2.load("tiny", device="cpu", precision="fp32", keep_text_encoder=True)
    wrapped = stirred(attach_lokr(deepcopy(ours.transformer), rank=4, alpha=8), by=0.1)
    adapters.save(wrapped, tmp_path / "adapter", base="tiny")
    out = str(tmp_path / "out.safetensors")
    export.run(arguments([str(tmp_path / "adapter"), "--format", form, "--out", out, "--device", "cpu"]))
    prompt, size = "a small red cup on a blue background", {"width": 64, "height": 64}
    before = ours.generate([prompt], seed=[3], steps=2, guidance=2.0, **size)[0]
    ours.load_adapter(tmp_path / "adapter")
    wanted = ours.generate([prompt], seed=[3], steps=2, guidance=2.0, **size)[0]
    theirs = Flux2Pipeline.from_pretrained(TINY_FOLDER, torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    theirs.load_lora_weights(out)
    text = VARIANTS["tiny"].text
    options = {"max_sequence_length": text.length, "text_encoder_out_layers": text.layers, **size}
    generator = torch.Generator().manual_seed(3)
    found = theirs(prompt=prompt, generator=generator, num_inference_steps=2, guidance_scale=2.0, **options).images[0]
    pixels = [np.asarray(image, dtype=np.int16) for image in (found, wanted, before)]
    assert np.abs(pixels[0] - pixels[1]).max() <= 2
    assert np.abs(pixels[1] - pixels[2]).max() > 20
