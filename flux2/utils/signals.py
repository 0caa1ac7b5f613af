"""SIGTERM as Ctrl-C for the commands here: what is half written is removed, and the command says that it was stopped.

Without it Python ends at once when it is terminated (`kill`, `timeout`, a scheduler), and leaves unfinished files.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM  # exit codes, as a shell gives them


class Terminated(KeyboardInterrupt):
    """SIGTERM came."""


def terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Within this context SIGTERM raises `Terminated`. Does nothing beside the main thread, which gets all signals."""
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
