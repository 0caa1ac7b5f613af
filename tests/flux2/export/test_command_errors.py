"""python -m flux2.export: whatever is wrong is one line and leaves no unfinished file."""

import argparse
import os
import re
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from flux2.adapters.files import DIFFUSERS_FILE
from flux2.adapters.formats import to_comfyui
from flux2.export import command as export
from flux2.export import merge_checkpoint
from flux2.weights import streaming_writer


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
        (["{lora}:1e300", "--format", "kohya"], r"double_blocks_0\S* .*infinite.*smaller scale"),
        (["{loha}:1e300", "--format", "comfyui"], r"double_blocks\.0\.\S* .*infinite.*smaller scale"),
        (["{loha}:1e300", "--format", "diffusers"], r"double_blocks\.0\.\S* .*infinite.*smaller scale"),
        (["{lora}:0.5,single=0", "--format", "kohya"], r":0\.5,single=0: ranges are not exported.*ADAPTER\[:SCALE\]"),
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
    places: dict[str, Any] = {kind: saved(kind) for kind in ("lora", "dora", "loha", "oft")}
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


@pytest.fixture(
    params=[("kohya", "o/out.safetensors"), ("full-bfl", "o/out.safetensors"), ("full-diffusers", "o/out")],
    ids="-".join,
)
def asked(request: pytest.FixtureRequest, saved: Callable[..., Path]) -> tuple[Path | str, ...]:
    """The arguments of an export: of a LoRA, and of a full checkpoint in one file and in a folder."""
    form, out = request.param
    return (saved("lora"), "--format", form, "--out", out)


def contents(folder: Path) -> dict[Path, bytes]:
    """The files in a folder and below it."""
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_disk_without_room_is_told_before_anything_is_written(
    asked: tuple[Path | str, ...],
    command: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usage = argparse.Namespace(free=streaming_writer.SPARE + 1000)
    monkeypatch.setattr(streaming_writer.shutil, "disk_usage", lambda place: usage)
    assert command(*asked) == 2
    assert re.search(r"error: --out \S+.* \d\.\d MB.* 67\.1 MB", capsys.readouterr().err)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_what_ends_in_the_middle_leaves_out_as_it_was(
    fault: Any,
    asked: tuple[Path | str, ...],
    command: Callable[..., int],
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
    with monkeypatch.context() as patch:
        patch.setattr(streaming_writer.SafetensorsFile, "write", write)
        patch.setattr(export, "load_file", fail)
        assert command(*asked) == (130 if fault is KeyboardInterrupt else 2)
        assert not contents(tmp_path), "nothing is left"
        assert command(*asked) != 0
    assert command(*asked) == 0
    before = contents(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(streaming_writer.SafetensorsFile, "write", write)
        patch.setattr(export, "load_file", fail)
        assert command(f"{asked[0]}:0.5", *asked[1:], "--overwrite") != 0
    assert contents(tmp_path) == before
    assert command(f"{asked[0]}:0.5", *asked[1:], "--overwrite") == 0
    assert contents(tmp_path) != before
    assert "Traceback" not in capsys.readouterr().err


def test_a_disk_that_fills_is_one_error_that_names_out(
    asked: tuple[Path | str, ...],
    command: Callable[..., int],
    model_folders: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Where the room was there at first; safetensors and Python each have an error of their own for it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    model_folders("dev")  # is made when it is first asked for
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
        assert command(*asked) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert re.search(r"error: --out \S+.*File too large", capsys.readouterr().err)
    assert not [file for file in tmp_path.rglob("*") if file.is_file() or ".part" in file.name]


def test_being_terminated_leaves_no_unfinished_file(
    asked: tuple[Path | str, ...],
    command: Callable[..., int],
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
        assert command(*asked) == 128 + signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, before)
    assert there
    assert not [file for file in tmp_path.rglob("*") if file.is_file() or ".part" in file.name]


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


def test_a_file_that_does_not_hold_what_was_written_is_not_kept(
    asked: tuple[Path | str, ...],
    command: Callable[..., int],
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
    assert command(*asked) == 2
    assert re.search(r"error: .*(_blocks\.|final_layer\.)", capsys.readouterr().err)
    assert not contents(tmp_path)


def test_a_form_that_is_wrong_is_caught_by_the_comparison(
    command: Callable[..., int], saved: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(pairs: Any) -> dict[str, Tensor]:
        state = to_comfyui(pairs)
        return {key: tensor.flip(0) if "lora_B" in key and "qkv" in key else tensor for key, tensor in state.items()}

    monkeypatch.setitem(export.FORMS, "comfyui", wrong)
    assert command(saved("lora"), "--format", "comfyui", "--out", "out.safetensors") == 2
    assert not (tmp_path / "out.safetensors").exists()
