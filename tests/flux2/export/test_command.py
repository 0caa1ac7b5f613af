"""python -m flux2.export: LoRA files that other programs read, compared before they get their names."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import helpers
import pytest
import torch
from adapter_helpers import fresh, predict
from diffusers import Flux2Pipeline
from export_helpers import changes, loaded
from foreign_adapters import WRITERS, write
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from flux2 import adapters
from flux2.adapters.files import DIFFUSERS_FILE
from flux2.adapters.reading import from_state
from flux2.adapters.tuners import attach
from flux2.export import deltas, low_rank
from flux2.models.variants import VARIANTS
from flux2.quantization.precision import Precision
from flux2.weights import modelspec
from flux2.weights.loading import load_transformer
from flux2.weights.sources import ModelSource

ROOT = Path(__file__).resolve().parents[3]
FORMS = ("diffusers", "comfyui", "kohya")


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


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("scales", [(1, -1), (0.7, -0.7), (0.1, 0.2, -0.3), (0,)])
@pytest.mark.parametrize("form", FORMS)
def test_adapters_that_cancel_change_nothing(
    form: str,
    scales: tuple[float, ...],
    dtype: str,
    command: Callable[..., int],
    saved: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In exact arithmetic and in float32: what is left of 0.1 + 0.2 - 0.3 are errors of rounding."""
    given = [f"{saved('lora')}:{scale:g}" for scale in scales]
    assert command(*given, "--format", form, "--dtype", dtype, "--out", "out.safetensors") == 0
    assert "nothing changes in all layers" in capsys.readouterr().err
    assert changes(tmp_path / "out.safetensors") == {}
    assert len(adapters.load(fresh(), tmp_path / "out.safetensors").layers) == 22


def test_adapters_that_cancel_in_some_layers_are_exact_in_the_others(
    command: Callable[..., int], saved: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    attention = {key: tensor for key, tensor in load_file(saved("lora") / DIFFUSERS_FILE).items() if ".attn." in key}
    save_file(attention, tmp_path / "attention.safetensors")
    assert command(saved("lora"), "attention.safetensors:-1", "--format", "comfyui", "--out", "out.safetensors") == 0
    wanted = changes(saved("lora"))
    removed = {layer for layer in wanted if "mlp" not in layer}
    assert f"nothing changes in {len(removed)} of {len(wanted)} layers" in capsys.readouterr().err
    found = changes(tmp_path / "out.safetensors")
    assert found.keys() == wanted.keys() - removed
    for layer, delta in found.items():
        assert helpers.relative_error(delta, wanted[layer]) <= 1e-6, layer


def test_what_is_small_next_to_what_it_is_the_sum_of_is_kept(
    command: Callable[..., int], saved: Callable[..., Path], tmp_path: Path
) -> None:
    place, out = saved("lora"), "out.safetensors"
    assert command(f"{place}:1", f"{place}:-0.9999", "--format", "comfyui", "--out", out) == 0
    wanted = changes(place)
    for layer, delta in changes(tmp_path / out).items():
        assert helpers.relative_error(delta, 1e-4 * wanted[layer]) <= 0.01, layer


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
    assert command(saved("loha"), "--format", "diffusers", "--out", "out.safetensors", path=False) == 0
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


@pytest.mark.parametrize("form", ["diffusers", "comfyui"])
@pytest.mark.parametrize("kind", ["columns", "lokr"])
def test_what_only_other_trainers_have_is_converted_for_all_programs(
    kind: str, form: str, command: Callable[..., int], tmp_path: Path
) -> None:
    """A DoRA of columns, and a LoKr of separate q, k and v: neither has a form for the fused layers."""
    wanted = write(WRITERS["OneTrainer"], kind, "number", torch.float32, tmp_path, fresh())
    options = ["--model", "tiny", "--format", form, "--rank", 144, "--out", "out.safetensors"]
    assert command(tmp_path / "lora.safetensors", *options) == 0
    found = changes(tmp_path / "out.safetensors")
    assert found.keys() == wanted.keys()
    assert max(helpers.relative_error(found[layer], delta) for layer, delta in wanted.items()) <= 2e-5
