"""A queue of commands, one after the other on each device, that survives a restart of the page: it is files.

Each job is `NNNNNN.json` in the queue's folder, with its output in `NNNNNN.log`. A started job is a process of its own
(runner.py), which writes its end into the file. So the studio can be closed, killed and started again, and two studios
can use one folder: starting a job holds a lock, and only a file that says `waiting` is started.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock

from flux2.utils.json_files import read_json
from train.utils.checks import is_count
from train.utils.files import write_whole
from train.utils.redact import masked_command, masked_text

WAITING, RUNNING, DONE, FAILED, STOPPED, LOST = "waiting", "running", "done", "failed", "stopped", "lost"
STATES = (WAITING, RUNNING, DONE, FAILED, STOPPED, LOST)
MOST_BYTES = 1 << 20  # of a job's file
TAIL = 20_000  # bytes of a log that are shown
POLL_SECONDS = 1.0


def typed(command: Sequence[str]) -> str:
    """Return a command as one types it, without secrets."""
    return masked_command(["python" if word == sys.executable else word for word in command])


@dataclass(frozen=True)
class Job:
    """A command and what became of it. Lost: it ended without saying how, for example because it was killed."""

    number: int
    title: str
    command: list[str]  # words, the first of which is the program
    device: str = ""  # commands of one device run one after the other
    folder: str = ""  # that it writes, such as the folder of a run
    state: str = WAITING
    created: float = 0.0
    started: float = 0.0
    ended: float = 0.0
    pid: int = 0  # of the runner
    born: float = 0.0  # its creation time: another process may have its pid later
    code: int | None = None

    @property
    def shown(self) -> str:
        """The command as one types it, without secrets."""
        return typed(self.command)

    @property
    def is_active(self) -> bool:
        return self.state in (WAITING, RUNNING)


def job_of(values: Any) -> Job | None:
    """Return the job in the content of a file, which may come from someone else; None if it is none."""
    kinds = {"int": int, "str": str, "float": int | float, "list[str]": list, "int | None": int | None}
    if not isinstance(values, dict) or set(values) != set(Job.__dataclass_fields__):
        return None
    for name, field in Job.__dataclass_fields__.items():
        if not isinstance(values[name], kinds[str(field.type)]) or isinstance(values[name], bool):
            return None
    words = values["command"]
    if not words or not all(isinstance(word, str) for word in words) or values["state"] not in STATES:
        return None
    return Job(**values) if is_count(values["number"], 1) else None


def read_job(file: Path) -> Job | None:
    """Return the job in a file; None if it disappeared or is none."""
    try:
        return job_of(read_json(file, MOST_BYTES))
    except (OSError, ValueError):
        return None


def write_job(file: Path, job: Job) -> None:
    write_whole(file, json.dumps(asdict(job), indent=1) + "\n")


def is_alive(job: Job) -> bool:
    """Return whether the runner of a job still runs."""
    try:
        process = psutil.Process(job.pid)
        return abs(process.create_time() - job.born) < 2 and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


class Queue:
    """The jobs in a folder. `start_next` starts what may start; a thread of `run` calls it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def file(self, number: int) -> Path:
        return self.folder / f"{number:06d}.json"

    def log(self, number: int) -> Path:
        return self.folder / f"{number:06d}.log"

    @property
    def lock(self) -> FileLock:
        self.folder.mkdir(parents=True, exist_ok=True)
        return FileLock(self.folder / ".lock", timeout=10)

    def jobs(self) -> list[Job]:
        """Return all jobs, the newest first. What was running and ended without a word is lost."""
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        files = [self.folder / name for name in sorted(names, reverse=True) if re.fullmatch(r"\d{6}\.json", name)]
        found = [job for file in files if (job := read_job(file)) is not None]
        return [replace(job, state=LOST) if job.state == RUNNING and not is_alive(job) else job for job in found]

    def job(self, number: int) -> Job:
        """Return a job. Raises ValueError if there is none of that number."""
        found = next((job for job in self.jobs() if job.number == number), None)
        if found is None:
            raise ValueError(f"job {number} is not in {self.folder}")
        return found

    def add(self, title: str, command: Sequence[str], device: str = "", folder: Path | None = None) -> Job:
        """Append a command to the queue, and start it if its device is free."""
        with self.lock:
            number = 1 + max((int(file.stem) for file in self.folder.glob("[0-9]*.json")), default=0)
            job = Job(number, title, list(command), device, "" if folder is None else str(folder), created=time.time())
            write_job(self.file(number), job)
        self.start_next()
        return job

    def start_next(self) -> None:
        """Start the oldest waiting job of each device on which none is running."""
        with self.lock:
            jobs = self.jobs()
            busy = {job.device for job in jobs if job.state == RUNNING}
            for job in reversed(jobs):
                if job.state == WAITING and job.device not in busy:
                    busy.add(job.device)
                    self._start(job)

    def _start(self, job: Job) -> None:
        runner = [sys.executable, "-m", "train.pages.runner", str(self.file(job.number))]
        alone: dict[str, Any] = {"start_new_session": True}  # a Ctrl-C of the studio does not reach it
        if os.name == "nt":
            alone = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}  # type: ignore[attr-defined]
        root = Path(__file__).resolve().parents[2]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
        with self.log(job.number).open("ab") as log:
            process = subprocess.Popen(
                runner, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, **alone
            )
        born = psutil.Process(process.pid).create_time()
        running = replace(job, state=RUNNING, started=time.time(), pid=process.pid, born=born)
        write_job(self.file(job.number), running)
        threading.Thread(target=process.wait, daemon=True).start()  # leaves no zombie

    def stop(self, number: int) -> None:
        """Take a waiting job out of the queue, or ask a running one to stop, as Ctrl-C does: training saves first."""
        with self.lock:
            job = self.job(number)
            if job.state == WAITING:
                write_job(self.file(number), replace(job, state=STOPPED, ended=time.time()))
            elif job.state == RUNNING:
                os.kill(job.pid, signal.SIGINT if os.name != "nt" else signal.CTRL_BREAK_EVENT)  # type: ignore[attr-defined]

    def tail(self, number: int) -> str:
        """Return the end of a job's output, without secrets and without what a progress bar wrote over."""
        try:
            with self.log(number).open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - TAIL))
                text = file.read().decode(errors="replace")
        except OSError:
            return ""
        lines = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
        return masked_text("\n".join(line for line in lines if line.strip()))

    def run(self) -> None:
        """Start jobs as devices become free, in a thread, until `close`."""

        def serve() -> None:
            while not self._stopped.wait(POLL_SECONDS):
                if self.folder.is_dir():
                    self.start_next()

        self._thread = threading.Thread(target=serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop starting jobs. Those that run go on."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
