"""python -m flux2.export: full checkpoints, and which model an adapter is for."""

import itertools
import re
import sys
from collections.abc import Callable
from pathlib import Path

import helpers
import pytest
import torch
from adapter_helpers import fresh, predict
from diffusers import Flux2Transformer2DModel
from export_helpers import changes, loaded
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from flux2 import adapters
from flux2.adapters.formats import LoraPair, to_kohya
from flux2.export import arguments as export_arguments
from flux2.export import command as export
from flux2.export import deltas, merge_checkpoint
from flux2.models.transformer import Transformer
from flux2.models.variants import VARIANTS
from flux2.weights import modelspec
from flux2.weights.loading import load_transformer
from flux2.weights.sources import ModelSource

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


@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_adapters_that_cancel_leave_the_base_as_it_is(
    kind: str, command: Callable[..., int], saved: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    given = [saved(kind), f"{saved(kind)}:-1"]
    assert command(*given, "--format", "full-bfl", "--dtype", "bf16", "--out", "out.safetensors") == 0
    assert re.search(
        r"22 layers, which change by 0 of themselves; the adapters are zero, or cancel", capsys.readouterr().err
    )
    found = load_file("out.safetensors")
    assert all(torch.equal(found[name], tensor.bfloat16()) for name, tensor in fresh().state_dict().items())


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


def test_a_merge_that_overflows_is_refused(
    command: Callable[..., int], saved: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(f"{saved('lora')}:1e39", "--format", "full-bfl", "--out", "o.safetensors") == 2
    assert re.search(r"error: .*_blocks\..*NaN", capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


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
    state: dict[str, Tensor],
    variant: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The base is a guess then, and is not written to the file as if it were known."""
    save_file(state, tmp_path / "lora.safetensors")
    found, certain = deltas.variant_for([tmp_path / "lora.safetensors"], None)
    assert (found.name, certain) == (variant, False)
    monkeypatch.setattr(sys, "argv", ["export"])
    options = ["--format", "comfyui", "--out", str(tmp_path / "out.safetensors")]
    place = export.run(export_arguments.arguments([str(tmp_path / "lora.safetensors"), *options]))
    assert "--model" in capsys.readouterr().err
    recorded = metadata_of(place)
    assert recorded.keys() == {
        "format",
        "flux2_lora.hash_sha256",
        *(f"modelspec.{key}" for key in ("implementation", "title", "date", "hash_sha256")),
    }
    options += ["--model", variant, "--overwrite"]
    export.run(export_arguments.arguments([str(tmp_path / "lora.safetensors"), *options]))
    recorded = metadata_of(place)
    assert recorded["base_model"] == VARIANTS[variant].repo
    assert recorded["modelspec.architecture"] == f"{modelspec.ARCHITECTURES[variant]}/lora"


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, "pt") as opened:
        return opened.metadata()


def test_what_fits_no_model_is_refused_with_the_reason(tmp_path: Path) -> None:
    save_file(one_layer("single_blocks.0.linear2", 777, 88), tmp_path / "lora.safetensors")
    with pytest.raises(adapters.AdapterError, match=r"dev, klein_4b, .*tiny: .*88.*777"):
        deltas.variant_for([tmp_path / "lora.safetensors"], None)
    save_file({"emb_params": torch.zeros(3)}, tmp_path / "text.safetensors")
    with pytest.raises(adapters.AdapterError, match=r"text\.safetensors.*LoRA.*emb_params"):
        deltas.variant_for([tmp_path / "text.safetensors"], None)
