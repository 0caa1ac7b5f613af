"""Jobs that submitit runs, under Slurm or locally: what happens when their time is nearly up.

submitit asks Slurm for a signal (SIGUSR2) some time before the limit, and its own handler starts the job again at once,
in the middle of a step. Here a run that trains first finishes its step and saves, as on any request to stop
(train/stopping.py), and then submitit's handler does its part: `scontrol requeue`. Started again, the job goes on from
its checkpoint. A run that does not train yet has nothing to save, and is started again at once.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from train import jobs
from train.stopping import Stopped


def is_submitted() -> bool:
    """Whether submitit started this process."""
    return "SUBMITIT_EXECUTOR" in os.environ and "SUBMITIT_FOLDER" in os.environ


def was_started_before(folder: Path) -> bool:
    """Whether the job in `folder` is started again by its scheduler: after a time limit, or when its node failed."""
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    return jobs.record(folder).get("status") == jobs.REQUEUED or (restarts.isdecimal() and int(restarts) > 0)


@contextmanager
def within_time_limit(folder: Path) -> Iterator[None]:
    """Within this context submitit's warning makes a run save before it ends, and the scheduler start it again.

    Raises SystemExit, in place of `Stopped`, when the job will be started again.
    """
    number = getattr(signal, "SIGUSR2", None)
    handler = signal.getsignal(number) if number is not None and is_submitted() else None
    if number is None or not callable(handler):
        yield
        return

    def again() -> None:
        jobs.note(folder, status=jobs.REQUEUED, error="")
        handler(number, None)

    def warned(signum: int, frame: FrameType | None) -> None:
        if callable(signal.getsignal(signal.SIGUSR1)):  # the loop listens
            signal.raise_signal(signal.SIGUSR1)
        else:
            again()

    signal.signal(number, warned)
    try:
        yield
    except Stopped as stop:
        if stop.number == signal.SIGUSR1:
            again()
        raise
    finally:
        signal.signal(number, handler)
