"""The images of report.html, and what was measured on them.

Images before and after are a slider over two of them, and a row of thumbnails that chooses the second. Each image is in
the page once; without JavaScript only the row is shown. The handle is an `<input type=range>`, which keys and screen
readers know; templates/slider.js follows the pointer itself, because browsers differ in whether a range moves when a
pointer touches it outside of its knob.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup
from PIL import Image

from flux2.adapters.files import PEFT_FILE
from flux2.utils.json_files import read_json
from train.checkpoints.checkpoint import checksum
from train.evaluation.distances import Nearest
from train.evaluation.results import BASE, Evaluation, Row, row_name
from train.reports.html import Table, number
from train.utils.files import make_writable, read_image, write_whole
from train.utils.redact import masked_text
from train.validation.sample_grid import sample_grids, split_grid, split_references

MAX_GRIDS = 12
PAIRS, PAIRS_FILE = "before_after", "pictures.json"
MOST_BYTES, MOST_PAIRS = 1 << 20, 1000  # of the file, which may come from someone else

Pair = tuple[str, Image.Image, Image.Image]  # label, image before training, image after it


@dataclass(frozen=True)
class LinkedImage:
    """An image that a page loads from an address, instead of one that it contains."""

    address: str
    width: int
    height: int


Shown = Image.Image | LinkedImage | None  # None: it could not be computed


@dataclass(frozen=True)
class Shot:
    """The image of one row, such as `base` or `step 400`. `first`: shown at first."""

    name: str
    image: Shown
    first: bool = False


@dataclass(frozen=True)
class Cell:
    """The images of one prompt and seed, the base's first, then one for each checkpoint; `label` is the caption."""

    label: str
    shots: Sequence[Shot]


def image_width(cells: Sequence[Cell]) -> int:
    """Return the widest an image may be, in pixels, so that the page stays below some ten MB."""
    return 640 if sum(len(cell.shots) for cell in cells) <= 80 else 400


def grid_images(step: int, file: Path) -> Sequence[tuple[str, Shown]]:
    """Return the prompts and images of a sample grid; none if it cannot be read."""
    grid = read_image(file)
    return [] if grid is None else split_grid(grid)


def training_cells(
    folder: Path, images_of: Callable[[int, Path], Sequence[tuple[str, Shown]]] = grid_images
) -> list[Cell]:
    """Return a cell for each prompt of a run's newest sample grid, with the images of at most `MAX_GRIDS` steps.

    An older grid takes part if it has the same prompt at the same place: a resumed run may have other prompts.
    `images_of` returns the prompts and images of the grid of a step.
    """
    files = list(sample_grids(folder).items())
    if len(files) > MAX_GRIDS:  # the first and the last among them
        files = [files[round(i * (len(files) - 1) / (MAX_GRIDS - 1))] for i in range(MAX_GRIDS)]
    grids = [(row_name(step), file, images_of(step, file)) for step, file in files]
    parts = [(name, file, found) for name, file, found in grids if found]
    newest = read_image(parts[-1][1]) if parts else None
    edited, cells = split_references(newest) if newest is not None else [], []
    for i, (prompt, _) in enumerate(parts[-1][2] if parts else []):
        same = [(name, found[i][1]) for name, _, found in parts if i < len(found) and found[i][0] == prompt]
        given = edited[i % len(edited)] if edited else None  # the same at each scale
        shots = [Shot(name, image, name == parts[-1][0]) for name, image in same]
        cells.append(Cell(prompt, [*shots, *([Shot("reference", given)] if given is not None else [])]))
    return cells


def adapter_checksum(folder: Path) -> str | None:
    """Return the checksum of a run's finished adapter; None without one."""
    file = folder / "adapter" / PEFT_FILE
    return checksum(file) if file.is_file() else None


def keep_pairs(folder: Path, pairs: Sequence[Pair]) -> None:
    """Keep `pairs` in the run folder for its reports. Raises ValueError if they cannot be written."""
    place = folder / PAIRS
    make_writable(place, "images before and after")
    for i, (_, before, after) in enumerate(pairs):
        write_whole(place / f"{i}_0.png", before)
        write_whole(place / f"{i}_1.png", after)
    kept = {"adapter": adapter_checksum(folder), "labels": [masked_text(label) for label, _, _ in pairs]}
    write_whole(place / PAIRS_FILE, json.dumps(kept, indent=1) + "\n")


def kept_pairs(folder: Path) -> list[Cell]:
    """Return what `keep_pairs` kept; empty if it belongs to another adapter than the present one, or is unreadable."""
    place = folder / PAIRS
    try:
        kept = read_json(place / PAIRS_FILE, MOST_BYTES)
        labels = list(kept["labels"])[:MOST_PAIRS] if kept["adapter"] == adapter_checksum(folder) else []
    except (OSError, ValueError, KeyError, TypeError):
        return []
    images = [[read_image(place / f"{i}_{j}.png") for j in (0, 1)] for i in range(len(labels))]
    return [
        Cell(str(label), [Shot(BASE, before), Shot("adapter", after, first=True)])
        for label, (before, after) in zip(labels, images, strict=True)
    ]


def evaluation_cells(evaluations: Sequence[Evaluation], runs: Sequence[str]) -> list[Cell]:
    """Return a cell for each prompt and seed: the rows of the first run, then those of the others, named by `runs`.

    The base of another run is left out where it drew the same image.
    """
    first, cells = evaluations[0], []
    for column, label in enumerate(first.labels):
        shots = [Shot(row.name, read_image(row.files[column]), row.name == first.chosen) for row in first.rows]
        base = first.base.files[column]
        for other, run in zip(evaluations[1:], runs[1:], strict=True):
            for row in other.rows:
                file = row.files[column]
                if row is not other.base or not file or not base or file.read_bytes() != base.read_bytes():
                    shots.append(Shot(f"{run}: {row.name}", read_image(file)))
        if (given := first.reference(column)) is not None:
            shots.append(Shot("reference", given))
        cells.append(Cell(label, shots))
    return cells


def strength_cells(evaluation: Evaluation, read: Callable[[Path | None], Shown] = read_image) -> list[Cell]:
    """Return a cell for each prompt, with the chosen adapter at several strengths from the first seed."""
    rows, seed = evaluation.strengths, evaluation.columns[0][1]
    labels = [label for label, (_, each) in zip(evaluation.labels, evaluation.columns, strict=True) if each == seed]
    return [
        Cell(label, [Shot(f"x {row.name}", read(row.files[i]), row is rows[-1]) for row in rows])
        for i, label in enumerate(labels)
        if rows
    ]


def distance_table(rows: Sequence[Row], *, chosen: str = "", caption: str = "", prefix: str = "") -> Table:
    """Return how far the images of each row are from the base's and from the training images, and fit their prompts."""
    lines, has_text = [], any(row.to_prompt is not None for row in rows)
    for row in rows:
        values = (row.to_base, row.to_training, row.spread, *((row.to_prompt,) if has_text else ()))
        distances = [number(value, ".3f") for value in values]
        near: str | int = "" if row.to_training is None else row.suspicious
        marked = Markup("<span class=suspicious>{}</span>").format(near) if near else near
        lines.append([prefix + row.name, *distances, marked, row.failed])
    measured = (
        "to the base",
        "to the nearest training image",
        "between two",
        *(("fits the prompt",) if has_text else ()),
    )
    names = (*measured, "suspiciously near", "not computed")
    return Table([""], names, lines, [row.name == chosen for row in rows], caption)


def nearest_pairs(evaluation: Evaluation) -> Iterator[tuple[str, Image.Image, Nearest]]:
    """Yield label, image and nearest training picture of what the chosen adapter drew."""
    row = evaluation.chosen_row
    for label, file, near in zip(evaluation.labels, row.files, row.nearest, strict=True):
        if near is not None and (image := read_image(file)) is not None:
            yield label, image, near
