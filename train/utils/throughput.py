"""Measurement of training speed and peak memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Measures the speed of `steps` since the last `take`, without the time that it is paused."""

    def __init__(self) -> None:
        self.steps, self.spent, self.began = 0, 0.0, time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Context manager that does not count the time."""
        self.spent += time.perf_counter() - self.began
        yield
        self.began = time.perf_counter()

    def take(self) -> float:
        """Return the steps per second since the last call; call it while paused."""
        speed = self.steps / self.spent
        self.steps, self.spent = 0, 0.0
        return speed


def peak_memory_gb(device: torch.device) -> float:
    """Return the peak memory so far, on the GPU or else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
