"""`sweep.html`: the table of a sweep with the jobs' pictures side by side, one file that needs no network."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import suppress
from html import escape
from pathlib import Path

from train.checkpoints import resume
from train.reports import html as page
from train.sweeps.records import SweepJob, best_job, split_overrides
from train.utils.files import read_image

WIDEST = 1060  # pixels of an embedded sheet, which is four pictures; the whole one is behind its link
MOST_COLUMNS = 4

STYLE = """
body { max-width: 100rem }
.done { color: var(--good) }
.failed, .lost { color: var(--bad) }
.error { color: var(--bad); white-space: normal; overflow-wrap: anywhere }
ol { columns: 20rem; margin: 0 0 1rem; padding-left: 1.6rem }
.sheets { --gap: 1rem; display: grid; gap: var(--gap); margin-bottom: var(--gap); align-items: start }
.sheets { --width: calc((100% - (var(--columns) - 1) * var(--gap)) / var(--columns)) }
.sheets { grid-template-columns: repeat(auto-fill, minmax(max(var(--width), min(20rem, 100%)), 1fr)) }
figcaption { min-height: calc(3em + 1rem) }
"""


def picture(file: Path) -> str:
    """The file as a data URI; empty if it cannot be read."""
    image = read_image(file)
    return "" if image is None else page.data_uri(image, WIDEST, jpeg=True)


def table(found: Sequence[SweepJob], keys: Sequence[str], best: SweepJob | None) -> str:
    numbers = ("validation loss", "best", "at step", "training loss", "images/s")
    head = page.heads(("job", *keys, "status"), numbers)
    rows = []
    for job in found:
        place = f'<a href="{job.folder.name}/">{job.number}</a>'
        values = "".join(f"<td>{escape(job.overrides.get(key, ''))}</td>" for key in keys)
        steps = "" if job.status == "done" or not job.of else f" {job.steps}/{job.of}"
        rows.append(
            f"<tr{' class=best' if job is best else ''}><td>{place}</td>{values}"
            f'<td class="{job.status}">{job.status}{steps}</td>'
            + page.number(job.last, ".4f")
            + page.number(job.best, ".4f")
            + page.number(job.best_step, "d")
            + page.number(job.training_loss, ".4f")
            + page.number(job.images_per_second, ".2f")
            + "</tr>"
        )
    return page.table(head, rows)


def figure(file: Path | None, sweep: Path, caption: str, best: bool = False) -> str:
    """A sheet with a caption, which is HTML; the caption alone if there is none, or the file cannot be read."""
    shown = ""
    if file is not None and (data := picture(file)):
        link = file.relative_to(sweep).as_posix()
        shown = f'<a href="{link}"><img src="{data}" alt="sample sheet"></a>'
    return f"<figure{' class=best' if best else ''}><figcaption>{caption}</figcaption>{shown}</figure>"


def in_rows(found: Sequence[SweepJob], keys: Sequence[str]) -> tuple[list[SweepJob], int]:
    """The jobs in the order they are shown in, and how many stand in a row.

    Of a grid those of a row differ in one key alone, the one of most values, so that a column is a value of it.
    """
    values = {key: list(dict.fromkeys(job.overrides.get(key) for job in found)) for key in keys}
    across = max(keys, key=lambda key: (len(values[key]) <= MOST_COLUMNS, len(values[key])), default=None)
    count = len(found)
    is_grid = math.prod(len(found) for found in values.values()) == count
    if across is None or not is_grid or len(values[across]) > MOST_COLUMNS:
        return list(found), math.ceil(count / math.ceil(count / 3))
    down = [key for key in keys if key != across]
    order = [*down, across]
    shown = sorted(found, key=lambda job: [values[key].index(job.overrides.get(key)) for key in order])
    return shown, len(values[across])


def prompts(found: Sequence[SweepJob]) -> list[str]:
    """Those of the sheets, if all jobs that say so have the same."""
    known = []
    for job in found:
        with suppress(ValueError):  # of a job that has no configuration yet, or none that can be read
            known.append((resume.configuration(job.folder).get("sample") or {}).get("prompts") or [])
    return list(known[0]) if known and all(one == known[0] for one in known) else []


def sheets(sweep: Path, found: Sequence[SweepJob], keys: Sequence[str], best: SweepJob | None) -> str:
    """The newest sheet of every job, and before them the one of step 0 if it is the same for all; empty without any."""
    if all(job.sheet is None for job in found):
        return ""
    before, figures = "", []
    firsts = {job.first_sheet.read_bytes() for job in found if job.first_sheet is not None}
    if len(firsts) == 1:
        first = next(job.first_sheet for job in found if job.first_sheet is not None)
        before = figure(first, sweep, "before training")
    shown, many = in_rows(found, keys)
    for job in shown:
        sheet = None if job.sheet == job.first_sheet and len(firsts) == 1 else job.sheet
        what = " ".join(f"{key}={job.overrides[key]}" for key in keys if key in job.overrides)
        loss = "<br>" + (job.status if job.last is None else f"validation loss {job.last:.4f}")
        caption = f'<a href="{job.folder.name}/">job {job.number}</a> <code>{escape(what)}</code>{loss}'
        figures.append(figure(sheet, sweep, caption, job is best))
    said = prompts(found)
    items = "".join(f"<li>{escape(prompt)}</li>" for prompt in said)
    parts = ["<h2>Pictures</h2>", f"<p>In each sheet, row by row:</p><ol>{items}</ol>" if said else ""]
    if before and len(figures) < 3:  # side by side with them
        figures, before, many = [before, *figures], "", len(figures) + 1
    for group in ([before] if before else [], figures):
        if group:
            parts.append(f'<div class="sheets" style="--columns: {many}">{"".join(group)}</div>')
    return "".join(parts)


def page_of(sweep: Path, found: Sequence[SweepJob]) -> str:
    """The whole page of the jobs `found` in the folder `sweep`."""
    common, keys = split_overrides(found)
    best = best_job(found) if len(found) > 1 else None
    parts = [f"<h1>Sweep {escape(f'{sweep.parent.name}/{sweep.name}')}</h1>"]
    all_jobs = " ".join(f"{key}={value}" for key, value in common.items())
    ended = sum(job.status == "done" for job in found)
    when = time.strftime("%Y-%m-%d %H:%M")
    parts.append(f"<p>{ended} of {len(found)} jobs are done, {when}. All: <code>{escape(all_jobs)}</code></p>")
    if best is not None:
        chosen = " ".join(f"{key}={best.overrides[key]}" for key in keys if key in best.overrides)
        parts.append(f"<p>Lowest validation loss: job {best.number}, <code>{escape(chosen)}</code></p>")
    parts.append(table(found, keys, best))
    for job in found:
        if job.error:
            parts.append(f'<p class="error">job {job.number}: {escape(job.error)}</p>')
    parts.append(sheets(sweep, found, keys, best))
    return page.document(f"Sweep {sweep.name}", parts, STYLE)
