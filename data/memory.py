"""Memory of data with millions of objects."""

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

T = TypeVar("T")


def in_parts(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Yield the items in lists of `size`, the last one shorter."""
    waiting = iter(items)
    while part := list(islice(waiting, size)):
        yield part


@contextmanager
def without_collection() -> Iterator[None]:
    """Context manager and decorator in which Python does not look for reference cycles.

    Where millions of objects are made, none of them in a cycle, it would look at all of them again and again.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
