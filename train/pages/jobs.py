"""The queue as a fragment of every page, and the page of a job with its output."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Request, Response

from train.checkpoints.checkpoint import CONFIG_FILE
from train.pages.base import Form, page, studio
from train.pages.run_files import version
from train.reports.batch_sheet import FIRST_BATCH

router = APIRouter()


class Number(Form):
    number: int


@router.get("/jobs")
def all_jobs(request: Request) -> Response:
    return page(request, "jobs_all.html", title="Queue")


@router.get("/jobs/live")
def live(request: Request) -> Response:
    return page(request, "jobs.html")


@router.get("/jobs/{number}")
def one(request: Request, number: int) -> Response:
    known = studio(request)
    job = known.queue.job(number)
    return page(request, "job.html", title=job.title, job=job)


@router.get("/jobs/{number}/live")
def output(request: Request, number: int) -> Response:
    known = studio(request)
    job = known.queue.job(number)
    folder = Path(job.folder) if job.folder else None
    sheet = None if folder is None else folder / FIRST_BATCH
    return page(
        request,
        "job_output.html",
        job=job,
        output=known.queue.tail(number),
        folder="" if folder is None else known.workspace.show(folder),
        file=sheet,
        version=None if sheet is None else version(sheet),
        is_run=folder is not None and (folder / CONFIG_FILE).is_file(),
    )


@router.post("/jobs/stop")
def stop(request: Request, chosen: Number) -> dict[str, str]:
    studio(request).queue.stop(chosen.number)
    return {"message": "asked to stop; training saves a checkpoint first"}
