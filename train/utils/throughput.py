"""How fast training goes, and how much memory it takes."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Steps a second, without what is done between the steps.

    Attributes:
        steps: since the last `take`.
    """

    def __init__(self) -> None:
        self.steps, self.spent, self.began = 0, 0.0, time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        self.spent += time.perf_counter() - self.began
        yield
        self.began = time.perf_counter()

    def take(self) -> float:
        """Steps a second since the last time; for while it is paused."""
        speed = self.steps / self.spent
        self.steps, self.spent = 0, 0.0
        return speed


def peak_memory_gb(device: torch.device) -> float:
    """The most memory held so far: on the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
