"""Requests to stop: what a signal does to a run, and with which exit code the run then ends.

SIGINT (Ctrl-C), SIGTERM (a scheduler, `kill`), SIGHUP (a closed terminal) and SIGUSR1 (Slurm's warning before the time
limit: `--signal=USR1@120`) ask the run to finish its step, save and end. It ends with 128 + the signal's number, as a
shell reports a process that the signal killed.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from train.tracking import is_first_process

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1") if hasattr(signal, name))
STOPPING = b"\nstopping after this step; a second one stops at once, without saving\n"


def exit_code(number: int) -> int:
    """Of a process that ended because it was sent this signal."""
    return 128 + number


class Interrupted(KeyboardInterrupt):
    """Training was asked to stop and has saved its state; the message says how to go on. A sweep ends with it.

    Attributes:
        code: with which the command ends.
    """

    def __init__(self, message: str = "", number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.code = exit_code(number)


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


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Within this context the first of `SIGNALS` is noted in what is given; a later one does what it did before.

    SIGHUP stays ignored where it is, as under nohup. One within two seconds of the first is a part of it: of a Ctrl-C,
    the launcher of several processes sends them a second signal.
    """
    request = StopRequest()

    def note(number: int, frame: FrameType | None) -> None:
        if not request:
            request.number, request.at = number, time.monotonic()
            if is_first_process():
                with suppress(OSError):  # the terminal may be gone; print is not for a handler
                    os.write(2, STOPPING)
        elif time.monotonic() > request.at + 2:
            restore()
            signal.raise_signal(number)

    def restore() -> None:
        for name, handler in before.items():
            signal.signal(name, handler)

    names = [name for name in SIGNALS if not (name == getattr(signal, "SIGHUP", None) and is_ignored(name))]
    before = {name: signal.signal(name, note) for name in names}
    try:
        yield request
    finally:
        restore()


def is_ignored(number: int) -> bool:
    return signal.getsignal(number) == signal.SIG_IGN
