"""Write report.html: what a run learned, in one page that needs no network. docs/evaluation.md says how to read it.

Training writes it from the run folder (metrics, sample grids, configuration); train/evaluate.py adds images of every
checkpoint and their distances. The page is templates/report.html; this file collects what is in it.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from markupsafe import Markup

from flux2.utils.json_files import read_text
from train.checkpoints import resume
from train.checkpoints.checkpoint import checkpoints, step_of
from train.evaluation import distances
from train.evaluation.findings import caution, find_problems
from train.evaluation.recommend import percent, recommend
from train.evaluation.results import Evaluation, row_name
from train.reports import html as page
from train.reports import plots
from train.reports import run_pictures as pictures
from train.reports.batch_sheet import FIRST_BATCH
from train.reports.html import Table, number
from train.reports.plots import Curve
from train.reports.run_pictures import Pair
from train.tracking.metrics import read_metrics, series
from train.utils.console import warn
from train.utils.files import read_image, write_whole
from train.utils.redact import masked, masked_command, masked_text

LIVE_SECONDS = 10.0  # between two reports while a run trains
LIVE_SHARE = 0.05  # of the time, at most, in which these are written
REPORT, COMMANDS = "report.html", "command.txt"
MOST_COMMAND = 1 << 20  # bytes
TIME = re.compile(r"validation_loss/(\d(?:\.\d{1,9})?(?:e-\d{1,2})?)")  # key of the loss at a time, 0 to 1


@dataclass(frozen=True)
class RunSummary:
    """What report.html shows of one run."""

    folder: Path
    label: str  # tells it from other runs in the report
    config: dict[str, Any]  # without secrets
    lines: list[dict[str, Any]]  # of metrics.jsonl
    recommended: int | None  # step of the recommended checkpoint
    reasons: list[str]  # sentences about the recommendation
    problems: list[str]  # sentences about what stands out
    command: str  # the commands that started and resumed it; empty if they were not kept
    progress: str = ""  # how far the training is; empty if it has ended

    @classmethod
    def read(cls, folder: Path, evaluation: Evaluation | None = None) -> RunSummary:
        """Return the summary of the run in `folder`. Raises ValueError if its configuration cannot be read."""
        config, found = masked(resume.configuration(folder)), recommend(folder)
        step = None if found.checkpoint is None else step_of(found.checkpoint)
        reasons = [line.strip().replace(f"{folder}{os.sep}", "") for line in found.reasons]
        if step is not None and (note := caution(folder)):
            reasons.append(note)
        label = masked_text(f"{config.get('name', '')}/{folder.resolve().name}".strip("/"))
        file = folder / COMMANDS
        try:
            command = read_text(file, MOST_COMMAND).strip()
        except ValueError:  # there is none, or it was not written by us
            command = ""
        problems, lines, progress = find_problems(folder, evaluation), read_metrics(folder), ""
        done, steps = max((line["step"] for line in lines), default=0), config.get("steps")
        if lines and isinstance(steps, int) and done < steps:
            progress = f"after step {done} of {steps}"
            if step is None and evaluation is None:
                reasons = []  # it is too early to say why none is recommended
        return cls(folder, label, config, lines, step, reasons, problems, command, progress)

    def series(self, key: str) -> list[tuple[int, float]]:
        return series(self.lines, key)

    @property
    def config_yaml(self) -> str:
        return yaml.safe_dump(self.config, allow_unicode=True, sort_keys=False)

    @property
    def times(self) -> dict[str, list[tuple[int, float]]]:
        """The series of the validation loss at single times, by time."""
        keys = {key for line in self.lines for key in line if TIME.fullmatch(key)}
        ordered = sorted(keys, key=lambda key: float(key.partition("/")[2]))
        return {f"time {key.partition('/')[2]}": self.series(key) for key in ordered}


def launch_command(overrides: Sequence[str], processes: int, dropped: Sequence[str]) -> str:
    """Return the command that starts a training, without secrets and without the settings in `dropped`."""
    words = [word for word in overrides if word.lstrip("+").partition("=")[0] not in dropped]
    start = f"accelerate launch --num_processes {processes}" if processes > 1 else "python"
    return f"{start} train/run.py {masked_command(words)}".rstrip()


def note_command(folder: Path, overrides: Sequence[str], processes: int = 1, *, resumed: bool = False) -> None:
    """Keep the command that starts a run, without secrets; `resumed` appends it to the earlier ones."""
    line = launch_command(overrides, processes, ("output_dir",) if resumed else ("output_dir", "resume"))
    file = folder / COMMANDS
    write_whole(
        file, f"{file.read_text(errors='replace', encoding='utf-8') if resumed and file.is_file() else ''}{line}\n"
    )


def loss_charts(runs: Sequence[RunSummary]) -> list[dict[str, Any]]:
    """Return the charts of training and validation loss; of a single run also of what else it logged."""
    training, validation = [], []
    for color, run in enumerate(runs):
        losses, name = run.series("loss"), f"{run.label}, " if len(runs) > 1 else ""
        training.append(Curve("each step", losses, color, faint=True))
        training.append(Curve(f"{name}smoothed (0.9)", plots.smooth(losses), color))
        validation.append(Curve(f"{name}validation", run.series("validation_loss"), color))
    charts = {"Training loss": training, "Validation loss": validation}
    if len(runs) == 1:
        times = [Curve(name, points, color) for color, (name, points) in enumerate(runs[0].times.items())]
        charts["Validation loss by time (0 the image, 1 noise)"] = times
        for title, name, key in (
            ("Gradient norm before clipping", "norm", "grad_norm"),
            ("Learning rate", "rate", "lr"),
            ("Preservation loss", "preservation loss", "preservation_loss"),
            ("Prior loss", "prior loss", "prior_loss"),
            ("Preference accuracy", "share of pairs", "preference_accuracy"),
            ("Preference margin", "margin", "preference_margin"),
        ):
            charts[title] = [Curve(name, runs[0].series(key))]
    return [found for title, curves in charts.items() if (found := plots.chart(title, curves))]


def loss_table(run: RunSummary) -> Table:
    """Return the validation loss of the base, after each checkpoint, and after the last step."""
    losses, times = dict(run.series("validation_loss")), {name: dict(found) for name, found in run.times.items()}
    saved = {step_of(place) for place in checkpoints(run.folder)}
    shown = [step for step in sorted(losses) if step in saved or step in (0, max(losses))]
    rows = []
    for step in shown:
        gain = percent(losses[step], losses[0]) if step and 0 in losses else ""
        by_time = [number(each.get(step), ".4f") for each in times.values()]
        rows.append([row_name(step), f"{losses[step]:.4f}", gain, *by_time])
    best = [step == run.recommended for step in shown]
    return Table(
        ["checkpoint"], ["mean", "vs. base", *times], rows, best, f"Validation loss by checkpoint and time: {run.label}"
    )


def speed_table(runs: Sequence[RunSummary]) -> Table:
    """Return steps, losses, speed and memory, a line for each run."""
    rows = []
    for run in runs:
        losses = run.series("validation_loss")
        ends = [dict(losses).get(0), min((loss for _, loss in losses), default=None), losses[-1][1] if losses else None]
        speeds = [value for _, value in run.series("images_per_second")]
        peaks = dict.fromkeys(key for line in run.lines for key in line if key.startswith("peak_memory_gb"))
        memory = [number(max((value for _, value in run.series(key)), default=None), ".2f") for key in peaks]
        speed = f"{median(speeds):.3g} ({min(speeds):.3g} to {max(speeds):.3g})" if speeds else ""
        steps = max((line["step"] for line in run.lines), default=0)
        counts = [number(count, "d") for count in (steps, run.recommended)]
        rows.append([run.label, *counts, *(number(loss, ".4f") for loss in ends), speed])
        rows[-1].append(" + ".join(memory))  # of each device
    names = ("steps", "recommended", "base's loss", "lowest", "last", "images/s: median (range)", "peak memory, GB")
    return Table(["run"], names, rows)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return the values of a nested configuration as JSON, by dotted key."""
    found: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            found |= flatten(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = json.dumps(value, ensure_ascii=False, default=str)
    return found


def differences_table(runs: Sequence[RunSummary]) -> Table:
    """Return the settings in which the runs differ."""
    flat, code = [flatten(run.config) for run in runs], Markup("<code>{}</code>")
    rows = {key: [one.get(key, "") for one in flat] for key in dict.fromkeys(key for one in flat for key in one)}
    different = [[code.format(text) for text in (key, *row)] for key, row in rows.items() if len(set(row)) > 1]
    return Table(["setting", *(run.label for run in runs)], (), different)


def render(folder: Path, evaluations: Sequence[Evaluation] = (), evaluated_by: str = "") -> str:
    """Return the page of the run in `folder`; see `write`."""
    runs = [RunSummary.read(one.folder, one) for one in evaluations] or [RunSummary.read(folder)]
    if len({run.label for run in runs}) < len(runs):
        runs = [replace(run, label=f"{chr(65 + i)}: {run.label}") for i, run in enumerate(runs)]
    labels = [run.label for run in runs]
    images = pictures.evaluation_cells(evaluations, labels) if evaluations else pictures.training_cells(folder)
    return page.render(
        "report.html",
        title=runs[0].label,
        time=time.strftime("%Y-%m-%d %H:%M"),
        runs=runs,
        evaluations=evaluations,
        evaluated_by=evaluated_by,
        pairs=pictures.kept_pairs(folder),
        images=images,
        first_batch=read_image(folder / FIRST_BATCH),
        strengths=pictures.strength_cells(evaluations[0]) if evaluations else [],
        charts=loss_charts(runs),
        loss_tables=[loss_table(run) for run in runs],
        speed=speed_table(runs),
        differences=differences_table(runs),
        nearest_pairs=pictures.nearest_pairs,
        distance_table=pictures.distance_table,
        width=pictures.image_width,
        measures=distances,
    )


def write(
    folder: Path, evaluations: Sequence[Evaluation] = (), pairs: Sequence[Pair] = (), evaluated_by: str = ""
) -> Path:
    """Write report.html into the run folder and return its path.

    `evaluations` are those of the run, then of other runs to compare it with; without any, the images are those of the
    run's sample grids. `pairs` are images before and after training, shown first: the run folder keeps them, and later
    reports show them as long as the adapter is the same. `evaluated_by` is the command of the evaluation.

    Raises ValueError or OSError if the configuration cannot be read or the file cannot be written.
    """
    if pairs:
        pictures.keep_pairs(folder, pairs)
    write_whole(folder / REPORT, render(folder, evaluations, evaluated_by))
    return folder / REPORT


def write_or_warn(folder: Path, pairs: Sequence[Pair] = ()) -> Path | None:
    """Write the report at the end of training; if that fails, warn and return None: the adapter is what counts."""
    try:
        return write(folder, pairs=pairs)
    except Exception as error:  # of an image library, or from numbers that were edited by hand
        warn(f"{folder / REPORT} could not be written ({type(error).__name__}: {error})")
        return None


class LiveReport:
    """Rewrites the report of a run while it trains, in a small share of the time."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.perf_counter) -> None:
        self.folder, self._clock, self._is_possible = folder, clock, True
        self._due = clock() + LIVE_SECONDS

    def update(self) -> None:
        """Write the report, unless the last one was written too recently; after a failure, leave it to the end."""
        began = self._clock()
        if not self._is_possible or began < self._due:
            return
        self._is_possible = write_or_warn(self.folder) is not None
        ended = self._clock()
        self._due = ended + max(LIVE_SECONDS, (ended - began) / LIVE_SHARE)
