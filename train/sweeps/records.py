"""The jobs of a sweep, each in a folder `<sweep>/<n>`: what a job says of itself, and what its folder holds.

A job keeps `job.json`: its overrides, how it ended, and with which error. All else is read from what any run writes, so
it does not matter which launcher ran the job, on which machine, or whether it was killed.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.tracking.metrics import LAST_LOSSES, last_validation_loss, read_metrics, series
from train.utils.files import write_whole
from train.utils.lock import in_use

RECORD = "job.json"
ENDED = ("done", "failed", "stopped")
RUNNING, REQUEUED, LOST = "running", "waiting", "lost"


def record(folder: Path) -> dict[str, Any]:
    """What the job in `folder` says of itself; empty if it says nothing that can be read."""
    try:
        found = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def note(folder: Path, **values: Any) -> None:
    """Add `values` to what a job says of itself. Raises ValueError if it cannot be written."""
    write_whole(folder / RECORD, json.dumps(record(folder) | values, indent=1) + "\n")


# ------------------------------------------------------------------ jobs


@dataclass
class SweepJob:
    """One job, as its folder shows it now.

    Attributes:
        overrides: value by key, as written on the command line.
        status: done, failed, stopped, running, waiting (to be started again by Slurm), or lost: it ended without a
            word, as when it is killed.
        error: what a job that failed or was stopped said.
        steps: finished, as far as the metrics say; `of` are to be done.
        best: the lowest validation loss, at step `best_step`; `last` is that of the adapter that the run ended with.
        training_loss: mean of the last ten that were logged.
        images_per_second: the median.
        sheet, first_sheet: the newest pictures, and those of step 0.
    """

    number: int
    folder: Path
    overrides: dict[str, str] = field(default_factory=dict)
    status: str = LOST
    error: str = ""
    steps: int = 0
    of: int | None = None
    last: float | None = None
    best: float | None = None
    best_step: int | None = None
    training_loss: float | None = None
    images_per_second: float | None = None
    sheet: Path | None = None
    first_sheet: Path | None = None


def read_job(folder: Path) -> SweepJob:
    """The job in `folder`, whose name is its number."""
    said, lines = record(folder), read_metrics(folder)
    job = SweepJob(int(folder.name), folder, error=str(said.get("error") or ""))
    job.overrides = dict(key_and_value(text) for text in said.get("overrides") or [])
    status = said.get("status")
    if status in ENDED or status == REQUEUED:
        job.status = status
    elif in_use(folder):
        job.status = RUNNING
    job.steps = max((line["step"] for line in lines), default=0)
    job.of = said.get("steps")
    validation = series(lines, "validation_loss")
    if validation:
        job.last = last_validation_loss(folder)
        job.best_step, job.best = min(validation, key=lambda entry: (entry[1], entry[0]))
    if losses := [value for _, value in series(lines, "loss")]:
        job.training_loss = statistics.fmean(losses[-LAST_LOSSES:])
    if speeds := [value for _, value in series(lines, "images_per_second")]:
        job.images_per_second = statistics.median(speeds)
    if sheets := sorted((folder / "samples").glob("step_*.png")):
        job.sheet = sheets[-1]
        job.first_sheet = sheets[0] if int(sheets[0].stem.removeprefix("step_")) == 0 else None
    return job


def key_and_value(override: str) -> tuple[str, str]:
    key, _, value = override.partition("=")
    return key, value


def read_jobs(sweep: Path) -> list[SweepJob]:
    """All jobs of a sweep's folder in the order of their numbers."""
    folders = [path for path in sweep.iterdir() if path.name.isdecimal() and path.is_dir()]
    return [read_job(path) for path in sorted(folders, key=lambda path: int(path.name))]


def split_overrides(jobs: Sequence[SweepJob]) -> tuple[dict[str, str], list[str]]:
    """The overrides that all jobs have in common, and the keys in which they differ, in the order they were given."""
    keys = list(dict.fromkeys(key for job in jobs for key in job.overrides))
    values = {key: {job.overrides.get(key) for job in jobs} for key in keys}
    common = {key: jobs[0].overrides[key] for key in keys if len(values[key]) == 1}
    return common, [key for key in keys if key not in common]


def best_job(jobs: Sequence[SweepJob]) -> SweepJob | None:
    """The finished job whose adapter has the lowest validation loss."""
    finished = [job for job in jobs if job.status == "done" and job.last is not None]
    return min(finished, key=lambda job: (job.last, job.number), default=None)
