"""What the benchmarks share beside models: arguments, a clock, what a result says of the machine, and its file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch


def hardware(device: torch.device) -> str:
    """The GPU's name, as CUDA says it, or the processor's and how many threads compute."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()}, {torch.get_num_threads()} threads"


def processor() -> str:
    """The name of the processor's model, where the system tells it."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def environment() -> dict[str, Any]:
    """What a result says of the machine, and of how busy it is."""
    return {
        "processor": processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def at_least(low: int) -> Callable[[str], int]:
    """The type of an argument that is a whole number from `low`."""

    def number(given: str) -> int:
        if not given.isdecimal() or int(given) < low:
            raise argparse.ArgumentTypeError(f"{given!r} is no whole number from {low}")
        return int(given)

    return number


def write_result(file: Path, result: Mapping[str, Any]) -> None:
    """`result` as JSON in `file`, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.part")
    partial.write_text(json.dumps(result, indent=2) + "\n")
    partial.replace(file)


def clock(device: torch.device) -> float:
    """Seconds, when all that was asked of `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
