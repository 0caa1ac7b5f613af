"""Requests to stop and to sample: the effect of signals on a run, and its exit code.

SIGINT (Ctrl-C), SIGTERM (a scheduler, `kill`), SIGHUP (a closed terminal), SIGUSR1 (Slurm's warning before the time
limit: `--signal=USR1@120`) and SIGBREAK (Ctrl-Break of Windows) make the run finish its step, save and end. While it
loads and caches there is nothing to save, and it ends at once. train/loop.py sees the request,
`Checkpointer.save_and_raise_interrupted` saves. The exit code is 128 + the signal's number, as a shell reports a killed
process. SIGUSR2, or a file `sample` in the run folder, asks for a sample grid.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from train.utils.console import is_first_process

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGBREAK")
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))
SAMPLING = tuple(getattr(signal, name) for name in ("SIGUSR2",) if hasattr(signal, name))
STOPPING = b"\nstopping after this step; a second signal stops at once, without saving\n"
EARLY = (
    "stopped by {} with nothing lost: caches on disk keep what was computed, and checkpoints are unchanged. The same "
    "command starts again"
)


class Stopped(KeyboardInterrupt):
    """A signal, with its `number`, ends the program immediately with the exit code `code`."""

    def __init__(self, message: str = "", number: int = signal.SIGINT) -> None:
        super().__init__(message or EARLY.format(signal.Signals(number).name))
        self.number, self.code = number, 128 + number


class Interrupted(Stopped):
    """Training was stopped; the message says what is saved and how to resume. It also ends a sweep."""


@dataclass
class StopRequest:
    """The first signal that asked to stop: its number, None if there was none, and its `time.monotonic()`."""

    number: int | None = None
    time: float = 0.0

    def __bool__(self) -> bool:
        return self.number is not None


@dataclass
class SampleRequest:
    """Asks for a sample grid: by a signal to any process, or by `file`, which the first process looks for."""

    file: Path
    signaled: bool = False

    def take(self) -> bool:
        """Return whether a grid was asked for since the last call, and delete the file, which must be possible."""
        asked, self.signaled = self.signaled, False
        if is_first_process():
            with suppress(OSError):
                self.file.unlink()
                asked = True
        return asked


@contextmanager
def signal_handlers(
    note: Callable[[int, Callable[[], None]], None], numbers: Iterable[signal.Signals] = SIGNALS
) -> Iterator[None]:
    """Context manager that calls `note` for each of `numbers`, with a function that restores the handlers.

    SIGHUP stays ignored if it is, as under nohup. Outside the main thread no handlers can be set.
    """

    def restore() -> None:
        for name, handler in before.items():
            signal.signal(name, handler)

    def handler(number: int, frame: FrameType | None) -> None:
        note(number, restore)

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for name in numbers:
            if signal.Signals(name).name != "SIGHUP" or signal.getsignal(name) != signal.SIG_IGN:
                before[name] = signal.signal(name, handler)
    try:
        yield
    finally:
        restore()


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Context manager that records the first of `SIGNALS` in the object it yields; later ones have their old effect."""
    request = StopRequest()
    # a second signal within so many seconds repeats the first: the launcher of several processes repeats a Ctrl-C, and
    # `timeout` sends each signal twice. A keyboard sends SIGINT once, so a second one soon after it is a second Ctrl-C
    launched = "LOCAL_RANK" in os.environ

    def note(number: int, restore: Callable[[], None]) -> None:
        if not request:
            request.number, request.time = number, time.monotonic()
            if is_first_process():
                with suppress(OSError):  # the terminal may be closed; print must not be used in a handler
                    os.write(2, STOPPING)
        elif time.monotonic() > request.time + (2.0 if launched else 0.02 if number == signal.SIGINT else 0.3):
            restore()
            signal.raise_signal(number)

    with signal_handlers(note):
        yield request


@contextmanager
def sample_requests(file: Path) -> Iterator[SampleRequest]:
    """Context manager that records requests for a sample grid in the object it yields."""
    request = SampleRequest(file)

    def note(number: int, restore: Callable[[], None]) -> None:
        request.signaled = True

    with signal_handlers(note, SAMPLING):
        yield request


def stopped_at_once() -> AbstractContextManager[None]:
    """Return a context manager in which the first of `SIGNALS` raises `Stopped` immediately; the next one kills.

    A request for a sample grid has no effect.
    """

    def note(number: int, restore: Callable[[], None]) -> None:
        if number not in SAMPLING:
            restore()
            raise Stopped(number=number)

    return signal_handlers(note, (*SIGNALS, *SAMPLING))
