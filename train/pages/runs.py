"""All runs of the opened folders, and one as it goes: numbers, losses, pictures, problems, what to use, commands."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse
from pydantic import Field

from flux2.adapters.files import PEFT_FILE
from flux2.utils.json_files import read_text
from train.checkpoints.checkpoint import CONFIG_FILE, checkpoints
from train.checkpoints.resume_command import words_from_record
from train.pages import run_files
from train.pages.base import Form, Studio, page, studio
from train.pages.queue import LAUNCHER, Queue, QueuedJob
from train.pages.queue import RUNNING as JOB_RUNNING
from train.pages.run_files import FINISHED, RUNNING
from train.pages.settings import command as train_command
from train.pages.settings import compose
from train.pages.workspace import Refused
from train.reports.batch_sheet import FIRST_BATCH
from train.reports.run_pictures import training_cells
from train.reports.run_report import REPORT, loss_charts
from train.utils.files import MOST_YAML
from train.utils.lock import LOCK_FILE, in_use
from train.utils.redact import masked_command
from train.utils.text import setting
from train.validation.sample_grid import sample_grids

router = APIRouter()
MOST_RUNS = 200  # of the table, the newest
SAMPLE_FILE = "sample"  # training looks for it after each step
# a report may come from someone else: it gets no origin, so that its scripts reach nothing of the studio
REPORT_POLICY = (
    "sandbox allow-scripts; default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
)


class RunForm(Form):
    folder: str


class ResumeForm(RunForm):
    steps: int | None = Field(default=None, ge=1, le=10**9)


@router.get("/runs")
def index(request: Request) -> Response:
    return page(request, "runs.html", title="Runs")


@router.get("/runs/live")
def table(request: Request) -> Response:
    found = studio(request).workspace.runs()
    lines = [line for run in found[:MOST_RUNS] if (line := run_files.run_line(run)) is not None]
    return page(request, "runs_table.html", runs=lines, left_out=len(found[MOST_RUNS:]))


@router.get("/runs/one")
def one(request: Request, folder: str) -> Response:
    run = run_files.check_run(studio(request).workspace.resolve(folder))
    summary = run_files.summary(run)
    values = {"run": summary, "shown": studio(request).workspace.show(run), "parts": list(PARTS)}
    return page(request, "run.html", title=summary.label, **values)


@router.get("/runs/part")
def part(request: Request, folder: str, name: str) -> Response:
    """A part of a run's page. If the run disappeared, the first one says so and the others are empty."""
    known = studio(request)
    if name not in PARTS:
        raise ValueError(f"{name!r} is no part of the page of a run: {', '.join(PARTS)}")
    run = known.workspace.resolve(folder)
    try:
        run_files.check_run(run)
    except ValueError as error:
        return page(request, "run_problem.html", problem=str(error) if name == next(iter(PARTS)) else "")
    try:
        return page(request, f"run_{name}.html", run_folder=str(run), **PARTS[name](known, run))
    except Refused:
        raise
    except (ValueError, OSError) as error:
        return page(request, "run_problem.html", problem=str(error))


def now_values(known: Studio, run: Path) -> dict[str, Any]:
    state = run_files.state_of(run)
    facts, elsewhere = run_files.facts_of(run, state), run_files.runs_elsewhere(run, state)
    made = {"has_report": (run / REPORT).is_file(), "has_adapter": (run / "adapter" / PEFT_FILE).is_file()}
    return {"state": state, "facts": facts, "elsewhere": elsewhere, **made}


def action_values(known: Studio, run: Path) -> dict[str, Any]:
    state, config = run_files.state_of(run), run_files.configuration(run)
    command, why_not = "", ""
    steps = config.get("steps", 0)
    least = steps + 1 if state == FINISHED else max(1, run_files.progress(run).done)
    further = steps + max(1, steps // 2) if state == FINISHED else steps
    if state != RUNNING:
        try:
            words = resume_command(known, run, None if further == steps else further)
            command = masked_command(["python", *words[1:]])
        except ValueError as error:
            why_not = str(error)
    values = {"command": command, "why_not": why_not, "further": further, "least": least}
    return {"state": state, "can_sample": run_files.can_sample(config), "is_finished": state == FINISHED, **values}


def verdict_values(known: Studio, run: Path) -> dict[str, Any]:
    return {"summary": run_files.summary(run)}


def chart_values(known: Studio, run: Path) -> dict[str, Any]:
    return {"charts": loss_charts([run_files.summary(run)])}


def picture_values(known: Studio, run: Path) -> dict[str, Any]:
    return {
        "cells": training_cells(run, lambda step, file: run_files.linked_grid(run, step, known.workspace.resolve(file)))
    }


def batch_values(known: Studio, run: Path) -> dict[str, Any]:
    return {"file": run / FIRST_BATCH, "version": run_files.version(run / FIRST_BATCH)}


# in the order of the page
PARTS: dict[str, Callable[[Studio, Path], dict[str, Any]]] = {
    "now": now_values,
    "actions": action_values,
    "verdict": verdict_values,
    "charts": chart_values,
    "pictures": picture_values,
    "batch": batch_values,
}


@router.get("/runs/cell")
def cell(request: Request, folder: str, step: int, place: int, version: int = 0) -> Response:
    """One image of a sample grid. `version` is part of the address alone, so that a browser may keep it."""
    run = studio(request).workspace.resolve(folder)
    file = sample_grids(run).get(step)
    if file is None:
        raise ValueError(f"{run} has no sample grid of step {step}")
    content = io.BytesIO()
    run_files.grid_cell(studio(request).workspace.resolve(file), place).convert("RGB").save(content, "PNG")
    return Response(content.getvalue(), media_type="image/png", headers={"Cache-Control": "private, max-age=86400"})


@router.get("/runs/report")
def report(request: Request, folder: str) -> Response:
    known = studio(request).workspace
    file = known.resolve(known.resolve(folder) / REPORT)
    if not file.is_file():
        raise ValueError(f"{file} does not exist: training writes it at its end, and train/evaluate.py")
    return FileResponse(file, media_type="text/html", headers={"Content-Security-Policy": REPORT_POLICY})


@router.post("/runs/stop")
def stop(request: Request, chosen: RunForm) -> dict[str, str]:
    """Ask a run to stop, as Ctrl-C does."""
    known = studio(request)
    run = run_files.check_run(known.workspace.resolve(chosen.folder))
    if not in_use(run):
        raise ValueError(f"{run} does not run, as far as its lock tells on this machine: there is nothing to stop here")
    holder = lock_holder(run)
    job = job_of_run(known.queue, run, holder)
    if job is not None:
        known.queue.stop(job.number)
    elif holder is not None and sys.platform != "win32":  # which has no such signal between consoles
        holder.send_signal(signal.SIGINT)
    else:
        raise ValueError(
            f"what holds {run / LOCK_FILE} is not one process of this user on this machine. Press Ctrl-C where the run "
            "was started, or type kill -INT with the number of its first process there"
        )
    return {"message": "asked to stop: it finishes its step and saves a checkpoint first"}


def lock_holder(run: Path) -> psutil.Process | None:
    """Return the process that holds a run's lock; None if it is not exactly one of this user on this machine."""
    file, found = str((run / LOCK_FILE).resolve()), dict[int, psutil.Process]()
    mine = psutil.Process().username()
    for process in psutil.process_iter():
        try:
            is_mine = process.pid != os.getpid() and process.username() == mine
            if is_mine and any(opened.path == file for opened in process.open_files()):
                found[process.pid] = process
        except (psutil.Error, OSError):  # it ended, or is not ours to look at
            continue
    first = [process for process in found.values() if process.ppid() not in found]  # workers inherit the open file
    return first[0] if len(first) == 1 else None


def job_of_run(queue: Queue, run: Path, holder: psutil.Process | None) -> QueuedJob | None:
    """Return the running job of the queue that is this run: it started the process that holds the lock, or says so."""
    above = set() if holder is None else {process.pid for process in holder.parents()}
    running = [job for job in queue.jobs() if job.state == JOB_RUNNING]
    started = [job for job in running if job.pid in above]
    named = [job for job in running if holder is None and job.folder and Path(job.folder).resolve() == run]
    return next(iter(started + named), None)


@router.post("/runs/sample")
def sample(request: Request, chosen: RunForm) -> dict[str, str]:
    """Ask a run for a sample grid."""
    run = run_files.check_run(studio(request).workspace.resolve(chosen.folder))
    state = run_files.state_of(run)
    if state != RUNNING and not run_files.runs_elsewhere(run, state):
        raise ValueError(f"{run} does not run: nothing draws a sample grid there")
    if not run_files.can_sample(run_files.configuration(run)):
        raise ValueError(
            f"{run} draws no sample grids: it has neither sample.prompts nor sample.captions, or sample_every=0"
        )
    run_files.write_empty(run / SAMPLE_FILE)
    return {"message": "asked for a sample grid: it is drawn after the next step"}


@router.post("/runs/resume")
def resume(request: Request, chosen: ResumeForm) -> dict[str, str]:
    """Put the command that resumes a run into the queue."""
    known = studio(request)
    run = run_files.check_run(known.workspace.resolve(chosen.folder))
    state, config = run_files.state_of(run), run_files.configuration(run)
    if state == RUNNING:
        raise ValueError(f"{run} is running. Stop it first")
    if state == FINISHED and (chosen.steps is None or chosen.steps <= config.get("steps", 0)):
        raise ValueError(f"{run} has done its {config.get('steps')} steps. Give more steps to train longer")
    if any(job.is_active and job.folder and Path(job.folder).resolve() == run for job in known.queue.jobs()):
        raise ValueError(f"{run} is in the queue already")
    steps = None if chosen.steps == config.get("steps") else chosen.steps
    words = resume_command(known, run, steps)
    job = known.queue.add(f"resume {run_files.label_of(run, config)}", words, str(config.get("device") or ""), run)
    return {"redirect": f"/jobs/{job.number}"}


def resume_command(known: Studio, run: Path, steps: int | None) -> list[str]:
    """Return the words that resume a run, up to another number of steps if one is given.

    Raises ValueError, saying what to do instead, if there is nothing to resume or its command is not to be started.
    """
    by_hand = f"Type its command in a shell, with resume={known.workspace.show(run)}"
    if not checkpoints(run):
        raise ValueError("it has no checkpoint, so there is nothing to resume")
    command = run_files.command_of(run).rpartition("\n")[2]
    if not command:
        raise ValueError(f"the command that started it was not kept. {by_hand}")
    try:
        processes, settings = words_from_record(command, read_text(run / CONFIG_FILE, MOST_YAML))
        compose(settings)  # checks them: the folder may come from someone else
    except ValueError as error:
        raise ValueError(f"the command that it kept is not started from here: {error}. {by_hand}") from error
    if steps is not None:
        settings = [word for word in settings if word.partition("=")[0] != "steps"] + [f"steps={steps}"]
    start = [*LAUNCHER, str(processes)] if processes > 1 else []
    words = [*settings, setting("resume", known.workspace.show(run))]
    return [sys.executable, *start, *train_command(words)[1:]]
