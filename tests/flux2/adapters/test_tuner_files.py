"""flux2.adapters.tuners: files of every type, several at their scales, and merging."""

import re
from pathlib import Path
from typing import Any

import helpers
import peft
import pytest
import torch
from adapter_helpers import EACH_TYPE, NAMES, TYPES, attached, base, predict, stirred
from safetensors.torch import load_file, save_file

from flux2 import adapters
from flux2.adapters.files import DIFFUSERS_FILE, PEFT_FILE, PISSA_FILE, format_notes, layer_pairs
from flux2.adapters.formats import AdapterError, to_comfyui, to_kohya
from flux2.adapters.tuners import attach
from flux2.layers.fused_lora import FusedLora

# the rank of a T-LoRA depends on the timestep, which no weight and no other program has
SAME_EVERYWHERE = pytest.mark.parametrize("kind", [kind for kind in TYPES if kind != "tlora"])

# ------------------------------------------------------------------ files


@SAME_EVERYWHERE
def test_pefts_own_loader_reads_what_is_saved(kind: str, tmp_path: Path) -> None:
    wrapped = stirred(attached(kind, base(model="dev"), targets="all_linear"))
    adapters.save(wrapped, tmp_path, base="small")
    by_peft = peft.PeftModel.from_pretrained(base(model="dev"), str(tmp_path))
    assert helpers.relative_error(predict(by_peft), predict(wrapped)) <= 1e-6


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "pissa"])
def test_diffusers_reads_every_type_that_is_written_for_it(kind: str, tmp_path: Path) -> None:
    wrapped = stirred(attached(kind, base(model="dev"), targets="all_linear", rank_pattern={"image_stream": 2}))
    adapters.save(wrapped, tmp_path, base="small")
    reference = helpers.transformers("dev")[1]
    reference.load_lora_adapter(load_file(tmp_path / DIFFUSERS_FILE))
    ours = predict(wrapped)
    assert helpers.relative_error(predict(reference), ours) <= 1e-5
    assert helpers.relative_error(predict(base(model="dev")), ours) > 0.05


@pytest.mark.parametrize("kind", ["loha", "lokr", "oft"])
def test_no_file_is_written_that_others_would_read_wrongly_and_none_of_an_earlier_adapter_stays(
    kind: str, tmp_path: Path
) -> None:
    adapters.save(attached("pissa", base()), tmp_path, base="small")
    assert {DIFFUSERS_FILE, PISSA_FILE} <= {file.name for file in tmp_path.iterdir()}
    assert format_notes(tmp_path) == ""
    wrapped = attached(kind, base())
    adapters.save(wrapped, tmp_path, base="small")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["README.md", "adapter_config.json", PEFT_FILE]
    note = format_notes(tmp_path)
    assert re.search(r"flux2\.generate.*python -m flux2\.export", note)
    assert ("unchanged for ComfyUI" in note, "nearly equal" in note) == (kind != "oft", kind != "lokr")
    assert ("musubi-tuner" in note) == (kind != "oft")
    assert "diffusers" not in (tmp_path / "README.md").read_text()
    with pytest.raises(AdapterError, match=rf"(double|single)_blocks.*{NAMES[kind]}"):
        layer_pairs(wrapped.get_base_model())


def test_a_dora_is_no_pair_for_comfyui_and_kohya_and_its_diffusers_file_loads_here(tmp_path: Path) -> None:
    wrapped = stirred(attached("dora", base(), targets="all_linear"))
    for form in (to_comfyui, to_kohya):
        with pytest.raises(AdapterError, match=r"img_in\b.*DoRA"):
            form(layer_pairs(wrapped.get_base_model()))
    adapters.save(wrapped, tmp_path, base="small")
    model = base()
    assert adapters.load(model, tmp_path / DIFFUSERS_FILE).kind == "DoRA"
    assert helpers.relative_error(predict(model), predict(wrapped)) <= 1e-6
    assert re.search(r"diffusers.*python -m flux2\.export .*comfyui.*unchanged for ComfyUI", format_notes(tmp_path))


@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "pissa", "loha", "lokr"])
def test_ranks_and_alphas_of_layers_are_kept_in_every_form(kind: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "rank_pattern": {r"single_blocks\.1\.linear1": 2, "double_attention": 7},
        "alpha_pattern": {r"single_blocks\.[12]\..*": 3.0},
    }
    wrapped = stirred(attached(kind, base(model="dev"), **options))
    layers: dict[str, Any] = dict(wrapped.get_base_model().named_modules())
    power = 0.5 if kind == "rslora" else 1
    for name, rank, alpha in (
        ("single_blocks.1.linear1", 2, 3),
        ("single_blocks.1.linear2", 4, 3),
        ("single_blocks.0.linear1", 4, 8),
        ("double_blocks.1.txt_attn.proj", 7, 8),
        ("double_blocks.1.txt_mlp.0", 4, 8),
    ):
        assert (layers[name].r["default"], layers[name].scaling["default"]) == (
            rank,
            pytest.approx(alpha / rank**power),
        )
    adapters.save(wrapped, tmp_path, base="small")
    places = [tmp_path]
    if kind in ("lora", "rslora", "pissa"):
        save_file(to_comfyui(layer_pairs(wrapped.get_base_model())), tmp_path / "comfyui.safetensors")
        places += [tmp_path / DIFFUSERS_FILE, tmp_path / "comfyui.safetensors"]
    wanted = predict(wrapped)
    for place in places:
        model = base(model="dev")
        report = adapters.load(model, place)
        assert helpers.relative_error(predict(model), wanted) <= 1e-6, place
        assert (min(report.ranks), max(report.ranks)) == ((4, 14) if kind == "pissa" else (2, 7))


def test_an_alpha_that_is_not_given_is_the_rank_of_each_layer() -> None:
    wrapped = attach(base(), rank=4, rank_pattern={"double_mlp": 9})
    found = {module.scaling["default"] for module in wrapped.modules() if isinstance(module, FusedLora)}
    assert found == {1.0}


# ------------------------------------------------------------------ several, scales, merging


@pytest.mark.parametrize("kind", ["lora", "pissa", "loha", "lokr"])
def test_several_of_a_type_add_up_each_at_its_scale(kind: str, tmp_path: Path) -> None:
    for i in (1, 2):
        adapters.save(stirred(attached(kind, base(), seed=i), seed=i), tmp_path / str(i), base="small")
    model = base()
    adapters.load(model, tmp_path / "1", name="one", scale=0.5)
    adapters.load(model, tmp_path / "2", name="two", scale=-0.25)
    both = base()
    weights = {name: tensor.clone() for name, tensor in both.state_dict().items()}
    for i, scale in ((1, 0.5), (2, -0.25)):
        alone = base()
        adapters.load(alone, tmp_path / str(i))
        adapters.merge(alone)
        for name, tensor in alone.state_dict().items():
            both.state_dict()[name].add_(tensor - weights[name], alpha=scale)
    assert helpers.relative_error(predict(model), predict(both)) <= 1e-5
    with adapters.adapters_disabled(model):
        assert torch.equal(predict(model), predict(base()))
    adapters.merge(model)
    assert helpers.relative_error(predict(model), predict(both)) <= 1e-5


@pytest.mark.parametrize("scale", [0.0, 0.4, 1.0])
def test_a_dora_at_a_scale_is_that_part_of_its_whole_change(scale: float, tmp_path: Path) -> None:
    adapters.save(stirred(attached("dora", base())), tmp_path, base="small")
    model, whole, part = base(), base(), base()
    adapters.load(model, tmp_path, scale=scale)
    adapters.load(whole, tmp_path)
    adapters.merge(whole)
    for name, tensor in whole.state_dict().items():
        part.state_dict()[name].lerp_(tensor, scale)
    assert helpers.relative_error(predict(model), predict(part)) <= 1e-5
    adapters.merge(model)
    assert helpers.relative_error(predict(model), predict(part)) <= 1e-5


@pytest.mark.parametrize(("first", "second"), [("lora", "dora"), ("dora", "dora"), ("oft", "oft"), ("loha", "lora")])
def test_types_that_do_not_add_up_are_refused_and_the_first_stays(first: str, second: str, tmp_path: Path) -> None:
    adapters.save(stirred(attached(first, base())), tmp_path / "first", base="small")
    adapters.save(stirred(attached(second, base())), tmp_path / "second", base="small")
    model = base()
    adapters.load(model, tmp_path / "first", name="one")
    before = predict(model)
    with pytest.raises(AdapterError, match=rf"second: .*{NAMES[second]}.*{NAMES[first]}"):
        adapters.load(model, tmp_path / "second", name="two")
    assert torch.equal(predict(model), before)


def test_an_oft_has_no_scale(tmp_path: Path) -> None:
    adapters.save(stirred(attached("oft", base())), tmp_path, base="small")
    model = base()
    with pytest.raises(AdapterError, match=r"scale=0\.5.*OFT"):
        adapters.load(model, tmp_path, scale=0.5)
    assert torch.equal(predict(model), predict(base()))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@SAME_EVERYWHERE
def test_a_merged_adapter_is_the_same_model_in_plain_layers(kind: str, precision: str) -> None:
    wrapped = stirred(attached(kind, base(precision)))
    wanted = predict(wrapped)
    adapters.merge(wrapped)
    model = wrapped.get_base_model()
    assert model.state_dict().keys() == base().state_dict().keys()
    # in bfloat16 the weights are rounded, once: 0.2 % each
    assert helpers.relative_error(predict(model), wanted) <= (1e-6 if precision == "fp32" else 0.01)


@pytest.mark.parametrize("precision", ["fp8", "int8", "nf4"])
@EACH_TYPE
def test_merging_into_a_quantized_base_is_refused(kind: str, precision: str) -> None:
    wrapped = stirred(attached(kind, base(precision)))
    before = predict(wrapped)
    with pytest.raises(AdapterError, match=r"double_blocks.*precision=bf16"):
        adapters.merge(wrapped)
    assert torch.equal(predict(wrapped), before)
