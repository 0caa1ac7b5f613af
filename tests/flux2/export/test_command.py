"""python -m flux2.export: files that other programs read, compared before they get their names."""

import argparse
import dataclasses
import hashlib
import itertools
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers
import peft
import pytest
import torch
from diffusers import Flux2Pipeline, Flux2Transformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flux2 import adapters
from flux2.adapters.files import DIFFUSERS_FILE
from flux2.adapters.formats import LoraPair, from_state, to_comfyui, to_kohya
from flux2.adapters.tuners import attach, attach_dora, attach_loha, attach_lokr, attach_oft, attach_pissa
from flux2.export import arguments as export_arguments
from flux2.export import command as export
from flux2.export import deltas, low_rank, merge_checkpoint
from flux2.models.transformer import Transformer
from flux2.models.variants import VARIANTS
from flux2.quantization.precision import Precision
from flux2.weights import modelspec, streaming_writer
from flux2.weights.loading import load_transformer
from flux2.weights.sources import ModelSource

ROOT = Path(__file__).resolve().parents[3]
TYPES: dict[str, tuple[Callable[..., peft.PeftModel], dict[str, Any]]] = {
    "lora": (attach, {"rank": 4, "alpha": 8}),
    "rslora": (attach, {"rank": 4, "alpha": 8, "rslora": True}),
    "pissa": (attach_pissa, {"rank": 4}),
    "dora": (attach_dora, {"rank": 4, "alpha": 8}),
    "loha": (attach_loha, {"rank": 3}),
    "lokr": (attach_lokr, {"rank": 4}),
    "oft": (attach_oft, {"block_size": 16}),
}
FORMS = ("diffusers", "comfyui", "kohya")


def fresh(kind: str = "dev") -> Transformer:
    return helpers.transformer(kind)


@torch.no_grad()
def predict(model: nn.Module, kind: str = "dev") -> Tensor:
    inputs = helpers.transformer_inputs(helpers.TRANSFORMERS[kind])
    return model(**inputs) if isinstance(model, Transformer) else helpers.reference_forward(model, inputs)


def loaded(*places: tuple[Path, float], kind: str = "dev") -> Transformer:
    """The small model with adapters attached, each at its scale."""
    model = fresh(kind)
    for i, (place, scale) in enumerate(places):
        adapters.load(model, place, name=f"adapter_{i}", scale=scale)
    return model


def changes(place: Path, kind: str = "dev") -> dict[str, Tensor]:
    """What an adapter adds to each weight that it changes, by PEFT's merge, in float64."""
    model, base = loaded((place, 1.0), kind=kind), fresh(kind).state_dict()
    adapters.merge(model)
    found = {name.removesuffix(".weight"): tensor.double() - base[name] for name, tensor in model.state_dict().items()}
    return {name: delta for name, delta in found.items() if delta.any()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`saved("dora", "all_linear")`: the PEFT folder of an adapter that was trained a little, written once."""
    made: dict[tuple[str, ...], Path] = {}

    def folder(kind: str, targets: str = "blocks", model: str = "dev", base: str = "tiny") -> Path:
        key = (kind, targets, model, base)
        if key not in made:
            attach_it, options = TYPES[kind]
            wrapped = attach_it(fresh(model), targets=targets, **options)
            generator = torch.Generator().manual_seed(len(made))
            for parameter in adapters.adapter_parameters(wrapped):
                parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
            made[key] = tmp_path_factory.mktemp(kind) / "adapter"
            adapters.save(wrapped, made[key], base=base)
        return made[key]

    return folder


@pytest.fixture
def command(
    model_folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., int]:
    """Runs the command in an empty folder, with the small models in the place of `tiny` and of klein 4B."""
    small = helpers.VARIANTS
    monkeypatch.setitem(VARIANTS, "tiny", dataclasses.replace(small["dev"], name="tiny"))
    for name in ("klein_base_4b", "klein_4b"):
        monkeypatch.setitem(VARIANTS, name, dataclasses.replace(small["klein"], name=name))
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, kind: str = "dev", path: bool = True) -> int:
        given = ["--device", "cpu", *(["--path", str(model_folders(kind))] if path else []), *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", ["export", *given])
        return export.main()

    return run


# ------------------------------------------------------------------ low-rank files


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("adapter", "kind"), [("lora", "dev"), ("rslora", "klein"), ("pissa", "dev")])
def test_a_round_trip_gives_the_same_changes(
    adapter: str, kind: str, form: str, command: Callable[..., int], saved: Callable[..., Path], tmp_path: Path
) -> None:
    """Ours, to each format, to ours: alpha is not the rank, and all layers are adapted, the final modulation too."""
    place = saved(adapter, "all_linear", kind, "tiny" if kind == "dev" else "klein_4b")
    assert command(place, "--format", form, "--out", "out.safetensors") == 0
    wanted, found = (changes(path, kind) for path in (place, tmp_path / "out.safetensors"))
    assert found.keys() == wanted.keys()
    assert len(wanted) == len([m for m in fresh(kind).modules() if isinstance(m, nn.Linear)])
    for layer, delta in wanted.items():
        assert helpers.relative_error(found[layer], delta) <= 1e-6, layer
    assert [file.name for file in tmp_path.iterdir()] == ["out.safetensors"], "and nothing else is left"


@pytest.mark.parametrize("form", FORMS)
def test_diffusers_reads_every_form_of_the_block_layers(
    form: str, command: Callable[..., int], saved: Callable[..., Path], tmp_path: Path
) -> None:
    place = saved("lora")
    assert command(f"{place}:0.5", "--format", form, "--out", "out.safetensors") == 0
    reference = helpers.transformers("dev")[1]
    reference.load_lora_adapter(Flux2Pipeline.lora_state_dict(str(tmp_path / "out.safetensors")))
    assert helpers.relative_error(predict(reference), predict(loaded((place, 0.5)))) <= 1e-5
    assert helpers.relative_error(predict(fresh()), predict(reference)) > 0.01


def test_several_adapters_become_one_each_at_its_scale(
    command: Callable[..., int], saved: Callable[..., Path], tmp_path: Path
) -> None:
    one, two = saved("lora"), saved("rslora", "attention")
    assert command(f"{one}:0.5", f"{two}:-2", "--format", "kohya", "--out", "out.safetensors") == 0
    model = loaded((tmp_path / "out.safetensors", 1.0))
    assert helpers.relative_error(predict(model), predict(loaded((one, 0.5), (two, -2.0)))) <= 1e-5


def test_a_dora_goes_to_diffusers_as_a_dora(
    command: Callable[..., int], saved: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = saved("dora", "all_linear")
    assert command(place, "--format", "diffusers", "--out", "out.safetensors", path=False) == 0
    assert re.search(r"DoRA.*rank 4\b", capsys.readouterr().err)
    reference = helpers.transformers("dev")[1]
    reference.load_lora_adapter(Flux2Pipeline.lora_state_dict(str(tmp_path / "out.safetensors")))
    assert helpers.relative_error(predict(reference), predict(loaded((place, 1.0)))) <= 1e-5


def test_bfloat16_is_within_the_bound_that_is_checked(
    command: Callable[..., int], saved: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(saved("lora"), "--format", "kohya", "--dtype", "bf16", "--out", "out.safetensors") == 0
    said = float(re.search(r"relative error\D*(\d[\d.e-]*)", capsys.readouterr().err)[1])  # type: ignore[index]
    state = load_file(tmp_path / "out.safetensors")
    assert {tensor.dtype for key, tensor in state.items() if "alpha" not in key} == {torch.bfloat16}
    wanted, found = changes(saved("lora")), changes(tmp_path / "out.safetensors")
    errors = {layer: helpers.relative_error(found[layer], delta) for layer, delta in wanted.items()}
    assert max(errors.values()) == pytest.approx(said, rel=0.1)
    pairs = deltas.read(saved("lora"), fresh()).pairs
    assert all(errors[layer] <= low_rank.rounding_bound(pair, torch.bfloat16) + 1e-6 for layer, pair in pairs.items())
    assert 1e-4 < max(errors.values()) < 2**-7


# ------------------------------------------------------------------ conversions


@pytest.mark.parametrize(
    ("adapter", "form"),
    [
        *(("dora", "diffusers"), ("loha", "comfyui"), ("lokr", "diffusers"), ("oft", "comfyui"), ("lora", "comfyui")),
        pytest.param("dora", "comfyui", marks=pytest.mark.slow),
    ],
)
def test_other_types_become_the_nearest_lora_and_the_error_said_is_true(
    adapter: str,
    form: str,
    command: Callable[..., int],
    saved: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """--rank 3 is less than any of them has: the singular values that are left out are the error, layer by layer."""
    place = saved(adapter)
    assert command(place, "--format", form, "--rank", 3, "--out", "out.safetensors") == 0
    number = r"\D*(\d[\d.e-]*)"
    said = re.search(
        rf"rank 3\b{number}.* 22 layers{number}.*?((?:double|single)_blocks[\w.]*\w)", capsys.readouterr().err
    )
    assert said is not None
    overall, worst, layer = said.groups()
    wanted, found = changes(place), changes(tmp_path / "out.safetensors")
    lost = {name: float((found[name] - delta).norm()) for name, delta in wanted.items()}
    for name, delta in wanted.items():
        best = float(torch.linalg.svdvals(delta)[3:].norm())
        assert lost[name] == pytest.approx(best, rel=1e-3, abs=1e-5), name
    ratios = {name: lost[name] / float(delta.norm()) for name, delta in wanted.items()}
    total = sum(float(delta.norm()) ** 2 for delta in wanted.values()) ** 0.5
    assert float(overall) == pytest.approx(sum(error**2 for error in lost.values()) ** 0.5 / total, rel=0.06)
    assert float(worst) == pytest.approx(max(ratios.values()), rel=0.06)
    assert ratios[layer] == pytest.approx(max(ratios.values()), rel=1e-3)
    pairs = from_state(load_file(tmp_path / "out.safetensors"), fresh())
    assert {pair.a.shape[0] for pair in pairs.values()} == {3}


@pytest.mark.parametrize(
    "adapter", ["dora", "lokr", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("loha", "oft"))]
)
def test_max_error_is_met_in_every_layer(
    adapter: str, command: Callable[..., int], saved: Callable[..., Path], tmp_path: Path
) -> None:
    place = saved(adapter)
    assert command(place, "--format", "kohya", "--max-error", 0.02, "--out", "out.safetensors") == 0
    wanted, found = changes(place), changes(tmp_path / "out.safetensors")
    assert all(helpers.relative_error(found[name], delta) <= 0.0201 for name, delta in wanted.items())
    model = loaded((tmp_path / "out.safetensors", 1.0))
    assert helpers.relative_error(predict(model), predict(loaded((place, 1.0)))) <= 0.02


def test_a_product_of_low_rank_is_exact_at_the_standard_rank(
    command: Callable[..., int], saved: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A LoHa of rank 3 is of rank 9; its weights need no base, so none is asked for."""
    assert command(saved("loha"), "--format", "comfyui", "--out", "out.safetensors", path=False) == 0
    assert re.search(r"LoHa.*rank 9\b", capsys.readouterr().err)
    wanted, found = changes(saved("loha")), changes(tmp_path / "out.safetensors")
    assert all(helpers.relative_error(found[name], delta) <= 1e-5 for name, delta in wanted.items())


def test_a_coarse_conversion_is_said_and_the_metadata_have_it(
    command: Callable[..., int], saved: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(saved("oft"), "--format", "comfyui", "--rank", 1, "--out", "out.safetensors") == 0
    assert "--rank" in capsys.readouterr().err
    with safe_open("out.safetensors", "pt") as file:
        assert re.search(r"OFT.*rank 1\b.*relative error 0\.", file.metadata()["modelspec.description"])


# ------------------------------------------------------------------ full checkpoints


def single_file(folder: Path, out: Path) -> Path:
    """The transformer in `folder` as Black Forest Labs' single file."""
    source = ModelSource(helpers.VARIANTS["dev"], str(folder))
    save_file(load_transformer(source).state_dict(), out)
    return out


def merged_model(place: Path) -> Transformer:
    return load_transformer(ModelSource(helpers.VARIANTS["dev"], str(place)))


MERGED = {
    "pairs": [("lora", 0.5), ("rslora", -1.0)],
    "products": [("lora", 1.0), ("loha", 0.5), ("lokr", 1.0)],
    "dora": [("dora", 0.5)],
    "oft": [("oft", 1.0)],
}
OFTEN = {  # every reader, writer and kind of change; all of their combinations are slow tests
    ("pairs", "bfl", "diffusers"),
    ("products", "diffusers", "bfl"),
    ("dora", "diffusers", "diffusers"),
    ("oft", "bfl", "bfl"),
    ("pairs", "diffusers", "bfl"),
}


@pytest.mark.parametrize(
    ("given", "base", "layout"),
    [
        pytest.param(*case, marks=() if case in OFTEN else pytest.mark.slow)
        for case in itertools.product(MERGED, ("diffusers", "bfl"), ("diffusers", "bfl"))
    ],
)
def test_a_full_checkpoint_computes_what_the_adapters_do_on_the_fly(
    given: str,
    base: str,
    layout: str,
    command: Callable[..., int],
    saved: Callable[..., Path],
    model_folders: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(merge_checkpoint, "SHARD", "100KB")
    places = [(saved(kind, "all_linear"), scale) for kind, scale in MERGED[given]]
    read = model_folders("dev")
    if base == "bfl":
        read = single_file(read, tmp_path / "base.safetensors")
    out = Path("merged" if layout == "diffusers" else "merged.safetensors")
    asked = [f"{place}:{scale}" if scale != 1 else place for place, scale in places]
    assert command(*asked, "--format", f"full-{layout}", "--path", read, "--out", out, path=False) == 0
    if given == "products":  # different types share no layers on the fly: their changes add up
        wanted = fresh()
        for place, scale in places:
            for name, delta in changes(place).items():
                wanted.get_submodule(name).weight.data += (scale * delta).float()
    else:
        wanted = loaded(*places)
    assert helpers.relative_error(predict(merged_model(tmp_path / out)), predict(wanted)) <= 1e-5
    assert helpers.relative_error(predict(fresh()), predict(wanted)) > 0.01
    if layout == "diffusers":
        assert len(list((out / "transformer").glob("*.safetensors"))) > 1
        reference = Flux2Transformer2DModel.from_pretrained(str(out), subfolder="transformer")
        assert helpers.relative_error(predict(reference), predict(wanted)) <= 1e-5
    else:
        assert load_file(out).keys() == fresh().state_dict().keys()


def test_a_merged_checkpoint_in_bfloat16_is_the_sum_rounded_once(
    command: Callable[..., int],
    saved: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place = saved("lora")
    assert command(place, "--format", "full-bfl", "--dtype", "bf16", "--out", "out.safetensors") == 0
    found, base = load_file(tmp_path / "out.safetensors"), fresh().state_dict()
    exact = loaded((place, 1.0))
    adapters.merge(exact)
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    rounded = {name: tensor.bfloat16() for name, tensor in exact.state_dict().items()}
    same = sum(int((found[name] == tensor).sum()) for name, tensor in rounded.items())
    assert same / sum(tensor.numel() for tensor in rounded.values()) > 0.9999, "but for a tie here and there"
    delta = {name: tensor - base[name] for name, tensor in exact.state_dict().items() if (tensor != base[name]).any()}
    lost = sum(float((found[name].float() - exact.state_dict()[name]).norm()) ** 2 for name in delta) ** 0.5
    part = lost / sum(float(tensor.norm()) ** 2 for tensor in delta.values()) ** 0.5
    said = re.search(r"[Rr]ound\w*\D*(\d[\d.e-]*)", capsys.readouterr().err)
    assert said is not None
    assert float(said[1]) == pytest.approx(part, rel=0.06)
    assert part > 1e-3


def test_a_quantized_base_is_refused_with_the_reason(
    command: Callable[..., int], saved: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = dict(fresh().state_dict())
    key = "double_blocks.0.img_attn.qkv.weight"
    state |= {key: state[key].to(torch.float8_e4m3fn), key + "_scale": torch.tensor(1.0)}
    save_file(state, tmp_path / "fp8.safetensors")
    asked = (saved("lora"), "--format", "full-bfl", "--path", "fp8.safetensors", "--out", "out.safetensors")
    assert command(*asked, path=False) == 2
    assert re.search(r"fp8\.safetensors.*double_blocks\.0\.img_attn\.qkv\.weight", capsys.readouterr().err)
    assert not (tmp_path / "out.safetensors").exists()


# ------------------------------------------------------------------ metadata


def check_modelspec(file: Path) -> dict[str, str]:
    """The metadata of a file that has what ModelSpec requires, and a hash that is true."""
    with safe_open(file, "pt") as tensors:
        metadata = tensors.metadata()
    for key in ("sai_model_spec", "architecture", "implementation", "title", "hash_sha256"):
        assert metadata[f"modelspec.{key}"], key
    raw = file.read_bytes()
    data = raw[8 + int.from_bytes(raw[:8], "little") :]
    assert metadata["modelspec.hash_sha256"] == "0x" + hashlib.sha256(data).hexdigest()
    return {key.removeprefix("modelspec."): value for key, value in metadata.items() if key.startswith("modelspec.")}


def test_every_file_carries_modelspec_metadata_and_a_true_hash(
    command: Callable[..., int], saved: Callable[..., Path], tmp_path: Path
) -> None:
    place = saved("lora", base="black-forest-labs/FLUX.2-dev")
    trained = check_modelspec(place / DIFFUSERS_FILE)
    assert (trained["architecture"], trained["implementation"]) == ("Flux.2-dev/lora", "diffusers")
    assert "date" not in trained, "the same training gives the same bytes"
    place = saved("lora", model="klein", base="klein_base_4b")
    words = ("--title", "Cards", "--trigger", "trtcrd")
    assert command(place, "--format", "kohya", *words, "--out", "out.safetensors", kind="klein") == 0
    found = check_modelspec(tmp_path / "out.safetensors")
    assert found["architecture"] == "Flux.2-klein-4b/lora"
    assert found["implementation"] == "https://github.com/black-forest-labs/flux2"
    assert (found["title"], found["trigger_phrase"], found["resolution"]) == ("Cards", "trtcrd", "64x64")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", found["date"])
    assert command(place, "--format", "full-diffusers", "--out", "whole", kind="klein") == 0
    full = check_modelspec(tmp_path / "whole" / "transformer" / "diffusion_pytorch_model.safetensors")
    assert (full["architecture"], full["implementation"]) == ("Flux.2-klein-4b", "diffusers")
    assert full["merged_from"] == f"klein_base_4b, {place}"


def test_the_names_of_architectures_cover_the_variants() -> None:
    assert modelspec.ARCHITECTURES.keys() == VARIANTS.keys()


# ------------------------------------------------------------------ which model


def test_an_adapter_of_a_klein_base_is_merged_into_its_distilled_twin_and_no_other(
    command: Callable[..., int],
    saved: Callable[..., Path],
    model_folders: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    place = saved("dora", model="klein", base="klein_base_4b")
    asked = (place, "--format", "full-bfl", "--out", "out.safetensors")
    assert command(*asked, "--model", "klein_4b", kind="klein") == 0
    source = ModelSource(helpers.VARIANTS["klein"], str(tmp_path / "out.safetensors"))
    wanted = predict(loaded((place, 1.0), kind="klein"), "klein")
    assert helpers.relative_error(predict(load_transformer(source), "klein"), wanted) <= 1e-5
    assert command(*asked, "--overwrite", "--model", "tiny") == 2
    assert re.search(r"klein_base_4b.*tiny", capsys.readouterr().err)


def test_twins_have_the_same_layers_and_an_adapter_loads_on_both(saved: Callable[..., Path]) -> None:
    for size in ("4b", "9b"):
        assert VARIANTS[f"klein_base_{size}"].transformer == VARIANTS[f"klein_{size}"].transformer
    model = fresh("klein")
    assert adapters.load(model, saved("lora", model="klein", base="klein_base_4b")).layers
    with pytest.raises(adapters.AdapterError, match=r"_blocks\..*klein_base_4b"):
        adapters.load(fresh("dev"), saved("lora", model="klein", base="klein_base_4b"))


def one_layer(layer: str, rows: int, columns: int) -> dict[str, Tensor]:
    return to_kohya({layer: LoraPair(torch.ones(1, columns), torch.ones(rows, 1))})


@pytest.mark.parametrize(
    ("state", "variant"),
    [
        (one_layer("single_blocks.47.linear2", 6144, 24576), "dev"),
        (one_layer("single_blocks.0.linear2", 4096, 16384), "klein_base_9b"),
        (one_layer("double_blocks.4.txt_mlp.2", 3072, 9216), "klein_base_4b"),
    ],
)
def test_a_file_that_says_nothing_is_known_by_its_shapes(
    state: dict[str, Tensor], variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_file(state, tmp_path / "lora.safetensors")
    found, certain = deltas.variant_for([tmp_path / "lora.safetensors"], None)
    assert (found.name, certain) == (variant, False)
    monkeypatch.setattr(sys, "argv", ["export"])
    options = ["--format", "comfyui", "--out", str(tmp_path / "out.safetensors")]
    assert export.run(export_arguments.arguments([str(tmp_path / "lora.safetensors"), *options])).exists()


def test_what_fits_no_model_is_refused_with_the_reason(tmp_path: Path) -> None:
    save_file(one_layer("single_blocks.0.linear2", 777, 88), tmp_path / "lora.safetensors")
    with pytest.raises(adapters.AdapterError, match=r"dev, klein_4b, .*tiny: .*88.*777"):
        deltas.variant_for([tmp_path / "lora.safetensors"], None)
    save_file({"emb_params": torch.zeros(3)}, tmp_path / "text.safetensors")
    with pytest.raises(adapters.AdapterError, match=r"text\.safetensors.*LoRA.*emb_params"):
        deltas.variant_for([tmp_path / "text.safetensors"], None)


# ------------------------------------------------------------------ what is wrong


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone", "--format", "kohya"], r"adapter 'gone'"),
        (["{lora}:nan", "--format", "kohya"], r"scale.*nan"),
        (["{lora}", "--format", "kohya", "--rank", "0"], r"--rank[= ]0\b"),
        (["{lora}", "--format", "kohya", "--max-error", "1"], r"--max-error[= ]1\b"),
        (["{lora}", "--format", "kohya", "--out", "out.bin"], r"--out[= ]out\.bin.*\.safetensors"),
        (["{lora}", "--format", "full-diffusers"], r"--out[= ]out\.safetensors.*folder"),
        (["{lora}", "--format", "kohya", "--out", "there.safetensors"], r"there\.safetensors.*--overwrite"),
        (["{lora}", "--format", "kohya", "--device", "tpu"], r"device='?tpu"),
        (["{oft}:0.5", "--format", "kohya"], r"scale=0\.5.*OFT"),
        (["{dora}", "{lora}", "--format", "full-bfl"], r"DoRA.*--format full-bfl.*--path"),
        (["{klein}", "{lora}", "--format", "kohya"], r"klein_base_4b, tiny"),
        (["{klein}", "--model", "tiny", "--format", "kohya"], r"klein_base_4b.*tiny"),
        (["{nameless}", "--format", "full-bfl"], r"--model tiny"),
        (["{nameless}", "--model", "klein_4b", "--format", "kohya"], r"_blocks\."),
        (["{lora}", "--format", "full-bfl", "--path", "elsewhere"], r"--path[= ]'?elsewhere"),
        (
            ["{lora}", "--format", "kohya", "--overwrite", "--out", "{lora}/adapter_model.safetensors"],
            r"--out[= ]\S*/adapter_model\.safetensors",
        ),
        (["{copy}", "--format", "kohya", "--overwrite", "--out", "{copy}"], r"--out[= ]\S*/copy\.safetensors"),
    ],
)
def test_whatever_is_wrong_is_one_line_and_nothing_is_written(
    arguments: list[str],
    message: str,
    command: Callable[..., int],
    saved: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places: dict[str, Any] = {kind: saved(kind) for kind in ("lora", "dora", "oft")}
    places["klein"] = saved("lora", model="klein", base="klein_base_4b")
    places["nameless"] = saved("lora", base="somewhere")
    save_file(load_file(places["lora"] / DIFFUSERS_FILE), tmp_path / "copy.safetensors")
    places["copy"] = tmp_path / "copy.safetensors"
    (tmp_path / "there.safetensors").touch()
    before = {file: file.read_bytes() for folder in (tmp_path, places["lora"]) for file in folder.iterdir()}
    given = [argument.format_map(places) for argument in arguments]
    given += [] if "--out" in given else ["--out", "out.safetensors"]
    assert command(*given, path="--path" not in given) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(error) == 1
    assert re.search(message, error[0]), error[0]
    after = {file: file.read_bytes() for folder in (tmp_path, places["lora"]) for file in folder.iterdir()}
    assert after == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", "4", "--max-error", "0.1"], r"--rank.*--max-error"),
        (["--format", "full-bfl", "--rank", "4"], r"--format full-bfl.*--rank"),
        (["--format", "peft"], r"invalid choice: 'peft'"),
    ],
)
def test_options_that_contradict_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        export.arguments(["x", "--out", "y", "--format", "kohya", *arguments])
    assert re.search(message, capsys.readouterr().err.splitlines()[-1])


FULL_AND_NOT = pytest.mark.parametrize(
    ("form", "out"), [("kohya", "o/out.safetensors"), ("full-bfl", "o/out.safetensors"), ("full-diffusers", "o/out")]
)


@FULL_AND_NOT
def test_a_disk_without_room_is_told_before_anything_is_written(
    form: str,
    out: str,
    command: Callable[..., int],
    saved: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usage = argparse.Namespace(free=streaming_writer.SPARE + 1000)
    monkeypatch.setattr(streaming_writer.shutil, "disk_usage", lambda place: usage)
    assert command(saved("lora"), "--format", form, "--out", out) == 2
    assert re.search(r"error: --out \S+.* \d\.\d MB.* 67\.1 MB", capsys.readouterr().err)
    assert not (tmp_path / "o").exists()


@FULL_AND_NOT
@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_what_ends_in_the_middle_leaves_out_as_it_was(
    fault: Any,
    form: str,
    out: str,
    command: Callable[..., int],
    saved: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise fault

    def write(file: streaming_writer.SafetensorsFile, name: str, tensor: Tensor) -> None:
        if len(file.todo) < 5:
            fail()
        kept(file, name, tensor)

    kept = streaming_writer.SafetensorsFile.write
    asked = (saved("lora"), "--format", form, "--out", out)
    with monkeypatch.context() as patch:
        patch.setattr(streaming_writer.SafetensorsFile, "write", write)
        patch.setattr(export, "load_file", fail)
        assert command(*asked) == (130 if fault is KeyboardInterrupt else 2)
        assert not any(file.is_file() for file in tmp_path.rglob("*")), "nothing is left"
        assert command(*asked) != 0
    assert command(*asked) == 0
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(streaming_writer.SafetensorsFile, "write", write)
        patch.setattr(export, "load_file", fail)
        assert command(f"{saved('lora')}:0.5", *asked[1:], "--overwrite") != 0
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    assert command(f"{saved('lora')}:0.5", *asked[1:], "--overwrite") == 0
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} != before
    assert "Traceback" not in capsys.readouterr().err


@FULL_AND_NOT
def test_a_disk_that_fills_is_one_error_that_names_out(
    form: str,
    out: str,
    command: Callable[..., int],
    saved: Callable[..., Path],
    model_folders: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Where the room was there at first; safetensors and Python each have an error of their own for it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    place = saved("lora")
    model_folders("dev")  # is made when it is first asked for
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
        assert command(place, "--format", form, "--out", out) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert re.search(r"error: --out \S+.*File too large", capsys.readouterr().err)
    assert not [file for file in tmp_path.rglob("*") if file.is_file() or ".part" in file.name]


@FULL_AND_NOT
def test_being_terminated_leaves_no_unfinished_file(
    form: str,
    out: str,
    command: Callable[..., int],
    saved: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    there = []

    def terminated(*given: Any) -> None:
        there.extend(tmp_path.rglob("*.part"))
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, lambda *given: None)  # of the test's own process, which must live
    try:
        monkeypatch.setattr(export, "compare", terminated)
        monkeypatch.setattr(merge_checkpoint, "compare", terminated)
        assert command(saved("lora"), "--format", form, "--out", out) == 128 + signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, before)
    assert there
    assert not [file for file in tmp_path.rglob("*") if file.is_file() or ".part" in file.name]


def test_a_merge_that_overflows_is_refused(
    command: Callable[..., int], saved: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(f"{saved('lora')}:1e39", "--format", "full-bfl", "--out", "o.safetensors") == 2
    assert re.search(r"error: .*_blocks\..*NaN", capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_and_a_damaged_configuration_are_named(
    command: Callable[..., int], saved: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = saved("lora")
    (tmp_path / "file").write_text("x")
    for form, out in (("kohya", "file/o.safetensors"), ("full-diffusers", "file/o")):
        assert command(place, "--format", form, "--out", out) == 2
        said = capsys.readouterr().err
        assert re.match(rf"error: --out {out}\b.*{tmp_path / 'file'}\b", said)
        assert len(said.splitlines()) == 1
    (tmp_path / "damaged").mkdir()
    shutil.copy(place / "adapter_model.safetensors", tmp_path / "damaged")
    (tmp_path / "damaged" / "adapter_config.json").write_text("{")
    assert command("damaged", "--format", "kohya", "--out", "o.safetensors") == 2
    assert re.search(r"error: adapter damaged.*adapter_config\.json", capsys.readouterr().err)


@FULL_AND_NOT
def test_a_file_that_does_not_hold_what_was_written_is_not_kept(
    form: str,
    out: str,
    command: Callable[..., int],
    saved: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A disk that changes one number: of a LoRA by less than its strength, of a checkpoint by one bit."""

    def worn(file: Path) -> dict[str, Tensor]:
        state = load_file(file)
        key = next(key for key in state if key.endswith("lora_up.weight"))
        state[key][0, 0] += 1e-3
        return state

    def flip(file: streaming_writer.SafetensorsFile) -> None:
        finish(file)
        raw = bytearray(file.path.read_bytes())
        raw[-1] ^= 1
        file.path.write_bytes(raw)

    finish = streaming_writer.SafetensorsFile.finish
    monkeypatch.setattr(streaming_writer.SafetensorsFile, "finish", flip)
    monkeypatch.setattr(export, "load_file", worn)
    assert command(saved("lora"), "--format", form, "--out", out) == 2
    assert re.search(r"error: .*(_blocks\.|final_layer\.)", capsys.readouterr().err)
    assert not any(file.is_file() for file in tmp_path.rglob("*"))


def test_a_form_that_is_wrong_is_caught_by_the_comparison(
    command: Callable[..., int], saved: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(pairs: Any) -> dict[str, Tensor]:
        state = to_comfyui(pairs)
        return {key: tensor.flip(0) if "lora_B" in key and "qkv" in key else tensor for key, tensor in state.items()}

    monkeypatch.setitem(export.FORMS, "comfyui", wrong)
    assert command(saved("lora"), "--format", "comfyui", "--out", "out.safetensors") == 2
    assert not (tmp_path / "out.safetensors").exists()


def test_layers_that_diffusers_leaves_out_of_kohyas_keys_are_named(
    command: Callable[..., int], saved: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = saved("lora", "all_linear")
    assert command(place, "--format", "kohya", "--out", "out.safetensors") == 0
    said = capsys.readouterr().err
    kept = from_state(Flux2Pipeline.lora_state_dict(str(tmp_path / "out.safetensors")), fresh())
    missing = deltas.read(place, fresh()).pairs.keys() - kept.keys()
    assert len(missing) == 6
    assert all(layer in said for layer in missing)
    assert command(place, "--format", "comfyui", "--out", "comfyui.safetensors") == 0
    assert re.search(r"final_layer\.adaLN_modulation\.1.*ComfyUI", capsys.readouterr().err)


def test_files_can_be_read_by_whom_the_umask_lets(
    command: Callable[..., int], saved: Callable[..., Path], tmp_path: Path
) -> None:
    before = os.umask(0o027)
    try:
        for form in ("comfyui", "full-bfl"):
            assert command(saved("lora"), "--format", form, "--out", f"{form}.safetensors") == 0
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o640}


@pytest.mark.slow
def test_the_real_command_exports_for_the_embedded_model(tmp_path: Path) -> None:
    model = load_transformer(ModelSource(VARIANTS["tiny"], str(ROOT / "flux2" / "assets" / "tiny")), "cpu", Precision())
    wrapped = attach(model, rank=2)
    for parameter in adapters.adapter_parameters(wrapped):
        parameter.data += 0.05
    adapters.save(wrapped, tmp_path / "adapter", base="tiny")
    out = tmp_path / "out"
    arguments = [str(tmp_path / "adapter"), "--format", "full-diffusers", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "flux2.export", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, f"{out}\n"), done.stderr
    config = json.loads((out / "transformer" / "config.json").read_text())
    assert (config["_class_name"], config["num_single_layers"]) == ("Flux2Transformer2DModel", 4)
