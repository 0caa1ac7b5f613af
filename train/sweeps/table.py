"""The table of a sweep, one row per job: sweep.html with the jobs' sample grids, sweep.json, sweep.csv, and printed."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from markupsafe import Markup
from rich.console import Console
from rich.table import Table as RichTable

from flux2.utils.text import printable
from train.checkpoints import resume
from train.evaluation.recommend import recommend_or_warn
from train.reports import html as page
from train.reports.html import Table, number
from train.sweeps.records import NUMBERS, SweepJob, best_job, split_overrides
from train.utils.console import say
from train.utils.files import read_image, short_path, write_whole
from train.validation.samples import is_string_list

PAGE, DATA, SHEET = "sweep.html", "sweep.json", "sweep.csv"
WIDEST = 1060  # pixels of an embedded sample grid, which is four images; its link opens the file itself
MAX_COLUMNS = 4


def job_table(jobs: Sequence[SweepJob], keys: Sequence[str], best: SweepJob | None) -> Table:
    """Return the table of settings, status, losses and speed, one row per job."""
    link, status, rows = Markup('<a href="{}/">{}</a>'), Markup('<span class="{}">{}</span>'), []
    for job in jobs:
        row = [link.format(job.folder.name, job.number), *(job.overrides.get(key, "") for key in keys)]
        row.append(status.format(job.status, job.progress))
        rows.append(row + [number(getattr(job, key), form) for key, _, form in NUMBERS])
    return Table(["job", *keys, "status"], [heading for _, heading, _ in NUMBERS], rows, [job is best for job in jobs])


def arrange(jobs: Sequence[SweepJob], keys: Sequence[str]) -> tuple[list[SweepJob], int]:
    """Return the jobs in display order, and the number of columns.

    In a grid search the jobs of a row differ in one key only, the one with most values, so a column is one value of it.
    """
    values = {key: list(dict.fromkeys(job.overrides.get(key) for job in jobs)) for key in keys}
    across = max(keys, key=lambda key: (len(values[key]) <= MAX_COLUMNS, len(values[key])), default=None)
    is_grid = math.prod(map(len, values.values())) == len(jobs)
    if across is None or not is_grid or len(values[across]) > MAX_COLUMNS:
        return list(jobs), math.ceil(len(jobs) / math.ceil(len(jobs) / 3))
    order = [*(key for key in keys if key != across), across]
    by_value = sorted(jobs, key=lambda job: [values[key].index(job.overrides.get(key)) for key in order])
    return by_value, len(values[across])


def own_overrides(job: SweepJob, keys: Sequence[str]) -> str:
    """Return the overrides of a job that others do not share, as on its command line."""
    return " ".join(f"{key}={job.overrides[key]}" for key in keys if key in job.overrides)


def common_prompts(jobs: Sequence[SweepJob]) -> list[str]:
    """Return the prompts of the sample grids if all jobs whose configuration can be read have the same."""
    known: list[Any] = []
    for job in jobs:
        with suppress(ValueError):  # the job has no configuration yet, or an unreadable one
            sample = resume.configuration(job.folder).get("sample")
            known.append(sample.get("prompts") if isinstance(sample, dict) else None)
    same = known and is_string_list(known[0]) and all(one == known[0] for one in known)
    return list(known[0]) if same else []


def render_page(sweep: Path, jobs: Sequence[SweepJob]) -> str:
    """Return the page of `jobs` in the folder `sweep`."""
    common, keys = split_overrides(jobs)
    shown, columns = arrange(jobs, keys)
    best = best_job(jobs) if len(jobs) > 1 else None
    firsts = [job.first_sheet for job in jobs if job.first_sheet is not None]
    first = firsts[0] if len({file.read_bytes() for file in firsts}) == 1 else None  # the base's, for all jobs
    grids = [(job, None if first and job.sheet == job.first_sheet else job.sheet) for job in shown]
    return page.render(
        "sweep.html",
        title=f"Sweep {sweep.parent.name}/{sweep.name}",
        time=time.strftime("%Y-%m-%d %H:%M"),
        sweep=sweep,
        jobs=jobs,
        table=job_table(jobs, keys, best),
        common=" ".join(f"{key}={value}" for key, value in common.items()),
        own={job.number: own_overrides(job, keys) for job in jobs},
        best=best,
        first=first,
        grids=grids if any(job.sheet for job in jobs) else [],
        columns=columns,
        prompts=common_prompts(jobs),
        read_image=read_image,
        width=WIDEST,
    )


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
    write_whole(sweep / PAGE, render_page(sweep, found))
    return sweep / PAGE


def print_table(file: Path, found: Sequence[SweepJob]) -> None:
    """Print the table and the best job."""
    _, keys = split_overrides(found)
    best = best_job(found)
    numbers = [entry for entry in NUMBERS if any(getattr(job, entry[0]) is not None for job in found)]
    table = RichTable(box=None, pad_edge=False, header_style="bold")
    for heading in ("job", *map(printable, keys), "status"):
        table.add_column(heading, overflow="fold")
    for _, heading, _ in numbers:
        table.add_column(heading, justify="right")
    for job in found:
        mark = " *" if best is job and len(found) > 1 else ""
        values = [printable(job.overrides.get(key, "")) for key in keys]
        measured = [number(getattr(job, key), form) for key, _, form in numbers]
        table.add_row(f"{job.number}{mark}", *values, job.progress, *measured)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False, emoji=False)
    console.print()
    console.print(table)
    for job in found:
        if job.error:
            say(f"job {job.number}: {job.error}")
    if best is not None and len(found) > 1:
        say(f"* lowest validation loss: {own_overrides(best, keys)}")
    if best is not None:
        say(f"of job {best.number}:", *recommend_or_warn(short_path(best.folder)).lines)
    say(f"table     {short_path(file)}")
