"""`sweep.html`: the table of a sweep with the jobs' pictures side by side, one file that needs no network."""

from __future__ import annotations

import time
from collections.abc import Sequence
from html import escape
from pathlib import Path

from train import page
from train.jobs import Job, best_job, split_overrides

STYLE = """
.done { color: var(--good) }
.failed, .lost { color: var(--bad) }
.error { color: var(--bad); white-space: normal; overflow-wrap: anywhere }
.sheets { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(24rem, 100%), 1fr)); gap: 1rem }
"""


def picture(file: Path) -> str:
    """The file as a data URI; empty if it cannot be read."""
    image = page.opened(file)
    return "" if image is None else page.data_uri(image, jpeg=True)


def table(found: Sequence[Job], keys: Sequence[str], best: Job | None) -> str:
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


def figure(file: Path, sweep: Path, caption: str, best: bool = False) -> str:
    """A sheet with a caption, which is HTML; empty if the file cannot be read."""
    data = picture(file)
    if not data:
        return ""
    link = file.relative_to(sweep).as_posix()
    return (
        f"<figure{' class=best' if best else ''}><figcaption>{caption}</figcaption>"
        f'<a href="{link}"><img src="{data}" alt="sample sheet"></a></figure>'
    )


def sheets(sweep: Path, found: Sequence[Job], keys: Sequence[str], best: Job | None) -> list[str]:
    """The newest sheet of every job, and before them the one of step 0 if it is the same for all."""
    figures = []
    firsts = {job.first_sheet.read_bytes() for job in found if job.first_sheet is not None}
    if len(firsts) == 1:
        first = next(job.first_sheet for job in found if job.first_sheet is not None)
        figures.append(figure(first, sweep, "before training<br>&nbsp;"))
    for job in found:
        if job.sheet is None or (job.sheet == job.first_sheet and len(firsts) == 1):
            continue
        what = " ".join(f"{key}={job.overrides[key]}" for key in keys if key in job.overrides)
        loss = "" if job.last is None else f"<br>validation loss {job.last:.4f}"
        caption = f'<a href="{job.folder.name}/">job {job.number}</a> <code>{escape(what)}</code>{loss}'
        figures.append(figure(job.sheet, sweep, caption, job is best))
    return [text for text in figures if text]


def page_of(sweep: Path, found: Sequence[Job]) -> str:
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
    if figures := sheets(sweep, found, keys, best):
        parts += ["<h2>Pictures</h2>", f'<div class="sheets">{"".join(figures)}</div>']
    return page.document(f"Sweep {sweep.name}", parts, STYLE)
