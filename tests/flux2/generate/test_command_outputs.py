"""python -m flux2.generate: what exists is not replaced, and the files that it reads and writes do not get mixed up."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from adapter_helpers import write_adapter
from generate_helpers import repeat
from PIL import Image

from flux2.generate import command as generate
from flux2.generate import metadata

LINES = '{"prompt": "a"}\n{"prompt": "b", "images": ["%s"]}'


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--image", "room.png", "--out", "room.png"], "room.png"),
        (["--image", "./room.png", "--out", "sub/../room.png"], "sub/../room.png"),
        (["--from-image", "out.png", "--seed", "9"], "out.png"),
        ([], "out.png"),
        (["--count", "3", "--out", "shot.png"], "shot_001.png"),
        (["--prompts", "many.jsonl"], "out_000.png"),
        (["--out", "link.png"], "link.png"),
        (["--save-embeddings", "two.safetensors"], "two.safetensors"),
    ],
)
def test_a_file_that_exists_is_not_replaced(
    arguments: list[str],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generate, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    record = metadata.Record("tiny", "a cup", 0, 32, 32, 2, 1.0, "fp32")
    Path("sub").mkdir()
    for name in ("room.png", "out.png", "shot_001.png", "out_000.png"):
        Image.new("RGB", (32, 32), "red").save(name, pnginfo=record.chunk())
    Path("link.png").symlink_to("gone.png")
    Path("two.safetensors").write_text("kept")
    Path("many.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    before = contents(tmp_path)
    prompt = [] if {"--from-image", "--prompts"} & set(arguments) else ["--prompt", "a cup"]
    assert repeat(*prompt, *arguments) == 2
    error = capsys.readouterr().err
    assert re.search(rf"error: --(out|save-embeddings) {re.escape(named)} exists.*--overwrite", error), error
    assert contents(tmp_path) == before


def test_overwrite_replaces_the_reference_that_was_read(command: Callable[..., int], tmp_path: Path) -> None:
    Image.new("RGB", (32, 32), "red").save(tmp_path / "room.png")
    assert command("--image", "room.png", "--out", "new.png") == 0
    assert command("--image", "room.png", "--out", "room.png", "--overwrite") == 0
    assert (tmp_path / "room.png").read_bytes() == (tmp_path / "new.png").read_bytes()


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_appears_while_an_image_is_generated_is_kept(
    links: bool,
    command: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two commands with the same --out, of which each found the name free."""
    if not links:
        monkeypatch.setattr(Path, "hardlink_to", lambda *_: (_ for _ in ()).throw(PermissionError("no hard links")))
    load = generate.load

    def load_and_write(*arguments: object, **settings: object) -> object:
        (tmp_path / "out.png").write_text("of another process")
        (tmp_path / "out_1.png").write_text("of a third")
        return load(*arguments, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(generate, "load", load_and_write)
    assert command() == 0
    printed = capsys.readouterr()
    assert printed.out.split() == ["out_2.png"]
    assert "out_2.png" in printed.err.replace("out_2.png: 2 steps", "")
    assert (tmp_path / "out.png").read_text() == "of another process"
    assert (tmp_path / "out_1.png").read_text() == "of a third"
    assert metadata.read(tmp_path / "out_2.png", "out").prompt == "a cup"
    assert sorted(os.listdir(tmp_path)) == ["out.png", "out_1.png", "out_2.png"]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (LINES % "out_000.png", r"line 2\b.*out_000\.png, which line 1 writes"),
        (LINES % "sub/../out_000.png", r"line 2\b.*out_000\.png, which line 1 writes"),
        ('{"prompt": "a", "out": "x.png"}\n{"prompt": "b", "out": "sub/../x.png"}', r"line 2\b.*line 1 writes.* too"),
        ('{"prompt": "a", "out": "link/x.png"}\n{"prompt": "b", "out": "sub/x.png"}', r"line 2\b.*line 1 writes.* too"),
    ],
)
def test_a_line_neither_reads_nor_writes_what_an_earlier_one_writes(
    lines: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(generate, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    Path("sub").mkdir()
    Path("link").symlink_to("sub")
    Image.new("RGB", (32, 32), "red").save("out_000.png")  # of an earlier command
    Path("many.jsonl").write_text(lines)
    assert repeat("--prompts", "many.jsonl", "--overwrite") == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_changed_configuration_of_an_adapter_is_named(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_adapter(tmp_path / "lora")
    config = tmp_path / "lora" / "adapter_config.json"
    assert command("--adapter", "lora", "--out", "one.png") == 0
    assert repeat("--from-image", "one.png", "--out", "two.png") == 0
    values = json.loads(config.read_text())
    config.write_text(json.dumps(values | {"lora_alpha": values["lora_alpha"] * 10}))
    for place in ("lora", "lora/adapter_model.safetensors"):
        given = [] if place == "lora" else ["--adapter", place]
        assert repeat("--from-image", "one.png", "--out", "three.png", *given) == (0 if given else 2)
    assert re.search(r"one\.png.*\blora\b.*adapter_config\.json.*--adapter", capsys.readouterr().err)
    record = metadata.read(tmp_path / "one.png", "one.png")
    (adapter,) = record.adapters
    old = metadata.NamedFile(adapter.path, adapter.sha256)  # as an older version recorded it
    metadata.check_unchanged(metadata.Record("tiny", "a", 0, 32, 32, 2, 1.0, "fp32", adapters=[old]), "one.png")


def test_a_tilde_is_the_home_folder_in_every_path(
    command: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    Image.new("RGB", (32, 32), "red").save(home / "room.png")
    (home / "many.jsonl").write_text(json.dumps({"prompt": "at night", "images": ["~/room.png"], "out": "~/night.png"}))
    sizes = ("--path", command.path, "--width", "32", "--height", "32", "--steps", "1")  # type: ignore[attr-defined]
    assert repeat("--prompts=~/many.jsonl", *sizes) == 0
    assert capsys.readouterr().out.split() == [str(home / "night.png")]
    assert repeat("--from-image=~/night.png", "--image=~/room.png", "--out=~/again.png") == 0
    assert command("--save-embeddings=~/two.safetensors") == 0
    assert command("--embeddings=~/two.safetensors", "--out=~unknown_user.png") == 0
    assert {file.name for file in home.iterdir()} == {
        "room.png",
        "many.jsonl",
        "night.png",
        "again.png",
        "two.safetensors",
    }
    assert (tmp_path / "~unknown_user.png").is_file()
