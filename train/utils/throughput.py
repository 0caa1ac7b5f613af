"""Measurement of the speed and the peak memory of training steps."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Measures the speed of `steps` since the last `take`, and their peak memory, without what happens while paused.

    Encoding, loading, validation and sampling thus do not count. The peak of a process, which is reported without a
    GPU, cannot be reset and includes them.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.peak_memory_gb = device, 0.0
        self.steps, self.spent, self.began = 0, 0.0, time.perf_counter()
        reset_peak_memory(device)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Context manager that does not count the time."""
        self.spent += time.perf_counter() - self.began
        self.peak_memory_gb = max(self.peak_memory_gb, peak_memory_gb(self.device))
        yield
        reset_peak_memory(self.device)
        self.began = time.perf_counter()

    def take(self) -> float:
        """Return the steps per second since the last call; call it while paused."""
        speed = self.steps / self.spent
        self.steps, self.spent = 0, 0.0
        return speed


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory_gb(device: torch.device) -> float:
    """Return the peak of allocated memory on the GPU since it was reset, or else that of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
