"""Write and print the table of a sweep, with one row per job."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as RichTable

from train.evaluation.recommend import closing_lines
from train.reports.html import number
from train.sweeps.page import render
from train.sweeps.records import NUMBERS, SweepJob, best_job, split_overrides
from train.utils.files import short_path, write_whole

PAGE, DATA, SHEET = "sweep.html", "sweep.json", "sweep.csv"


def row(job: SweepJob, keys: Sequence[str]) -> dict[str, Any]:
    """Return a job as plain values, for the files."""
    return {
        "job": job.number,
        "status": job.status,
        **{key: job.overrides.get(key) for key in keys},
        "steps": job.steps,
        "of": job.total_steps,
        "validation_loss": job.last,
        "best_validation_loss": job.best,
        "best_step": job.best_step,
        "training_loss": job.training_loss,
        "images_per_second": job.images_per_second,
        "error": job.error or None,
        "folder": str(job.folder.name),
        "sheet": None if job.sheet is None else job.sheet.relative_to(job.folder.parent).as_posix(),
    }


def write(sweep: Path, found: Sequence[SweepJob]) -> Path:
    """Write page, JSON and CSV of the jobs `found`; return the page. Raises ValueError if that fails."""
    common, keys = split_overrides(found)
    best = best_job(found)
    rows = [row(job, []) | {"overrides": job.overrides} for job in found]
    about = {"sweep": sweep.name, "common": common, "best": None if best is None else best.number, "jobs": rows}
    write_whole(sweep / DATA, json.dumps(about, indent=1) + "\n")
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, list(row(found[0], keys)), lineterminator="\n")
    table.writeheader()
    table.writerows(row(job, keys) for job in found)
    write_whole(sweep / SHEET, text.getvalue())
    write_whole(sweep / PAGE, render(sweep, found))
    return sweep / PAGE


def print_table(page: Path, found: Sequence[SweepJob]) -> None:
    """Print the table and the best job."""
    _, keys = split_overrides(found)
    best = best_job(found)
    numbers = [entry for entry in NUMBERS if any(getattr(job, entry[0]) is not None for job in found)]
    table = RichTable(box=None, pad_edge=False, header_style="bold")
    for heading in ("job", *keys, "status"):
        table.add_column(heading, overflow="fold")
    for _, heading, _ in numbers:
        table.add_column(heading, justify="right")
    for job in found:
        mark = " *" if best is job and len(found) > 1 else ""
        values = [job.overrides.get(key, "") for key in keys]
        cells = [
            f"{job.number}{mark}",
            *values,
            job.progress,
            *(number(getattr(job, key), form) for key, _, form in numbers),
        ]
        table.add_row(*cells)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False, emoji=False)
    console.print()
    console.print(table)
    for job in found:
        if job.error:
            print(f"job {job.number}: {job.error}")
    if best is not None and len(found) > 1:
        changed = " ".join(f"{key}={best.overrides[key]}" for key in keys if key in best.overrides)
        print(f"* lowest validation loss: {changed}")
    if best is not None:
        print(f"of job {best.number}:", *closing_lines(short_path(best.folder)), sep="\n")
    print(f"table     {short_path(page)}", flush=True)
