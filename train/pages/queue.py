"""A queue of commands, one after the other on each device, that survives a restart of the page: it is files.

Each job is `NNNNNN.json` in the queue's folder, with its output in `NNNNNN.log`. A started job is a process of its own
(runner.py), which writes its end into the file. So the studio can be closed, killed and started again, and two studios
can use one folder: starting a job holds a lock, and only a file that says `waiting` is started.

A file of the queue is a program that will run, and a folder of runs with a queue in it may come from someone else. So a
job has a seal, made with a secret that this user has on this machine, and none without it is started; what is sealed is
one of the commands that the studio starts (`is_known`).
"""

from __future__ import annotations

import hmac
import json
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock

from data.files import user_path
from flux2.utils.json_files import read_json
from train.pages.settings import SettingError, check_word
from train.utils.checks import is_count
from train.utils.files import write_whole
from train.utils.redact import masked_command, masked_text

WAITING, RUNNING, DONE, FAILED, STOPPED, LOST = "waiting", "running", "done", "failed", "stopped", "lost"
STATES = (WAITING, RUNNING, DONE, FAILED, STOPPED, LOST)
ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = {ROOT / "train" / f"{name}.py" for name in ("run", "cache", "caption", "evaluate")}
MODULES = ("flux2.generate", "flux2.export", "train.hub", "train.pages.near_duplicates")
LAUNCHER = ("-m", "accelerate.commands.launch", "--num_processes")  # and their number
MOST_BYTES = 1 << 20  # of a job's file
TAIL = 20_000  # bytes of a log that are shown
POLL_SECONDS = 1.0
RECENT_SECONDS = 300.0
MOST_JOBS = 999_999
FILE_NAME, NUMBERED = "{:06d}.json", re.compile(r"[0-9]{6}\.json")


def typed(command: Sequence[str]) -> str:
    """Return a command as one types it, without secrets."""
    return masked_command(["python" if word == sys.executable else word for word in command])


@dataclass(frozen=True)
class QueuedJob:
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
    seal: str = ""  # of number and command

    @property
    def shown(self) -> str:
        """The command as one types it, without secrets."""
        return typed(self.command)

    @property
    def is_active(self) -> bool:
        return self.state in (WAITING, RUNNING)

    @property
    def is_recent(self) -> bool:
        """Whether every page shows the job: while it is active, and some minutes after its end."""
        return self.is_active or time.time() - max(self.ended, self.started) < RECENT_SECONDS


def job_of(values: Any) -> QueuedJob | None:
    """Return the job in the content of a file, which may come from someone else; None if it is none."""
    kinds = {"int": int, "str": str, "float": int | float, "list[str]": list, "int | None": int | None}
    if not isinstance(values, dict) or set(values) != set(QueuedJob.__dataclass_fields__):
        return None
    for name, field in QueuedJob.__dataclass_fields__.items():
        if not isinstance(values[name], kinds[str(field.type)]) or isinstance(values[name], bool):
            return None
    words = values["command"]
    if not words or not all(isinstance(word, str) for word in words) or values["state"] not in STATES:
        return None
    is_whole = is_count(values["number"], 1) and values["number"] <= MOST_JOBS and values["seal"].isascii()
    return QueuedJob(**values) if is_whole and values["pid"] >= 0 else None


def read_job(file: Path) -> QueuedJob | None:
    """Return the job in a file; None if it disappeared or is none."""
    try:
        found = job_of(read_json(file, MOST_BYTES))
    except (OSError, ValueError):
        return None
    return found if found is not None and file.name == FILE_NAME.format(found.number) else None


def write_job(file: Path, job: QueuedJob) -> None:
    write_whole(file, json.dumps(asdict(job), indent=1) + "\n")


def is_alive(job: QueuedJob) -> bool:
    """Return whether the runner of a job still runs."""
    try:
        process = psutil.Process(job.pid)
        return abs(process.create_time() - job.born) < 2 and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, OverflowError):  # no process can have this number
        return False


def is_known(command: Sequence[str]) -> bool:
    """Return whether the studio starts this command: one of this project's, whose settings name no code to call."""
    if command[0] != sys.executable or len(command) < 3:
        return False
    words = list(command[1:])
    if tuple(words[:3]) == LAUNCHER and len(words) > 4 and re.fullmatch(r"[1-9]\d{0,3}", words[3]):
        words = words[4:]
    elif words[0] == "-m":
        return words[1] in MODULES
    if any("\0" in word for word in words) or Path(words[0]).resolve() not in SCRIPTS:
        return False
    try:
        for word in words[1:]:
            check_word(word)
    except SettingError:
        return False
    return True


def _interrupt(pid: int) -> None:
    """Ask a runner to stop. Raises ValueError on Windows if it was started in another console."""
    if sys.platform != "win32":
        os.kill(pid, signal.SIGINT)
        return
    try:
        os.kill(pid, signal.CTRL_BREAK_EVENT)
    except OSError as error:
        raise ValueError(
            "this job runs in another window, which Windows does not reach. Press Ctrl-Break there"
        ) from error


def secret_of(file: Path) -> str:
    """Return the secret in `file`, which only its owner reads; it is made if there is none."""
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    owner_only = partial(os.open, mode=0o600)
    with suppress(FileExistsError), open(file, "x", encoding="utf-8", opener=owner_only) as new:
        new.write(secrets.token_urlsafe(32) + "\n")
    os.chmod(file, 0o600)
    secret = file.read_text(encoding="utf-8").strip()
    if len(secret) < 16:
        raise ValueError(f"{file} holds no secret. Delete it, and the next start makes a new one")
    return secret


def own_secret(name: str = "studio-secret") -> Path:
    """Return the file of a secret, by default of the one that seals jobs: in the home folder, not in one of runs."""
    return user_path(os.environ.get("XDG_STATE_HOME") or "~/.local/state") / "flux2-lora" / name


class Queue:
    """The jobs in a folder. `start_next` starts what may start; a thread of `run` calls it.

    Args:
        known: Function that returns whether a command may be started.
    """

    def __init__(self, folder: Path, known: Callable[[Sequence[str]], bool] = is_known) -> None:
        self.folder, self.known = folder, known
        self.problem = ""  # why nothing can be started now
        self._secret = secret_of(own_secret()).encode()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def seal(self, number: int, command: Sequence[str]) -> str:
        return hmac.new(self._secret, json.dumps([number, *command]).encode(), "sha256").hexdigest()

    def file(self, number: int) -> Path:
        return self.folder / FILE_NAME.format(number)

    def log(self, number: int) -> Path:
        return self.folder / f"{number:06d}.log"

    @property
    def lock(self) -> FileLock:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        about = self.folder.stat()
        if sys.platform != "win32" and (about.st_uid != os.getuid() or about.st_mode & 0o022):
            raise ValueError(f"{self.folder} is another user's, or others may write there, and its files are run")
        return FileLock(self.folder / ".lock", timeout=10)

    def jobs(self) -> list[QueuedJob]:
        """Return all jobs, the newest first. What was running and ended without a word is lost."""
        names = os.listdir(self.folder) if self.folder.is_dir() else []
        files = [self.folder / name for name in sorted(names, reverse=True) if NUMBERED.fullmatch(name)]
        found = [job for file in files if (job := read_job(file)) is not None]
        return [replace(job, state=LOST) if job.state == RUNNING and not is_alive(job) else job for job in found]

    def job(self, number: int) -> QueuedJob:
        """Return a job. Raises ValueError if there is none of that number."""
        found = next((job for job in self.jobs() if job.number == number), None)
        if found is None:
            raise ValueError(f"job {number} is not in {self.folder}")
        return found

    def add(self, title: str, command: Sequence[str], device: str = "", folder: Path | None = None) -> QueuedJob:
        """Append a command to the queue, and start it if its device is free. Raises ValueError if it is not known."""
        if not self.known(command):
            raise ValueError(f"{masked_command(command)} is no command that the studio starts")
        with self.lock:
            numbers = [int(file.stem) for file in self.folder.iterdir() if NUMBERED.fullmatch(file.name)]
            number, writes = 1 + max(numbers, default=0), "" if folder is None else str(folder)
            sealed = self.seal(number, command)
            job = QueuedJob(number, title, list(command), device, writes, created=time.time(), seal=sealed)
            write_job(self.file(number), job)
        self.start_next()
        return job

    def start_next(self) -> None:
        """Start the oldest waiting job of each device on which none is running."""
        with self.lock:
            jobs = self.jobs()
            busy = {job.device for job in jobs if job.state == RUNNING}
            for job in reversed(jobs):
                own = hmac.compare_digest(job.seal, self.seal(job.number, job.command))
                if job.state == WAITING and not (own and self.known(job.command)):
                    self.log(job.number).write_text(
                        "error: this is no command that the studio starts\n", encoding="utf-8"
                    )
                    write_job(self.file(job.number), replace(job, state=FAILED, ended=time.time()))
                elif job.state == WAITING and job.device not in busy:
                    busy.add(job.device)
                    self._start(job)

    def _start(self, job: QueuedJob) -> None:
        runner = [sys.executable, "-m", "train.pages.runner", str(self.file(job.number))]
        alone: dict[str, Any] = {"start_new_session": True}  # a Ctrl-C of the studio does not reach it
        if sys.platform == "win32":
            alone = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        environment["PYTHONUTF8"] = "1"  # the log is read as UTF-8, which Windows does not write into files otherwise
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
                _interrupt(job.pid)

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
                try:
                    if self.folder.is_dir():
                        self.start_next()
                    self.problem = ""
                except Exception as error:  # of the file system, or another's lock: it may be gone in a second
                    self.problem = f"the queue waits: {error}"

        self._thread = threading.Thread(target=serve, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop starting jobs. Those that run go on."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
