"""Prefetching: read the batches and draw the noise of a step while the previous step is trained."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Prefetcher(Generic[Item]):
    """Calls `make(step)`, a function of the step (from 0) alone, in a single thread, at most one step ahead."""

    def __init__(self, make: Callable[[int], Item]) -> None:
        self._make = make
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
        self._pending: tuple[int, Future[Item]] | None = None

    def begin(self, step: int) -> None:
        """Start to make the item of a step. Call it before waiting for a device: Python runs one thread at a time."""
        self._pending = step, self._thread.submit(self._make, step)

    def get(self, step: int) -> Item:
        """Return the item of a step, made now if another step was begun. Exceptions of `make` are raised here."""
        pending, self._pending = self._pending, None
        future = pending[1] if pending is not None and pending[0] == step else self._thread.submit(self._make, step)
        return future.result()

    def close(self) -> None:
        """End the thread after its current item."""
        self._thread.shutdown(cancel_futures=True)
