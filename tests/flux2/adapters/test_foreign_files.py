"""flux2.adapters.reading: files of every program, type, strength and dtype add what plain arithmetic says."""

from itertools import product
from pathlib import Path

import helpers
import peft
import pytest
import torch
from adapter_helpers import base, fresh, predict
from foreign_adapters import DIFFUSERS, LINEAR1, MLP, QKV, WRITERS, Writer, change, factors, strengths_of, write
from precision_helpers import dequantized
from safetensors.torch import load_file, save_file
from torch import Tensor

from flux2 import adapters
from flux2.adapters.formats import AdapterError
from flux2.export import deltas

ALWAYS = ("lora", "lokr_whole")  # types whose strengths differ most among programs
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.float8_e4m3fn}


LOKRS = ("LoKr", "split LoKr")  # split if q, k and v are separate
KINDS = {"lora": ("LoRA", "rsLoRA"), "dora": ("DoRA",), "columns": ("column DoRA",), "loha": ("LoHa",)}
KINDS |= dict.fromkeys(("lokr", "lokr_both", "lokr_whole"), LOKRS)


def place_of(writer: Writer, folder: Path) -> Path:
    return folder if writer.file != "lora.safetensors" else folder / writer.file


def cases() -> list[object]:
    """Every program, type, strength and dtype; `make test` runs each pair of the first two, once, and all
    strengths of some types."""
    found: list[object] = []
    for name, writer in WRITERS.items():
        for kind in writer.types:
            strengths = strengths_of(writer, kind)
            often = (strengths[len(found) % len(strengths)], list(DTYPES)[len(found) % 3])
            for strength, dtype in product(strengths, DTYPES):
                marks = () if (strength, dtype) == often or (dtype == "fp32" and kind in ALWAYS) else pytest.mark.slow
                found.append(pytest.param(name, kind, strength, dtype, marks=marks))
    return found


@pytest.mark.parametrize(("name", "kind", "strength", "dtype"), cases())
def test_a_file_adds_what_plain_arithmetic_says(
    name: str, kind: str, strength: str, dtype: str, tmp_path: Path
) -> None:
    writer, base, model = WRITERS[name], fresh(), fresh()
    wanted = write(writer, kind, strength, DTYPES[dtype], tmp_path, base)
    loaded = adapters.load(model, place_of(writer, tmp_path))
    assert len(loaded.layers) == 4
    assert loaded.kind in KINDS[kind]
    unmerged = predict(model)
    adapters.merge(model)
    assert helpers.relative_error(unmerged, predict(model)) <= 1e-5
    exported = deltas.read(place_of(writer, tmp_path), base)
    for layer, weight in base.state_dict().items():
        found = model.state_dict()[layer].double() - weight.double()
        change = wanted.get(layer.removesuffix(".weight"))
        if change is None:
            assert not found.any(), layer
        else:
            assert float((found - change).norm() / change.norm()) <= 1e-5, layer
            assert float(change.norm() / weight.norm()) > 0.02, "the comparison says something"
            found = exported.change(layer.removesuffix(".weight"), weight, torch.device("cpu")).double()
            assert float((found - change).norm() / change.norm()) <= 1e-5, layer


def changes(place: Path, **options: float) -> tuple[dict[str, Tensor], str]:
    """What the adapter at `place` adds to each weight that it changes, and what is said of it."""
    base, model = fresh().state_dict(), fresh()
    loaded = adapters.load(model, place, **options)
    adapters.merge(model)
    found = {name.removesuffix(".weight"): one.double() - base[name] for name, one in model.state_dict().items()}
    return {layer: delta for layer, delta in found.items() if delta.any()}, str(loaded)


def check(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for layer, delta in wanted.items():
        assert float((found[layer] - delta).norm() / delta.norm()) <= 1e-5, layer


def drawn(kind: str, shape: tuple[int, int], rank: int, seed: int) -> dict[str, Tensor]:
    return factors(kind, *shape, rank, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "lokr_whole", "lokr_both"])
@pytest.mark.parametrize("parts", ["q", "v", "qv", "kqv"])
def test_some_of_q_k_and_v_leave_the_others_as_they_are(kind: str, parts: str, tmp_path: Path) -> None:
    ranks = {"q": 2, "k": 3, "v": 2 if kind.startswith("lokr") else 4}
    found = {part: drawn(kind, (48, 48), 2 if kind.startswith("lokr") else ranks[part], ord(part)) for part in parts}
    sides = {"A": "lora_A.weight", "B": "lora_B.weight"}
    state = {}
    for part, tensors in found.items():
        prefix = f"transformer.transformer_blocks.1.attn.to_{part}"
        state |= {f"{prefix}.{sides.get(side, side)}": tensor for side, tensor in tensors.items()}
    save_file(state, tmp_path / "lora.safetensors")
    nothing = torch.zeros(48, 48)
    delta = torch.cat([change(found[part], 1.0, nothing) if part in found else nothing for part in "qkv"])
    check(changes(tmp_path / "lora.safetensors")[0], {QKV: delta})


@pytest.mark.parametrize(
    ("key", "layer", "rows"),
    [
        ("diffusion_model.single_blocks.0.linear1_qkv", LINEAR1, slice(0, 144)),
        ("transformer.transformer_blocks.1.attn.to_qkv", QKV, slice(0, 144)),
        ("transformer.transformer_blocks.1.attn.to_added_qkv", "double_blocks.1.txt_attn.qkv", slice(0, 144)),
        ("diffusion_model.sformer_blocks.0.ff_context.linear_out", MLP, slice(0, 48)),
        ("base_model.model.single_blocks.0.linear1", LINEAR1, slice(0, 432)),
        ("model.diffusion_model.double_blocks.0.txt_mlp.2", MLP, slice(0, 48)),
    ],
)
def test_names_of_fused_and_cut_layers(key: str, layer: str, rows: slice, tmp_path: Path) -> None:
    wanted = torch.zeros_like(fresh().get_parameter(f"{layer}.weight")).double()
    tensors = drawn("lora", tuple(wanted[rows].shape), 2, 1)
    state = {f"{key}.lora_A.weight": tensors["A"], f"{key}.lora_B.weight": tensors["B"]}
    save_file(state | {f"{key}.alpha": torch.tensor(1)}, tmp_path / "lora.safetensors")  # kohya's may be integers
    wanted[rows] = change(tensors, 0.5, wanted[rows])
    check(changes(tmp_path / "lora.safetensors")[0], {layer: wanted})


def test_a_file_of_lokr_and_lora_layers_is_both(tmp_path: Path) -> None:
    """As converters that split q, k and v write it."""
    lokr, lora = drawn("lokr", (48, 144), 2, 1), drawn("lora", (432, 48), 3, 2)
    state = {f"diffusion_model.{MLP}.{side}": tensor for side, tensor in lokr.items()}
    state |= {f"diffusion_model.{LINEAR1}.lora_{side}.weight": tensor for side, tensor in lora.items()}
    save_file(state, tmp_path / "lora.safetensors")
    found, said = changes(tmp_path / "lora.safetensors", scale=0.5)
    nothing = torch.zeros(1)
    check(found, {MLP: 0.5 * change(lokr, 1.0, nothing), LINEAR1: 0.5 * change(lora, 1.0, nothing)})
    assert said.startswith("LoKr of ranks 2 to 3 on 2 layers")


def test_a_peft_file_without_its_configuration_is_read_as_alpha_equal_rank_and_says_so(tmp_path: Path) -> None:
    tensors = drawn("lora", (432, 48), 2, 1)
    state = {f"base_model.model.{LINEAR1}.lora_{side}.weight": tensor for side, tensor in tensors.items()}
    save_file(state, tmp_path / "tarot.safetensors")
    found, said = changes(tmp_path / "tarot.safetensors")
    check(found, {LINEAR1: change(tensors, 1.0, torch.zeros(1))})
    assert "adapter_config.json" in said
    assert "adapter_config.json" in deltas.read(tmp_path / "tarot.safetensors", fresh()).description()
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 16}')
    found, said = changes(tmp_path / "tarot.safetensors")
    check(found, {LINEAR1: change(tensors, 8.0, torch.zeros(1))})
    assert "adapter_config.json" not in said


def test_a_bias_of_b_is_added_as_diffusers_adds_it_and_not_merged_or_exported(tmp_path: Path) -> None:
    reference = helpers.transformers("dev")[1]
    targets = [name for layer in (QKV, MLP) for name in DIFFUSERS[layer]]
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, lora_alpha=6, lora_bias=True, target_modules=targets), reference)
    generator = torch.Generator().manual_seed(1)
    for key, parameter in reference.named_parameters():
        if "lora_" in key:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    state = {f"transformer.{key}": value for key, value in peft.get_peft_model_state_dict(reference).items()}
    assert sum(key.endswith("lora_B.bias") for key in state) == 4
    header = {
        "lora_adapter_metadata": '{"transformer.r": 2, "transformer.lora_alpha": 6, "transformer.lora_bias": true}'
    }
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "lora.safetensors", header)
    model = fresh()
    adapters.load(model, tmp_path / "lora.safetensors")
    assert helpers.relative_error(predict(model), predict(reference)) <= 1e-5
    without = {key: value for key, value in load_file(tmp_path / "lora.safetensors").items() if "bias" not in key}
    save_file(without, tmp_path / "without.safetensors", header)
    other = fresh()
    adapters.load(other, tmp_path / "without.safetensors")
    assert helpers.relative_error(predict(other), predict(reference)) > 0.001
    with pytest.raises(AdapterError, match="has a bias"):
        adapters.merge(model)
    with pytest.raises(AdapterError, match=r"bias to .*img_attn\.qkv"):
        deltas.read(tmp_path / "lora.safetensors", fresh())


@pytest.mark.parametrize("kind", ["lora", "dora", "columns", "loha", "lokr"])
def test_the_scale_that_is_asked_for_multiplies_the_whole_change(kind: str, tmp_path: Path) -> None:
    writer = WRITERS["OneTrainer"]
    wanted = write(writer, kind, "number", torch.float32, tmp_path, fresh())
    model = fresh()
    adapters.load(model, tmp_path / writer.file, scale=-0.5)
    unmerged = predict(model)
    adapters.merge(model)
    assert helpers.relative_error(unmerged, predict(model)) <= 1e-5
    base = fresh()
    for layer, delta in wanted.items():
        found = model.get_parameter(f"{layer}.weight").double() - base.get_parameter(f"{layer}.weight")
        assert float((found + 0.5 * delta).norm() / delta.norm()) <= 1e-5, layer


@pytest.mark.parametrize("kind", ["columns", "lokr"])
def test_types_that_peft_does_not_have_compute_on_a_quantized_base(kind: str, tmp_path: Path) -> None:
    writer, model, plain = WRITERS["OneTrainer"], base("nf4", "dev"), dequantized(base("nf4", "dev"))
    write(writer, kind, "number", torch.float32, tmp_path, plain)
    before = predict(plain, autocast=True)
    for one in (model, plain):
        adapters.load(one, tmp_path / writer.file)
    assert helpers.relative_error(predict(model, autocast=True), predict(plain, autocast=True)) <= 0.02
    assert helpers.relative_error(before, predict(plain, autocast=True)) > 0.2
