"""Run the command of a queue's job and write how it ended: `python -m train.pages.runner queue/000001.json`."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import FrameType

from train.pages.queue import DONE, FAILED, RUNNING, STOPPED, read_job, write_job

START_SECONDS = 30.0  # in which the studio writes that it started this process


def main() -> int:
    file, asked = Path(sys.argv[1]), list[int]()
    process: subprocess.Popen[bytes] | None = None

    def stop(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        if process is not None and sys.platform != "win32":  # there the command has the same Ctrl-Break
            process.send_signal(number)

    for name in ("SIGINT", "SIGTERM", "SIGBREAK"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), stop)
    until = time.monotonic() + START_SECONDS
    own = (
        (os.getpid(), os.getppid()) if sys.platform == "win32" else (os.getpid(),)
    )  # python.exe of a venv starts another
    while (job := read_job(file)) is None or job.state != RUNNING or job.pid not in own:
        if time.monotonic() > until:
            print(f"error: {file} does not say that it is started", file=sys.stderr)
            return 2
        time.sleep(0.05)
    try:
        process = subprocess.Popen(job.command, stdin=subprocess.DEVNULL)
    except OSError as error:
        print(f"error: {job.command[0]} cannot be started ({error.strerror or error})", file=sys.stderr)
        code = 127
    else:
        if asked and sys.platform == "win32":
            process.terminate()  # it may have begun after Ctrl-Break
        elif asked:
            process.send_signal(asked[0])
        code = process.wait()
    state = DONE if code == 0 else STOPPED if asked else FAILED
    write_job(file, replace(job, state=state, ended=time.time(), code=code))
    return code


if __name__ == "__main__":
    sys.exit(main())
