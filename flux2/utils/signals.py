"""SIGTERM handled like Ctrl-C: a command removes its incomplete files and reports that it was stopped.

By default SIGTERM (from `kill`, `timeout` or a scheduler) ends Python at once and leaves incomplete files.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM  # exit codes, as a shell reports them


class Terminated(KeyboardInterrupt):
    """The process received SIGTERM."""


def terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Context manager in which SIGTERM raises `Terminated`; it has no effect outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def exit_code(stop: KeyboardInterrupt) -> int:
    return TERMINATED if isinstance(stop, Terminated) else INTERRUPTED
