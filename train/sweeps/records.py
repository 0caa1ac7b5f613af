"""Read and write the records of a sweep's jobs, each in a folder `<sweep>/<n>`.

A job writes `job.json`: its overrides, its status and its error. All else is read from the files of any run, so it does
not matter which launcher ran the job, on which machine, or whether it was killed.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flux2.utils.json_files import read_json
from train.tracking.metrics import LAST_LOSSES, last_validation_loss, read_metrics, series
from train.utils.checks import is_count
from train.utils.files import write_whole
from train.utils.lock import in_use
from train.validation.sample_grid import sample_grids
from train.validation.samples import is_string_list

RECORD = "job.json"
ENDED = ("done", "failed", "stopped")
RUNNING, REQUEUED = "running", "waiting"  # waiting for Slurm to restart it
LOST = "lost"  # ended without a record, for example because it was killed
MOST_BYTES = 1 << 20
FIELDS: dict[str, Callable[[Any], bool]] = {  # keys of job.json, and which values are accepted
    "overrides": is_string_list,
    "status": lambda value: value in (*ENDED, RUNNING, REQUEUED),
    "steps": is_count,
    "error": lambda value: isinstance(value, str),
}
NUMBERS = (  # columns of a table: attribute of a job, heading, format
    ("last", "validation loss", ".4f"),
    ("best", "best", ".4f"),
    ("best_step", "at step", "d"),
    ("training_loss", "training loss", ".4f"),
    ("images_per_second", "images/s", ".2f"),
)


def record(folder: Path) -> dict[str, Any]:
    """Return the record of the job in `folder`, empty if there is none that can be read.

    It may come from someone else: only values that `job.json` has, of their types, are returned.
    """
    try:
        found = read_json(folder / RECORD, MOST_BYTES)
    except ValueError:
        return {}
    values = found.items() if isinstance(found, dict) else ()
    return {key: value for key, value in values if key in FIELDS and FIELDS[key](value)}


def note(folder: Path, **values: Any) -> None:
    """Add `values` to the record of a job. Raises ValueError if it cannot be written."""
    write_whole(folder / RECORD, json.dumps(record(folder) | values, indent=1) + "\n")


@dataclass
class SweepJob:
    """One job, according to the files in its folder."""

    number: int
    folder: Path
    overrides: dict[str, str] = field(default_factory=dict)  # values by key, as written on the command line
    status: str = LOST  # one of ENDED, RUNNING, REQUEUED or LOST
    error: str = ""  # message of a job that failed or was stopped
    steps: int = 0  # finished, according to the metrics
    total_steps: int | None = None
    last: float | None = None  # validation loss of the final adapter
    best: float | None = None  # lowest validation loss
    best_step: int | None = None
    training_loss: float | None = None  # mean of the last logged losses
    images_per_second: float | None = None  # median over the logged steps
    sheet: Path | None = None  # the newest sample grid
    first_sheet: Path | None = None  # the sample grid of step 0

    @property
    def progress(self) -> str:
        """The status, and the finished steps of a job that is not done."""
        has_steps = self.total_steps and self.status != "done"
        return f"{self.status} {self.steps}/{self.total_steps}" if has_steps else self.status


def read_job(folder: Path) -> SweepJob:
    """Return the job in `folder`, whose name is its number."""
    about, lines = record(folder), read_metrics(folder)
    job = SweepJob(int(folder.name), folder, error=about.get("error", ""))
    job.overrides = {key: value for key, _, value in (text.partition("=") for text in about.get("overrides", []))}
    if about.get("status", RUNNING) != RUNNING:
        job.status = about["status"]
    elif in_use(folder):
        job.status = RUNNING
    job.steps = max((line["step"] for line in lines), default=0)
    job.total_steps = about.get("steps")
    validation = series(lines, "validation_loss")
    if validation:
        job.last = last_validation_loss(folder)
        job.best_step, job.best = min(validation, key=lambda entry: (entry[1], entry[0]))
    if losses := [value for _, value in series(lines, "loss")]:
        job.training_loss = statistics.fmean(losses[-LAST_LOSSES:])
    if speeds := [value for _, value in series(lines, "images_per_second")]:
        job.images_per_second = statistics.median(speeds)
    if sheets := sample_grids(folder):
        job.sheet = sheets[max(sheets)]
        job.first_sheet = sheets.get(0)
    return job


def read_jobs(sweep: Path) -> list[SweepJob]:
    """Return all jobs of a sweep's folder in the order of their numbers."""
    folders = [path for path in sweep.iterdir() if path.name.isdecimal() and path.is_dir()]
    return [read_job(path) for path in sorted(folders, key=lambda path: int(path.name))]


def split_overrides(jobs: Sequence[SweepJob]) -> tuple[dict[str, str], list[str]]:
    """Return the overrides that all jobs share, and the keys in which they differ, in command-line order."""
    keys = list(dict.fromkeys(key for job in jobs for key in job.overrides))
    values = {key: {job.overrides.get(key) for job in jobs} for key in keys}
    common = {key: jobs[0].overrides[key] for key in keys if len(values[key]) == 1}
    return common, [key for key in keys if key not in common]


def best_job(jobs: Sequence[SweepJob]) -> SweepJob | None:
    """Return the finished job whose adapter has the lowest validation loss."""
    finished = [job for job in jobs if job.status == "done" and job.last is not None]
    return min(finished, key=lambda job: (job.last, job.number), default=None)
