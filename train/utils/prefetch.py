"""What a step needs is made while the step before it is trained: its batches are read, its noise is drawn."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Made = TypeVar("Made")


class Prefetcher(Generic[Made]):
    """`make(step)` in one thread of its own, so that it needs no lock, and at most one step ahead.

    Args:
        make: a function of the step (from 0) alone.
    """

    def __init__(self, make: Callable[[int], Made]) -> None:
        self._make = make
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._begun: tuple[int, Future[Made]] | None = None

    def begin(self, step: int) -> None:
        """Start on a step.

        Best before this thread waits for a device or is long in C++: Python runs one thread at a time.
        """
        self._begun = step, self._thread.submit(self._make, step)

    def get(self, step: int) -> Made:
        """What was made for a step, or is made now if another was begun. What `make` raised is raised here."""
        begun, self._begun = self._begun, None
        future = begun[1] if begun is not None and begun[0] == step else self._thread.submit(self._make, step)
        return future.result()

    def close(self) -> None:
        """Ends the thread, after what it is making now."""
        self._thread.shutdown(cancel_futures=True)
