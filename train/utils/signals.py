"""Requests to stop: what a signal does to a run, and with which exit code the run then ends.

SIGINT (Ctrl-C), SIGTERM (a scheduler, `kill`), SIGHUP (a closed terminal) and SIGUSR1 (Slurm's warning before the time
limit: `--signal=USR1@120`) ask the run to finish its step, save and end. While it loads and caches there is nothing to
finish, and it ends at once. It ends with 128 + the signal's number, as a shell reports a process that it killed.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from train.utils.console import is_first_process

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name))
STOPPING = b"\nstopping after this step; a second signal stops at once, without saving\n"
EARLY = (
    "stopped by {} with nothing lost: caches on disk keep what was computed, and checkpoints are as they were. The "
    "same command begins again"
)


class Stopped(KeyboardInterrupt):
    """A signal ends the program here and now.

    Attributes:
        number: of the signal.
        code: with which the command ends.
    """

    def __init__(self, message: str = "", number: int = signal.SIGINT) -> None:
        super().__init__(message or EARLY.format(signal.Signals(number).name))
        self.number, self.code = number, 128 + number


class Interrupted(Stopped):
    """Training was stopped; the message says what is saved and how to go on. A sweep ends with it."""


class StopRequest:
    """The first signal that asked to stop, if any did.

    Attributes:
        number: of the signal; None as long as none came.
        at: when it came, in seconds of the monotonic clock.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self.at = 0.0

    def __bool__(self) -> bool:
        return self.number is not None


def grace() -> float:
    """Seconds within which a second signal is a part of the first.

    The launcher of several processes sends them another one of a Ctrl-C, and `timeout` sends each twice.
    """
    return 2.0 if "LOCAL_RANK" in os.environ else 0.3


@contextmanager
def handled(note: Callable[[int, Callable[[], None]], None]) -> Iterator[None]:
    """Within this context `note` gets each of `SIGNALS` that comes, and what puts the handlers back as they were.

    SIGHUP stays ignored where it is, as under nohup. Outside of the main thread there are no handlers to set.
    """

    def restore() -> None:
        for name, handler in before.items():
            signal.signal(name, handler)

    def handler(number: int, frame: FrameType | None) -> None:
        note(number, restore)

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for name in SIGNALS:
            if signal.Signals(name).name != "SIGHUP" or signal.getsignal(name) != signal.SIG_IGN:
                before[name] = signal.signal(name, handler)
    try:
        yield
    finally:
        restore()


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Within this context the first of `SIGNALS` is noted in what is given; a later one does what it did before."""
    request = StopRequest()

    def note(number: int, restore: Callable[[], None]) -> None:
        if not request:
            request.number, request.at = number, time.monotonic()
            if is_first_process():
                with suppress(OSError):  # the terminal may be gone; print is not for a handler
                    os.write(2, STOPPING)
        elif time.monotonic() > request.at + grace():
            restore()
            signal.raise_signal(number)

    with handled(note):
        yield request


@contextmanager
def stopped_at_once() -> Iterator[None]:
    """Within this context the first of `SIGNALS` raises `Stopped`, wherever the program is; the next one kills."""

    def note(number: int, restore: Callable[[], None]) -> None:
        restore()
        raise Stopped(number=number)

    with handled(note):
        yield
