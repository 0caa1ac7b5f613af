"""Starts runs by forking a process that has imported everything: a start takes one second and not ten.

What is forked is a process of its own, which can be sent any signal. One request a line, in JSON: `{"start": [...],
"out": FILE, "environment": {...}}` runs a command line such as `["train/run.py", "steps=3"]` as Python runs a script,
and answers with the process's id; `{"wait": ID}` answers with its exit code, -9 for one that was killed. This process
itself computes nothing, so it can be forked.

With `WRITTEN` in its environment a run notes in that file each of the class pictures' files that it has written, a line
`RANK NAME` of each. With `KILLED_AFTER`, as `1 .png 3`, process 1 kills itself when it has written three that end so.
With `HELD_AT`, a number of steps or a text, it waits where it has logged so many or said that, until there is the file
`OUT.go`: what a test does meanwhile meets it there, however busy the machine is.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch  # noqa: E402

import train.encoding.class_pictures  # noqa: E402
import train.run  # noqa: E402
import train.tracking.metrics  # noqa: E402


def note_written(log: Path, killed_after: str) -> None:
    """Let this process note in `log` what it writes of class pictures."""
    atomic_write, own = train.encoding.class_pictures.atomic_write, os.environ.get("RANK", "0")
    rank, suffix, most = killed_after.split()
    count = 0

    @contextmanager
    def noted(file: Path) -> Iterator[Path]:
        nonlocal count
        with atomic_write(file) as temporary:
            yield temporary
        with log.open("a") as lines:
            lines.write(f"{own} {file.name}\n")
        count += own == rank and file.suffix == suffix
        if count == int(most):
            os.kill(os.getpid(), signal.SIGKILL)

    train.encoding.class_pictures.atomic_write = noted


def hold(at: str, go: Path) -> None:
    """Let this process wait for the file `go` once it has logged step `at`, or has said `at`."""

    def wait() -> None:
        while not go.exists():
            time.sleep(0.01)

    if at.isdecimal():
        log = train.tracking.metrics.Metrics.log

        def logged(self: train.tracking.metrics.Metrics, step: int, **values: float) -> None:
            log(self, step, **values)
            if step == int(at):
                wait()

        train.tracking.metrics.Metrics.log = logged
        return
    for stream in (sys.stdout, sys.stderr):
        write = stream.write

        def written(text: str, stream: Any = stream, write: Callable[[str], int] = write) -> int:
            count = write(text)
            if at in text:
                stream.flush()
                wait()
            return count

        stream.write = written


def run(words: list[str], out: str, environment: dict[str, str]) -> int:
    """The exit code of one command line, whose output goes to the file `out`."""
    file = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    if "WRITTEN" in environment:
        note_written(Path(environment["WRITTEN"]), environment.get("KILLED_AFTER", "- - -1"))
    if "HELD_AT" in environment:
        hold(environment["HELD_AT"], Path(out + ".go"))
    sys.argv, sys.path[0] = words, str(Path(words[0]).resolve().parent)
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as stop:
        return int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
        return 70
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            status = os.waitpid(request["wait"], 0)[1]
            print(json.dumps(os.waitstatus_to_exitcode(status)), flush=True)
            continue
        child = os.fork()
        if child == 0:
            code = run(request["start"], request["out"], request["environment"])
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        print(json.dumps(child), flush=True)
