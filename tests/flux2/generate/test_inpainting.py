"""python -m flux2.generate --mask, --strength: the pipeline's image, again from what it says, and lines of a file."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from generate_helpers import repeat
from PIL import Image

import flux2
from flux2.generate import metadata


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image, dtype=int)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """An image of 50 x 34 pixels, and a mask of 10 x 12 pixels in its right half."""
    levels = np.random.default_rng(0).integers(0, 256, (34, 50, 3), dtype=np.uint8)
    Image.fromarray(levels).save(tmp_path / "room.png")
    mask = Image.new("L", (50, 34))
    mask.paste(255, (30, 10, 40, 22))
    mask.save(tmp_path / "m.png")
    return tmp_path


def test_the_command_repaints_as_the_pipeline_does_and_makes_the_image_again(
    command: Callable[..., int], files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--path", command.path, "--image", "room.png", "--mask", "m.png", "--steps", "5")  # type: ignore[attr-defined]
    assert repeat("--prompt", "a cup", *arguments, "--mask-crop", "2") == 0
    assert "4 steps" in capsys.readouterr().err, "0.8 of 5"
    pipe = flux2.load("tiny", command.path, device="cpu")  # type: ignore[attr-defined]
    with Image.open(files / "room.png") as room, Image.open(files / "m.png") as mask:
        (wanted,) = pipe.generate("a cup", references=[room], mask=mask, mask_crop=2, steps=5)
    assert (pixels(files / "out.png") == np.asarray(wanted)).all()
    same = (pixels(files / "out.png") == pixels(files / "room.png")).all(-1)
    assert same[:, :30].all()
    assert not same[10:22, 30:40].all()
    record = metadata.read(files / "out.png", "out.png")
    assert (record.width, record.height, record.strength, record.mask_crop) == (48, 32, 0.8, 2)
    assert record.mask is not None
    assert record.mask.path == "m.png"
    assert repeat("--from-image", "out.png", "--out", "again.png") == 0
    assert (files / "again.png").read_bytes() == (files / "out.png").read_bytes()
    for i, changed in enumerate((["--strength", "0.4"], ["--mask-crop", "9"], ["--seed", "1"])):
        assert repeat("--from-image", "out.png", "--out", f"{i}.png", *changed) == 0
        assert np.abs(pixels(files / f"{i}.png") - pixels(files / "out.png")).max() > 3, changed
    Image.new("L", (50, 34), 255).save(files / "m.png")
    assert repeat("--from-image", "out.png", "--out", "changed.png") == 2
    assert re.search(r"the mask m\.png has changed.*--mask", capsys.readouterr().err)
    assert repeat("--from-image", "out.png", "--out", "changed.png", "--mask", "m.png") == 0


def test_lines_of_a_file_have_masks_and_strengths(command: Callable[..., int], files: Path) -> None:
    lines = [
        {"prompt": "a cup", "images": ["room.png"], "mask": "m.png", "mask_crop": 3, "out": "masked.png"},
        {"prompt": "a cup", "images": ["room.png"], "strength": 0.5, "out": "half.png"},
        {"prompt": "a cup", "images": ["room.png"], "out": "whole.png"},
    ]
    (files / "many.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert repeat("--path", command.path, "--steps", "4", "--prompts", "many.jsonl") == 0  # type: ignore[attr-defined]
    records = [metadata.read(files / name, name) for name in ("masked.png", "half.png", "whole.png")]
    assert [(one.strength, one.mask_crop) for one in records] == [(0.8, 3), (0.5, None), (None, None)]
    assert np.abs(pixels(files / "half.png") - pixels(files / "whole.png")).max() > 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mask", "m.png"], r"mask needs the image"),
        (["--image", "m.png", "--strength", "2"], r"strength=2\.0 must be above 0"),
        (["--image", "m.png", "--mask-crop", "2"], r"mask_crop=2 has no effect"),
        (["--image", "room.png", "--mask", "gone.png"], r"--mask gone\.png does not exist"),
        (["--image", "small.png", "--mask", "m.png"], r"mask has 50 x 34 pixels and its image 32 x 32"),
        (["--mask", "m.png", "--save-embeddings", "e.safetensors"], r"mask needs|--mask has no effect"),
    ],
)
def test_what_cannot_be_repainted_is_one_line_before_the_model_is_loaded(
    arguments: list[str],
    message: str,
    command: Callable[..., int],
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("flux2.generate.command.load", lambda *_, **__: pytest.fail("a model was loaded"))
    Image.new("RGB", (32, 32)).save(files / "small.png")
    assert command(*arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line), line


def test_a_mask_that_an_earlier_line_writes_is_named(
    command: Callable[..., int], files: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [{"prompt": "a", "out": "m2.png"}, {"prompt": "a", "images": ["room.png"], "mask": "m2.png"}]
    (files / "many.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert repeat("--path", command.path, "--prompts", "many.jsonl") == 2  # type: ignore[attr-defined]
    assert re.search(r"line 2: mask=m2\.png is what line 1 writes", capsys.readouterr().err)
