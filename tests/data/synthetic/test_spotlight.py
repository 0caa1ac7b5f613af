"""The pairs of the edit demonstration: the files are what the script draws, and leave out what the demo measures."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.demo_edit.draw import main
from data.sources import Folder
from data.synthetic.drawings import COLORS, SHAPES, draw, held_out
from data.synthetic.spotlight import COOL, INSTRUCTION, PAIRS, SHOWN, WARM, new_drawings, pairs, spotlight
from data.synthetic.tarot import CARDS

FOLDER = Path(__file__).resolve().parents[3] / "data" / "demo_edit"
ROWS = [json.loads(line) for line in (FOLDER / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]


def pixels(file):
    return np.asarray(Image.open(file))


def new_images(folder):
    return folder.with_name("demo_edit_new")


def files(folder):
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.suffix in (".png", ".jsonl"))


def test_the_script_redraws_the_files_in_the_repository(tmp_path):
    redrawn = tmp_path / "demo_edit"
    redrawn.mkdir()
    main(redrawn)
    assert (redrawn / "metadata.jsonl").read_bytes() == (FOLDER / "metadata.jsonl").read_bytes()
    for here, there, count in ((redrawn, FOLDER, 2 * PAIRS + 1), (new_images(redrawn), new_images(FOLDER), len(SHOWN))):
        assert files(here) == files(there)
        assert len(files(there)) == count
        for name in files(there):
            # Pixels and not bytes: another zlib may compress differently.
            assert name.endswith(".png") or name == "metadata.jsonl"
            if name.endswith(".png"):
                assert pixels(here / name).shape == (128, 128, 3)
                assert (pixels(here / name) == pixels(there / name)).all(), name


def test_a_pair_is_a_picture_and_the_same_picture_in_the_spotlight():
    samples = Folder(FOLDER, reference_columns=["references"])
    assert len(samples) == len(ROWS) == PAIRS
    for sample in samples:
        (reference,) = sample.references
        assert Path(reference.name).name == Path(sample.target.name).name
        assert spotlight(reference.load()).tobytes() == sample.target.load().tobytes()
        assert sample.captions == (INSTRUCTION,)


def test_no_combination_is_in_the_embedded_models_training_and_no_two_pairs_show_the_same():
    drawings = [drawing for drawing, _ in pairs()]
    assert all(held_out(drawing) for drawing in drawings + new_drawings())
    assert len({(drawing.shape, drawing.color, drawing.background) for drawing in drawings}) == PAIRS
    assert sum(drawing.size == "small" for drawing in drawings) == PAIRS / 2


def test_the_subjects_and_colors_that_are_measured_are_in_no_pair():
    shown, new = [drawing for drawing, _ in pairs()], new_drawings()
    assert {drawing.shape for drawing in shown} == set(CARDS)
    assert {drawing.shape for drawing in new} == set(SHAPES) - set(CARDS)
    assert not {drawing.color for drawing in shown} & {drawing.color for drawing in new}
    assert {drawing.color for drawing in shown + new} == set(COLORS)
    assert len(new) == len(set(new)) >= 30
    assert set(SHOWN) <= set(new)


def test_the_light_is_warm_in_the_middle_and_cool_around_it():
    white = Image.new("RGB", (128, 128), "white")
    lit = np.asarray(spotlight(white)).astype(int)
    assert tuple(lit[64, 64]) == tuple(round(255 * value) for value in WARM)
    assert tuple(lit[0, 0]) == tuple(lit[64, 0]) == tuple(round(255 * value) for value in COOL)
    in_the_disc = (lit == lit[64, 64]).all(-1).mean()
    assert in_the_disc == pytest.approx(np.pi * 0.40**2, abs=0.02)
    half = draw(SHOWN[0], 64)
    assert spotlight(half).size == (64, 64)
    with pytest.raises(ValueError, match="64 x 32"):
        spotlight(half.crop((0, 0, 64, 32)))


def test_files_are_small():
    assert sum(file.stat().st_size for file in FOLDER.rglob("*.png")) < 500_000
