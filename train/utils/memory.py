"""Out-of-memory errors as one message: the activity, the requested bytes, and the free bytes."""

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
    """Free unreferenced tensors, including those of the GPU's allocator."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


class OutOfMemory(ValueError):  # noqa: N818
    """Out of memory `doing` something, in a `phase` of the planner; `asked` and `free` are bytes, 0 if unknown."""

    def __init__(self, doing: str, phase: str, asked: int, free: int) -> None:
        self.doing, self.phase, self.asked, self.free = doing, phase, asked, free
        self.saved = ""  # sentence about the training state
        super().__init__(doing)

    def __str__(self) -> str:
        return f"{self.what} {self.saved}".strip()

    @property
    def what(self) -> str:
        """The error without the sentence about the training state."""
        asked = f"{gigabytes(self.asked)} asked for" if self.asked else "an unknown amount asked for"
        free = f", {gigabytes(self.free)} free" if self.free else ""
        return f"out of memory {self.doing}: {asked}{free}."


def parse_gpu(text: str) -> str:
    """Return where PyTorch's message says that memory ran out, ` on cuda:1`; empty if there is only one GPU."""
    found = re.search(r"GPU (\d+) has a total capacity", text)
    return f" on cuda:{found[1]}" if found and torch.cuda.device_count() > 1 else ""


def parse_amounts(text: str) -> tuple[int, int]:
    """Return (requested, free) bytes in PyTorch's message; 0 if it does not contain them."""
    number = r"([\d.]+) (bytes|[KMGT]iB|B)"
    asked = re.search(f"[Tt]ried to allocate {number}", text)
    free = re.search(f"of which {number} is free", text)
    return tuple(int(float(found[1]) * UNITS[found[2]]) if found else 0 for found in (asked, free))  # type: ignore[return-value]


@contextmanager
def explain_oom(doing: str, phase: str, device: torch.device) -> Iterator[None]:
    """Context manager that turns out-of-memory errors into `OutOfMemory` and frees the tensors of the failed code."""
    failed = None
    try:
        yield
    except OutOfMemory:
        raise
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        asked, free = parse_amounts(str(error))
        traceback.clear_frames(error.__traceback__)  # the frames refer to the tensors of the step
        error.__traceback__ = None
        failed = OutOfMemory(f"{doing}{parse_gpu(str(error))}", phase, asked, free)
    if failed is not None:
        free_memory()
        if device.type != "cuda" and not failed.free:
            failed.free = psutil.virtual_memory().available
        raise failed
