"""flux2.adapters.checksums: a bit that flipped in an adapter is found by everything that reads it."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from adapter_helpers import attached, base, stirred
from safetensors.torch import load_file, save_file

from flux2 import adapters
from flux2.adapters.files import DIFFUSERS_FILE, PISSA_FILE
from flux2.adapters.formats import AdapterError
from flux2.adapters.peft_config import PEFT_CONFIG
from flux2.adapters.reading import PEFT_FILE, read_tensors
from flux2.export import deltas
from flux2.weights.modelspec import HASH, OWN_HASH, data_hash
from flux2.weights.streaming_writer import write_safetensors
from train.checkpoints.checkpoint import seal
from train.stages.saved_run import candidates


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`saved("dora")`: a folder in the place of a checkpoint's adapter, not to be changed."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp(kind) / "step_000001" / "adapter"
            adapters.save(stirred(attached(kind, base())), made[kind], base="klein_base_4b")
        return made[kind]

    return folder


@pytest.fixture
def copied(saved: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda kind: Path(shutil.copytree(saved(kind).parent, tmp_path / "step_000001")) / "adapter"


def flip(file: Path, place: int) -> None:
    """Change the lowest bit of a byte; a negative place counts from the end."""
    raw = bytearray(file.read_bytes())
    raw[place] ^= 1
    file.write_bytes(raw)


@pytest.mark.parametrize("place", [-1, -4096])
@pytest.mark.parametrize(
    ("kind", "name"),
    [("lora", PEFT_FILE), ("lora", DIFFUSERS_FILE), ("dora", PEFT_FILE), ("lokr", PEFT_FILE), ("pissa", PEFT_FILE)],
)
def test_a_bit_that_flipped_in_the_tensors_is_an_error(
    kind: str, name: str, place: int, copied: Callable[[str], Path]
) -> None:
    folder = copied(kind)
    given = folder if name == PEFT_FILE else folder / name
    adapters.load(base(), given)
    flip(folder / name, place)
    for read in (lambda: adapters.load(base(), given), lambda: deltas.read(given, base()), lambda: read_tensors(given)):
        with pytest.raises(AdapterError, match=rf"{name}\b.*checksum.*copy"):
            read()


def test_every_file_of_a_pissa_has_a_hash(saved: Callable[[str], Path]) -> None:
    for name in (PEFT_FILE, DIFFUSERS_FILE, PISSA_FILE):
        raw = (saved("pissa") / name).read_bytes()
        about = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])["__metadata__"]
        assert about[HASH] == about[OWN_HASH] == data_hash(saved("pissa") / name), name


def test_a_stale_hash_of_another_program_is_a_warning(
    saved: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state, file = load_file(saved("lora") / DIFFUSERS_FILE), tmp_path / "x.safetensors"
    save_file(state, file)
    right = data_hash(file)
    for text in (right, right.upper(), right[2:], "unknown", ""):
        save_file(state, file, {HASH: text})
        adapters.load(base(), file)
    assert not caplog.records
    save_file(state, file, {HASH: "1" * 64})
    adapters.load(base(), file)
    assert "x.safetensors has other tensors than its modelspec.hash_sha256 says" in caplog.text
    for header in ({OWN_HASH: "1" * 64}, {OWN_HASH: "1" * 64, HASH: right}, {OWN_HASH: right[:-1]}, {OWN_HASH: ""}):
        save_file(state, file, header)
        with pytest.raises(AdapterError, match="changed since"):
            adapters.load(base(), file)
    caplog.clear()
    save_file(state, file, {OWN_HASH: right, HASH: "1" * 64})
    adapters.load(base(), file)
    assert not caplog.records


@pytest.mark.parametrize("name", [PEFT_FILE, PEFT_CONFIG])
def test_a_checkpoints_adapter_is_compared_with_its_state_file(name: str, copied: Callable[[str], Path]) -> None:
    """Of a checkpoint whose files have no checksums of their own, as older versions wrote it."""
    folder = copied("lora")
    save_file(load_file(folder / PEFT_FILE), folder / PEFT_FILE)
    seal(folder.parent, {"step": 1, "images_per_step": 1})
    adapters.load(base(), folder)
    if name == PEFT_FILE:
        flip(folder / name, -1)
    else:
        (folder / name).write_text((folder / name).read_text().replace('"lora_alpha": 8', '"lora_alpha": 9'))
    with pytest.raises(AdapterError, match=rf"{name}\b.*state\.json.*checkpoint"):
        adapters.load(base(), folder)


@pytest.mark.parametrize("content", [b"", b"{}", b'{"files": 3}', b'{"files": {"adapter/x": 3}}', b"[" * 99_999])
def test_a_state_file_of_something_else_is_no_obstacle(content: bytes, copied: Callable[[str], Path]) -> None:
    folder = copied("lora")
    (folder.parent / "state.json").write_bytes(content)
    adapters.load(base(), folder)


def test_a_changed_configuration_is_said(copied: Callable[[str], Path], caplog: pytest.LogCaptureFixture) -> None:
    """It may have been edited on purpose."""
    folder = copied("lora")
    with caplog.at_level(logging.WARNING):
        adapters.load(base(), folder)
        assert not caplog.records
        config = (folder / PEFT_CONFIG).read_text()
        assert '"lora_alpha": 8' in config
        (folder / PEFT_CONFIG).write_text(config.replace('"lora_alpha": 8', '"lora_alpha": 9'))
        adapters.load(base(), folder)
    assert f"{PEFT_CONFIG} was changed since it was saved" in caplog.text


def test_evaluation_names_a_damaged_finished_adapter(saved: Callable[[str], Path], tmp_path: Path) -> None:
    shutil.copytree(saved("lora"), tmp_path / "adapter")
    ((found,), damaged) = candidates(tmp_path)
    assert (found.name, damaged) == ("finished", [])
    flip(tmp_path / "adapter" / PEFT_FILE, -1)
    with pytest.raises(ValueError, match=rf"{PEFT_FILE} was changed since it was saved"):
        candidates(tmp_path)


@pytest.mark.parametrize("kind", ["lora", "dora", "pissa", "loha", "lokr", "oft"])
def test_the_same_adapter_is_the_same_bytes(kind: str, tmp_path: Path) -> None:
    wrapped = stirred(attached(kind, base()))
    for name in ("one", "two", "three"):
        adapters.save(wrapped, tmp_path / name, base="klein_base_4b", license="a license")
    for file in (tmp_path / "one").iterdir():
        for other in ("two", "three"):
            assert file.read_bytes() == (tmp_path / other / file.name).read_bytes(), file.name
    layers = json.loads((tmp_path / "one" / PEFT_CONFIG).read_text())["target_modules"]
    assert layers == sorted(layers), "PEFT writes a set, in another order in each process"


def test_what_is_written_is_what_the_library_reads(tmp_path: Path) -> None:
    state = {
        "b": torch.arange(6).reshape(2, 3),
        "a": torch.tensor(3.0),
        "c.weight": torch.randn(3, 5, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 4),
        "bytes": torch.arange(3, dtype=torch.uint8),
        "transposed": torch.randn(4, 3).T,
    }
    write_safetensors(tmp_path / "x.safetensors", state, {"z": "1", "a": "2"})
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == state.keys()
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize(
    ("content", "remedy"),
    [
        (b"GGUF\3\0\0\0" + bytes(64), "is GGUF.*safetensors"),
        (b"<!DOCTYPE html><html>log in</html>", "web page.*hf download"),
        (b"PK\3\4\x14\0\0\0" + bytes(64), "PyTorch checkpoint.*safetensors"),
        (bytes(64), "cannot be read.*damaged"),
    ],
)
def test_other_files_with_the_name_of_an_adapter_are_named(content: bytes, remedy: str, tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    for read in (lambda: adapters.load(base(), file), lambda: deltas.variant_for([file], None)):
        with pytest.raises(AdapterError, match=rf"x\.safetensors.*{remedy}"):
            read()
