"""Render `sweep.html`: the table of a sweep with the jobs' sample grids, one file that needs no network."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from markupsafe import Markup

from train.checkpoints import resume
from train.reports import html as page
from train.reports.html import Table, number
from train.sweeps.records import NUMBERS, SweepJob, best_job, split_overrides
from train.utils.files import read_image

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


def common_prompts(jobs: Sequence[SweepJob]) -> list[str]:
    """Return the prompts of the sample grids if all jobs whose configuration can be read have the same."""
    known = []
    for job in jobs:
        with suppress(ValueError):  # the job has no configuration yet, or an unreadable one
            known.append((resume.configuration(job.folder).get("sample") or {}).get("prompts") or [])
    return list(known[0]) if known and all(one == known[0] for one in known) else []


def render(sweep: Path, jobs: Sequence[SweepJob]) -> str:
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
        own={
            job.number: " ".join(f"{key}={job.overrides[key]}" for key in keys if key in job.overrides) for job in jobs
        },
        best=best,
        first=first,
        grids=grids if any(job.sheet for job in jobs) else [],
        columns=columns,
        prompts=common_prompts(jobs),
        read_image=read_image,
        width=WIDEST,
    )
