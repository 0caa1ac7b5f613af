"""Checkpoints side by side: pictures of the same prompts and seeds, losses, settings, and a blind choice."""

from __future__ import annotations

import io
import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import RedirectResponse
from filelock import FileLock
from PIL import Image
from pydantic import Field

from train.checkpoints.checkpoint import checkpoints, step_of
from train.evaluation.results import BASE, FINISHED, FOLDER, NUMBERS, Evaluation, read_evaluation, row_name
from train.pages import choices, run_files
from train.pages.base import Form, Studio, page, studio
from train.pages.choices import Comparison, Place, Side
from train.pages.run_files import Version
from train.pages.settings import command as train_command
from train.reports.run_pictures import Cell, LinkedImage, Shot, strength_cells
from train.reports.run_report import differences_table, loss_charts
from train.utils.checks import is_count
from train.utils.files import read_image
from train.utils.redact import masked_command
from train.utils.text import quoted, setting
from train.validation.sample_grid import sample_grids
from train.validation.samples import is_string_list

router = APIRouter()
MOST_ENTRIES = 8
SAMPLES, EVALUATION = "sample grid", "evaluation"  # where a picture is from
ROW = re.compile(rf"{BASE}|{FINISHED}|step [1-9]\d{{0,11}}")


@dataclass(frozen=True)
class Entry:
    """A checkpoint of a run, its finished adapter, or its base; `text` names it in addresses and files."""

    folder: Path
    row: str

    @property
    def text(self) -> str:
        return f"{self.folder}@{self.row}"


class Entries(Form):
    of: list[str] = Field(max_length=100)


class Answer(Form):
    comparison: str
    number: int
    picked: Side


class EvaluateForm(Entries):
    seeds: int = Field(ge=1, le=64)


def entries_of(known: Studio, texts: Sequence[str]) -> list[Entry]:
    """Return the chosen entries, each once. Raises ValueError for what is none, and Refused outside of the folders."""
    found = []
    for text in texts:
        folder, _, row = text.rpartition("@")
        if not folder or not ROW.fullmatch(row):
            raise ValueError(f"{text!r} is no checkpoint: write RUN@step 250, RUN@{FINISHED} or RUN@{BASE}")
        found.append(Entry(run_files.check_run(known.workspace.resolve(folder)), row))
    found = list(dict.fromkeys(found))
    if len(found) > MOST_ENTRIES:
        raise ValueError(f"{len(found)} checkpoints are chosen. Choose at most {MOST_ENTRIES}")
    return found


@lru_cache(maxsize=128)
def _evaluation(folder: Path, changed: Version) -> tuple[Evaluation | None, str]:
    try:
        return read_evaluation(folder), ""
    except ValueError as error:
        return None, str(error)


def evaluation_of(folder: Path) -> tuple[Evaluation | None, str]:
    """Return the evaluation of a run, None if there is none, and why it cannot be read."""
    return _evaluation(folder, run_files.version(folder / FOLDER / NUMBERS))


def rows_of(folder: Path) -> list[str]:
    """Return what can be chosen of a run: what has pictures or is a checkpoint, in the order of steps."""
    evaluation = evaluation_of(folder)[0]
    steps = {*sample_grids(folder), *map(step_of, checkpoints(folder))}
    names = {row_name(step) for step in steps} | {row.name for row in (evaluation.rows if evaluation else [])}
    order = {BASE: -1, FINISHED: 10**13}
    return sorted(filter(ROW.fullmatch, names), key=lambda name: order.get(name) or int(name.split()[1]))


def first_entries(folder: Path) -> list[Entry]:
    """Return what is compared of a run at first: its base, what is recommended and the last, if they are several."""
    rows, summary = rows_of(folder), run_files.summary(folder)
    wanted = {BASE, *rows[-1:], *([] if summary.recommended is None else [row_name(summary.recommended)])}
    found = [Entry(folder, row) for row in rows if row in wanted]
    return found if len(found) > 1 else []


def labels_of(entries: Sequence[Entry]) -> list[str]:
    """Return a name for each entry, which names its run if there are several."""
    if len({entry.folder for entry in entries}) == 1:
        return [entry.row for entry in entries]
    names = {entry.folder: run_files.summary(entry.folder).label for entry in entries}
    is_clear = len(set(names.values())) == len(names)
    return [f"{names[entry.folder] if is_clear else entry.folder}: {entry.row}" for entry in entries]


@dataclass(frozen=True)
class Picture:
    """A picture of an entry: the image at `at` of a sample grid, or a whole file without."""

    file: Path
    linked: LinkedImage
    at: int | None = None

    def load(self) -> Image.Image:
        """Return its pixels. Raises ValueError if the file disappeared."""
        found = read_image(self.file) if self.at is None else run_files.grid_cell(self.file, self.at)
        if found is None:
            raise ValueError(f"{self.file} cannot be read")
        image: Image.Image = found.convert("RGB")
        return image


def pictures_of(known: Studio, entry: Entry) -> dict[Place, Picture]:
    """Return the pictures of an entry by place: of its sample grid, then of the evaluation."""
    found: dict[Place, Picture] = {}
    step = 0 if entry.row == BASE else int(entry.row.split()[1]) if entry.row != FINISHED else None
    file = None if step is None else sample_grids(entry.folder).get(step)
    if step is not None and file is not None:
        sample = run_files.configuration(entry.folder).get("sample")
        settings = sample if isinstance(sample, dict) else {}
        seed, prompts = settings.get("seed"), settings.get("prompts")
        first = seed if isinstance(seed, int) and is_count(seed) else 0
        count = len(prompts) if is_string_list(prompts) else 0
        file = known.workspace.resolve(file)
        for i, (prompt, linked) in enumerate(run_files.linked_grid(entry.folder, step, file)):
            found[SAMPLES, prompt, first + (i % count if count else i)] = Picture(file, linked, i)
    evaluation = evaluation_of(entry.folder)[0]
    for row in evaluation.rows if evaluation else []:
        if row.name == entry.row and evaluation is not None:
            for (i, seed), image in zip(evaluation.columns, row.files, strict=True):
                drawn = None if image is None else run_files.linked_file(known.workspace.resolve(image))
                if image is not None and drawn is not None:
                    found[EVALUATION, evaluation.prompts[i], seed] = Picture(image, drawn)
    return found


def cells_of(labels: Sequence[str], pictures: Sequence[dict[Place, Picture]]) -> list[Cell]:
    """Return a cell for each place that two entries or more drew, with the pictures of all in their order."""
    cells = []
    for place in dict.fromkeys(place for each in pictures for place in each):
        shots = [
            Shot(label, each[place].linked if place in each else None)
            for label, each in zip(labels, pictures, strict=True)
        ]
        if sum(shot.image is not None for shot in shots) > 1:
            source, prompt, seed = place
            cells.append(Cell(f"{prompt} (seed {seed}, {source})", shots))
    return cells


@router.get("/compare")
def index(request: Request, of: list[str] = Query(default=[]), run: str = "") -> Response:  # noqa: B008
    """The chooser, and what was chosen; `run` is opened in the chooser."""
    known = studio(request)
    entries = entries_of(known, of)
    if run and not entries and (first := first_entries(run_files.check_run(known.workspace.resolve(run)))):
        of = [entry.text for entry in first]
        return RedirectResponse(f"/compare?{urlencode({'of': of}, doseq=True, errors='surrogateescape')}", 303)
    folders = list(dict.fromkeys(entry.folder for entry in entries))
    opened = {*folders, *([known.workspace.resolve(run)] if run else [])}
    runs = [
        (folder, run_files.label_of(folder, run_files.configuration(folder)), rows_of(folder))
        for folder in dict.fromkeys([*sorted(opened), *known.workspace.runs()])
    ]
    chosen = [entry.text for entry in entries]
    values: dict[str, Any] = {"runs": runs, "opened": opened, "chosen": chosen, "is_enough": len(entries) > 1}
    if len(entries) > 1:
        values |= comparison_values(known, entries, folders)
    return page(request, "compare.html", title="Compare", most=MOST_ENTRIES, **values)


def comparison_values(known: Studio, entries: Sequence[Entry], folders: Sequence[Path]) -> dict[str, Any]:
    """Return what the page shows of at least two entries."""
    summaries, labels = [run_files.summary(folder) for folder in folders], labels_of(entries)
    pictures = [pictures_of(known, entry) for entry in entries]
    strengths = []

    def linked(file: Path | None) -> LinkedImage | None:
        return None if file is None else run_files.linked_file(known.workspace.resolve(file))

    for folder, summary in zip(folders, summaries, strict=True):
        evaluation, problem = evaluation_of(folder)
        cells = strength_cells(evaluation, linked) if evaluation else []
        strengths.append((summary.label, evaluation.chosen if evaluation else "", cells, problem))
    text = "\n".join(evaluate_text(known, folder, summaries[0].config, 2) for folder in folders)
    return {
        "summaries": summaries,
        "cells": cells_of(labels, pictures),
        "charts": loss_charts(summaries)[:2],
        "differences": differences_table(summaries) if len(summaries) > 1 else None,
        "strengths": strengths,
        "evaluate_command": text,
    }


# Pictures that are missing are drawn by train/evaluate.py


def evaluate_settings(known: Studio, folder: Path, first: dict[str, Any], seeds: int) -> list[str]:
    """Return the settings that draw a run's checkpoints, with the prompts of the first run if its own are others."""
    words = [setting("run", known.workspace.show(folder)), f"seeds=[{','.join(map(str, range(seeds)))}]"]
    wanted, own = first.get("sample"), run_files.configuration(folder).get("sample")
    prompts = wanted.get("prompts") if isinstance(wanted, dict) else None
    if is_string_list(prompts) and prompts and (not isinstance(own, dict) or own.get("prompts") != prompts):
        words.append(f"prompts=[{','.join(map(quoted, prompts))}]")
    return words


def evaluate_text(known: Studio, folder: Path, first: dict[str, Any], seeds: int) -> str:
    return masked_command(["python", *train_command(evaluate_settings(known, folder, first, seeds), "evaluate")[1:]])


@router.post("/compare/evaluate")
def evaluate(request: Request, chosen: EvaluateForm) -> dict[str, str]:
    """Put the evaluation of each chosen run into the queue."""
    known = studio(request)
    folders = list(dict.fromkeys(entry.folder for entry in entries_of(known, chosen.of)))
    if not folders:
        raise ValueError("no run is chosen")
    first = run_files.configuration(folders[0])
    for folder in folders:
        config = run_files.configuration(folder)
        command = train_command(evaluate_settings(known, folder, first, chosen.seeds), "evaluate")
        known.queue.add(
            f"evaluate {run_files.label_of(folder, config)}", command, str(config.get("device") or ""), folder
        )
    return {"message": "in the queue; open this page again when it is done"}


# The blind choice


def file_of(known: Studio, name: str) -> Path:
    if not re.fullmatch(r"[0-9a-f]{16}", name):
        raise ValueError(f"{name!r} is no comparison")
    return known.workspace.outputs / "studio" / "choices" / f"{name}.json"


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Context manager in which no other request changes a comparison."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(file.with_suffix(".lock"), timeout=10):
        yield


def known_comparison(known: Studio, name: str) -> Comparison:
    """Return a comparison. Raises ValueError if there is none."""
    found = choices.read_comparison(file_of(known, name))
    if found is None:
        raise ValueError("there is no such comparison: open the page Compare again")
    return found


def next_pair(known: Studio, comparison: Comparison) -> Comparison:
    """Return a comparison with its next pair, if there is one."""
    entries = entries_of(known, comparison.entries)
    if [entry.text for entry in entries] != list(comparison.entries):
        raise ValueError("the folders of this comparison are no longer what they were: choose again")
    places = {i: set(pictures_of(known, entry)) for i, entry in enumerate(entries)}
    return comparison.with_next(places, random.SystemRandom())


def blind_html(request: Request, known: Studio, name: str, comparison: Comparison) -> dict[str, str]:
    labels = labels_of(entries_of(known, comparison.entries))
    tally = [choices.statement(labels[a], labels[b], *counts) for a, b, *counts in comparison.tally()]
    values = {"comparison": name, "number": len(comparison.shown), "pair": comparison.open_pair, "tally": tally}
    found = page(request, "compare_blind.html", answered=comparison.answered, of=comparison.entries, **values)
    return {"html": bytes(found.body).decode()}


@router.post("/compare/blind")
def blind(request: Request, chosen: Entries) -> dict[str, str]:
    """The next pair of the chosen entries, without their names."""
    known = studio(request)
    texts = sorted(entry.text for entry in entries_of(known, chosen.of))
    if len(texts) < 2:
        raise ValueError("choose at least two checkpoints")
    name = choices.comparison_name(texts)
    with locked(file_of(known, name)):
        before = choices.read_comparison(file_of(known, name)) or Comparison(tuple(texts))
        after = next_pair(known, before)
        choices.write_comparison(file_of(known, name), after)
    return blind_html(request, known, name, after)


@router.post("/compare/choose")
def choose(request: Request, answer: Answer) -> dict[str, str]:
    """Keep an answer, and return the next pair."""
    known = studio(request)
    file = file_of(known, answer.comparison)
    with locked(file):
        picked = known_comparison(known, answer.comparison).picked(answer.number, answer.picked)
        choices.write_comparison(file, picked)
        after = next_pair(known, picked)
        choices.write_comparison(file, after)
    return blind_html(request, known, answer.comparison, after)


@router.post("/compare/restart")
def restart(request: Request, chosen: Entries) -> dict[str, str]:
    """Delete the choices of a comparison."""
    known = studio(request)
    file = file_of(known, choices.comparison_name([entry.text for entry in entries_of(known, chosen.of)]))
    with locked(file):
        file.unlink(missing_ok=True)
    found = page(request, "compare_start.html", of=chosen.of)
    return {"html": bytes(found.body).decode(), "message": "the answers were deleted"}


@router.get("/compare/picture")
def picture(request: Request, comparison: str, number: int, side: Side) -> Response:
    """A picture of the open pair: its address and its content do not tell which checkpoint drew it."""
    known = studio(request)
    found = known_comparison(known, comparison)
    pair = found.open_pair
    if pair is None or number != len(found.shown) or side == "neither":
        raise ValueError("this pair was answered already. Ask for the next one")
    entry = entries_of(known, [found.entries[pair.left if side == "left" else pair.right]])[0]
    drawn = pictures_of(known, entry).get(pair.place)
    if drawn is None:
        raise ValueError("this picture is no longer there. Ask for the next pair")
    content = io.BytesIO()
    Image.frombytes("RGB", (image := drawn.load()).size, image.tobytes()).save(content, "PNG")  # pixels and no texts
    return Response(content.getvalue(), media_type="image/png")
