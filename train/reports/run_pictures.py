"""The pictures of report.html, and what was measured on them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from PIL import Image

from flux2.adapters.files import PEFT_FILE
from train.checkpoints.checkpoint import checksum
from train.evaluation.distances import FEWEST, NEARER_THAN
from train.evaluation.results import BASE, Evaluation, Row
from train.reports import slider
from train.reports.html import data_uri, heads, number, table
from train.reports.slider import Cell, Shot
from train.utils.files import make_writable, read_image, write_whole
from train.utils.redact import masked_text
from train.validation.sample_grid import split_grid

MOST_SHEETS = 12
PAIRS, PAIRS_FILE = "before_after", "pictures.json"
HINT = "<p>Drag over a picture, or focus it and use the arrow keys; the row below it chooses what is compared.</p>"

# ------------------------------------------------------------------ sheets of training


def sheets(folder: Path) -> list[tuple[str, Path]]:
    """Name and file of the sheets of a run by step, at most `MOST_SHEETS`, the first and the last among them."""
    files = sorted((folder / "samples").glob("step_*.png"))
    if len(files) > MOST_SHEETS:
        last = len(files) - 1
        files = [files[round(i * last / (MOST_SHEETS - 1))] for i in range(MOST_SHEETS)]
    steps = [int(file.stem.removeprefix("step_")) for file in files]
    return [(f"step {step}" if step else BASE, file) for step, file in zip(steps, files, strict=True)]


def of_training(folder: Path) -> str:
    """The sheets that training made, prompt by prompt; those that say nothing of their layout as a whole."""
    found = [(name, picture) for name, file in sheets(folder) if (picture := read_image(file)) is not None]
    if not found:
        return ""
    parts = [split_grid(picture) for _, picture in found]
    names = [name for name, _ in found]
    prompts = [prompt for prompt, _ in parts[-1]]
    if not prompts or any([prompt for prompt, _ in one] != prompts for one in parts):
        shots = [Shot(name, picture, name == names[-1]) for name, picture in found]
        return f"<h2>Pictures</h2>{slider.cells([Cell('the sheets of the run', shots)], whole=True)}"
    cells = []
    for i, prompt in enumerate(prompts):
        shots = [Shot(name, one[i][1], name == names[-1]) for name, one in zip(names, parts, strict=True)]
        cells.append(Cell(masked_text(prompt), shots))
    return f"<h2>Pictures</h2>{slider.cells(cells)}"


# ------------------------------------------------------------------ pictures before and after


def keep_pairs(folder: Path, cells: Sequence[Cell]) -> None:
    """Keep `cells` in the run folder, for its next report. Raises ValueError if they cannot be written."""
    place = folder / PAIRS
    make_writable(place, "pictures before and after")
    kept = []
    for i, cell in enumerate(cells):
        shots = []
        for j, shot in enumerate(cell.shots):
            name = None if shot.image is None else f"{i}_{j}.png"
            if name is not None and shot.image is not None:
                write_whole(place / name, shot.image)
            shots.append({"name": shot.name, "file": name, "first": shot.first})
        kept.append({"label": masked_text(cell.label), "notes": list(cell.notes), "shots": shots})
    text = json.dumps({"adapter": adapter_of(folder), "cells": kept}, indent=1)
    write_whole(place / PAIRS_FILE, text + "\n")


def kept_pairs(folder: Path) -> list[Cell]:
    """What `keep_pairs` kept of the adapter that is there now; empty if it is another one, or nothing can be read."""
    place = folder / PAIRS
    try:
        kept = json.loads((place / PAIRS_FILE).read_text())
        if kept["adapter"] != adapter_of(folder):
            return []
        return [
            Cell(
                str(cell["label"]),
                [
                    Shot(
                        str(shot["name"]),
                        shown(place / Path(shot["file"]).name if shot["file"] else None),
                        shot["first"],
                    )
                    for shot in cell["shots"]
                ],
                [str(note) for note in cell["notes"]],
            )
            for cell in kept["cells"]
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def adapter_of(folder: Path) -> str | None:
    """The checksum of a run's finished adapter; None without one."""
    file = folder / "adapter" / PEFT_FILE
    return checksum(file) if file.is_file() else None


# ------------------------------------------------------------------ evaluations


def shown(file: Path | None) -> Image.Image | None:
    return None if file is None else read_image(file)


def of_evaluations(all_made: Sequence[Evaluation], names: Sequence[str]) -> str:
    """A cell for each prompt and seed; behind the rows of the first run those of the others."""
    first, cells = all_made[0], []
    for column, (i, seed) in enumerate(first.columns):
        shots = []
        for made, name in zip(all_made, names, strict=True):
            for row in made.rows:
                file = row.files[column]
                if made is not first and row is made.base and file is not None and first.base.files[column] is not None:
                    same = file.read_bytes() == first.base.files[column].read_bytes()  # type: ignore[union-attr]
                    if same:
                        continue
                called = row.name if made is first else f"{name}: {row.name}"
                shots.append(Shot(called, shown(file), made is first and row.name == first.chosen))
        cells.append(Cell(f"{masked_text(first.prompts[i])} (seed {seed})", shots))
    return f"<h2>Pictures</h2>{slider.cells(cells)}"


def measured(row: Row) -> str:
    """The cells of a row that are distances."""
    suspicious = row.suspicious if row.to_training is not None else None
    mark = ' class="number suspicious"' if suspicious else ' class="number"'
    return (
        f"{number(row.to_base, '.3f')}{number(row.to_training, '.3f')}{number(row.spread, '.3f')}"
        f"<td{mark}>{'' if suspicious is None else suspicious}</td>{number(row.failed, 'd')}"
    )


MEASURES = ("to the base", "to the nearest training picture", "between two", "suspiciously near", "not computed")


def distances(all_made: Sequence[Evaluation], names: Sequence[str]) -> str:
    """How far the pictures of each adapter are from the base's and from the training pictures."""
    parts = [f"<h2>Distances</h2><p>Means over the pictures, by {escape(masked_text(all_made[0].features))}.</p>"]
    for made, name in zip(all_made, names, strict=True):
        rows = [
            f'<tr{" class=best" if row.name == made.chosen else ""}><th scope="row">{escape(row.name)}</th>'
            f"{measured(row)}</tr>"
            for row in made.rows
        ]
        own = ""
        if made.own:
            middle = made.own[len(made.own) // 2]
            own = (
                f"; of the {len(made.own)} training pictures each is {middle:.3f} from its nearest other "
                f"(median; {made.own[0]:.3f} to {made.own[-1]:.3f})"
            )
        parts.append(table(heads([""], MEASURES), rows, f"{escape(name)}{own}"))
        parts += [f'<p class="suspicious">left out: {escape(masked_text(text))}</p>' for text in made.damaged]
        parts += [f"<p>{escape(masked_text(text))}</p>" for text in made.notes]
    return "".join(parts)


def strengths(made: Evaluation) -> str:
    """The chosen adapter at several strengths, from the first seed."""
    if not made.strengths:
        return ""
    seed = made.columns[0][1]
    columns = [(i, each) for i, each in made.columns if each == seed]
    cells = []
    for column, (i, _) in enumerate(columns):
        shots = [
            Shot(f"x {row.name}", shown(file), row is made.strengths[-1])
            for row in made.strengths
            for file in [row.files[column]]
        ]
        cells.append(Cell(f"{masked_text(made.prompts[i])} (seed {seed})", shots))
    rows = [f'<tr><th scope="row">x {escape(row.name)}</th>{measured(row)}</tr>' for row in made.strengths]
    return (
        f"<h2>Strength of {escape(made.chosen)}</h2>"
        "<p>The adapter's update multiplied: 0 is the base, 1 as trained.</p>"
        f"{slider.cells(cells)}{table(heads(['strength'], MEASURES), rows)}"
    )


def memorized(made: Evaluation) -> str:
    """The pictures of the chosen adapter, each beside the training picture that is nearest to it."""
    row, figures = made.chosen_row, []
    for (i, seed), file, near in zip(made.columns, row.files, row.nearest, strict=True):
        picture = shown(file)
        if near is None or picture is None:
            continue
        prompt, name = masked_text(made.prompts[i]), masked_text(Path(made.trained[near.index]).name)
        verdict = f"nearer than {near.nearer_than:.0%} of the training pictures are to their nearest other"
        if near.suspicious:
            verdict = f'<span class="suspicious">{verdict}: is it a copy?</span>'
        if not made.own:
            verdict = "there is no other training picture to compare that with"
        figures.append(
            f'<figure><div class="two"><img src="{data_uri(picture, 320)}" alt="{escape(f"{row.name}: {prompt}")}">'
            f'<img src="{data_uri(made.pictures[near.index], 320)}" alt="{escape(f"training picture {name}")}"></div>'
            f"<figcaption>{escape(prompt)} (seed {seed})<br><small>right: {escape(name)}, distance "
            f"{near.distance:.3f}; {verdict}</small></figcaption></figure>"
        )
    if not figures:
        return ""
    few = "" if len(made.own) >= FEWEST else f" With fewer than {FEWEST} training pictures none is."
    return (
        f"<h2>Is it memorized? {escape(made.chosen)}</h2><p>Each picture, left, and the training picture that is "
        "nearest to it. It is marked where it is nearer than "
        f"{NEARER_THAN:.0%} of the training pictures are to their nearest other.{few}</p>"
        f'<div class="pairs">{"".join(figures)}</div>'
    )
