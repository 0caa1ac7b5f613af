"""Memory that does not suffice, as one message: what was being done, how much was asked for, how much was free."""

from __future__ import annotations

import gc
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

from flux2.utils.cli import is_out_of_memory
from flux2.utils.text import gigabytes

UNITS = {"B": 1, "bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def free_memory() -> None:
    """Free tensors that nothing refers to any more, on the GPU too."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


class OutOfMemory(ValueError):  # noqa: N818
    """Memory did not suffice.

    Attributes:
        doing: what was being done, as in "while sampling after step 5".
        phase: which of the planner's phases that belongs to.
        asked, free: bytes; 0 where that is not known.
        saved: what became of the training state.
    """

    def __init__(self, doing: str, phase: str, asked: int, free: int) -> None:
        self.doing, self.phase, self.asked, self.free, self.saved = doing, phase, asked, free, ""
        super().__init__(doing)

    def __str__(self) -> str:
        return f"{self.what} {self.saved}".strip()

    @property
    def what(self) -> str:
        """What happened, without what became of the state."""
        asked = f"{gigabytes(self.asked)} asked for" if self.asked else "an unknown amount asked for"
        free = f", {gigabytes(self.free)} free" if self.free else ""
        return f"out of memory {self.doing}: {asked}{free}."


def amounts(text: str) -> tuple[int, int]:
    """(asked, free) bytes in PyTorch's message; 0 for what it does not say."""
    number = r"([\d.]+) (bytes|[KMGT]iB|B)"
    asked = re.search(f"[Tt]ried to allocate {number}", text)
    free = re.search(f"of which {number} is free", text)
    return tuple(int(float(found[1]) * UNITS[found[2]]) if found else 0 for found in (asked, free))  # type: ignore[return-value]


@contextmanager
def watched(doing: str, phase: str, device: torch.device) -> Iterator[None]:
    """Within this context memory that does not suffice is an `OutOfMemory`, and what was in the making is let go."""
    failed = None
    try:
        yield
    except OutOfMemory:
        raise
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        asked, free = amounts(str(error))
        traceback.clear_frames(error.__traceback__)  # they hold the tensors of the step
        error.__traceback__ = None
        failed = OutOfMemory(doing, phase, asked, free)
    if failed is not None:
        free_memory()
        if device.type != "cuda" and not failed.free:
            failed.free = psutil.virtual_memory().available
        raise failed
