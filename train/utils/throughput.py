"""Measurement of the speed and the peak memory of training steps."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import psutil
import torch


class Clock:
    """Measures the time of `images` since the last `take`, and the peak memory, without what happens while paused.

    Encoding, loading, validation and sampling thus do not count. The peak of a process, which is reported without a
    GPU, cannot be reset and includes them.
    """

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self.peaks = dict.fromkeys(devices, 0.0)  # GB
        self.images, self.spent, self.began = 0, 0.0, time.perf_counter()
        self.reset_peaks()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Context manager that does not count the time."""
        self.spent += time.perf_counter() - self.began
        self.peaks = {device: max(peak, peak_memory_gb(device)) for device, peak in self.peaks.items()}
        yield
        self.reset_peaks()
        self.began = time.perf_counter()

    def take(self) -> float:
        """Return the images per second since the last call; call it while paused."""
        speed = self.images / self.spent
        self.images, self.spent = 0, 0.0
        return speed

    def reset_peaks(self) -> None:
        for device in self.peaks:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)

    def peak_memory(self) -> dict[str, float]:
        """Return the metrics of peak memory in GB: `peak_memory_gb`, and with `/cuda:1` that of each further device."""
        numbers = (round(peak, 3) for peak in self.peaks.values())
        names = ("peak_memory_gb" + (f"/{device}" if i else "") for i, device in enumerate(self.peaks))
        return dict(zip(names, numbers, strict=True))


def peak_memory_gb(device: torch.device) -> float:
    """Return the peak of allocated memory on the GPU since it was reset, or else that of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if sys.platform == "win32":
        return float(psutil.Process().memory_info().peak_wset) / 1e9
    import resource  # Windows has none

    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
