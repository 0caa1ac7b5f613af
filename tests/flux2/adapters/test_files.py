"""flux2.adapters.files: adapters are saved whole, restored and found, and files that do not fit are refused."""

import json
import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import helpers
import peft
import pytest
import torch
from adapter_helpers import fresh, predict, trained
from safetensors import safe_open
from safetensors.torch import save_file

from flux2 import adapters
from flux2.adapters import files as adapter_files
from flux2.adapters.formats import AdapterError

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
    hashes = {metadata.pop(f"{program}.hash_sha256") for program in ("modelspec", "flux2_lora")}
    assert len(hashes) == 1
    assert hashes.pop().startswith("0x")
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

    monkeypatch.setattr(adapter_files, "write_safetensors", fail)
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


def test_checkpoints_are_ordered_by_their_steps_and_no_other_folder_is_one(tmp_path: Path) -> None:
    for place in ("step_1000000", "step_999750", "step_9999999_old", "step_"):
        adapters.save(trained()[0], tmp_path / "checkpoints" / place / "adapter", base="small")
    assert adapters.find(tmp_path) == tmp_path / "checkpoints/step_1000000/adapter"


def test_an_unfinished_run_gives_what_it_wrote_last(tmp_path: Path) -> None:
    """The adapter of a run that is made longer is that of its earlier end."""
    places = [tmp_path / place for place in ("checkpoints/step_000001/adapter", "adapter")]
    places.append(tmp_path / "checkpoints/step_000004/adapter")
    for second, place in enumerate(places):
        adapters.save(trained()[0], place, base="small")
        os.utime(place / "adapter_model.safetensors", (second, second))
    assert adapters.find(tmp_path) == tmp_path / "adapter"
    (tmp_path / ".unfinished").touch()
    assert adapters.find(tmp_path) == places[2]
    os.utime(tmp_path / "adapter/adapter_model.safetensors", (9, 9))  # stopped between the adapter and the report
    assert adapters.find(tmp_path) == tmp_path / "adapter"
    (tmp_path / "adapter/adapter_model.safetensors").unlink()
    os.utime(places[0] / "adapter_model.safetensors", (99, 99))  # of a copy: steps count, not times
    assert adapters.find(tmp_path) == places[2]


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
        ({"peft_type": "LOHA", "alpha": 8}, r"does not know \(init_lora_weights\)"),
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
