"""Parts that the benchmarks share: options, the clock, memory limits, and result files."""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from train.planner.gpus import CONTEXT_GB, GIB

RESULTS = Path(__file__).resolve().parent / "results"


def hardware(device: torch.device) -> str:
    """Return the name of the GPU, or the name of the processor and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor()}, {torch.get_num_threads()} threads"


def processor() -> str:
    """Return the model name of the processor, or its architecture if the system does not report the name."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def environment() -> dict[str, Any]:
    """Return the entries of a result that describe the machine and its load."""
    return {
        "processor": processor(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


# ------------------------------------------------------------------ options


def integer_type(low: int) -> Callable[[str], int]:
    """Return the `type` of an argument that must be an integer >= `low`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text!r} must be an integer >= {low}")
        return int(text)

    return parse


def add_case_options(parser: argparse.ArgumentParser, examples: str, out: str) -> None:
    """Add `--only`, `--on` and `--out`, for a benchmark with named cases. `out` is the name of the default file."""
    parser.add_argument("--only", default="", help=f"run only cases whose name contains this, e.g. {examples}")
    parser.add_argument("--on", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, help=f"result file (default: benchmarks/results/{out}.json)")


def choose_device(parser: argparse.ArgumentParser, name: str, cpu_options: str) -> torch.device:
    """Return the device `name`. Exit with a hint to use `cpu_options` if it is a GPU and there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        parser.error(f"no GPU found. Use {cpu_options} to test the script.")
    return torch.device(name)


def choose_cases(parser: argparse.ArgumentParser, cases: Sequence[Any], only: str) -> list[Any]:
    """Return the cases whose name contains `only`. Exit with the list of all names if there is none."""
    chosen = [case for case in cases if only in case.name]
    if not chosen:
        parser.error(f"--only {only!r} matches no case. Cases: {'; '.join(case.name for case in cases)}")
    return chosen


# ------------------------------------------------------------------ measuring


def read_clock(device: torch.device) -> float:
    """Return the time in seconds after all work queued on `device` has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def limit_memory(device: torch.device, gpu_memory_gb: float) -> bool:
    """Let PyTorch allocate as much as on a GPU of this size. Return whether this GPU is large enough for that."""
    total = torch.cuda.get_device_properties(device).total_memory
    share = (gpu_memory_gb - CONTEXT_GB) * GIB / total
    torch.cuda.set_per_process_memory_fraction(min(1.0, share), device.index or 0)
    return share <= 1


def peak_memory(device: torch.device) -> dict[str, float]:
    """Return the peak of PyTorch's CUDA allocator in GB."""
    return {
        "allocated": torch.cuda.max_memory_allocated(device) / 1e9,
        "reserved": torch.cuda.max_memory_reserved(device) / 1e9,
    }


def free_memory(device: torch.device) -> None:
    """Release the memory of deleted objects to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def run_cases(
    file: Path, result: dict[str, Any], cases: Sequence[Any], measure: Callable[[Any], Any], device: torch.device
) -> None:
    """Measure each case into `result["runs"]`; after each, write `file` and print the figures."""
    result["runs"] = {}
    write_result(file, result)  # fails here, before any case runs, if the file cannot be written
    for case in cases:
        result["runs"][case.name] = measure(case)
        write_result(file, result)
        free_memory(device)
        print(f"{case.name}: {json.dumps(result['runs'][case.name])}", flush=True)
    print(f"written to {file}")


# ------------------------------------------------------------------ results


def result_file(benchmark: str, machine: str) -> Path:
    """Return the default result file of a benchmark on the machine that `hardware` describes."""
    name = re.sub(r"\W+", "_", machine.split(",")[0]).strip("_").lower()
    return RESULTS / f"{benchmark}_{name}.json"


def write_result(file: Path, result: Mapping[str, Any]) -> None:
    """Write `result` as JSON to `file`, atomically."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.part")
    partial.write_text(json.dumps(result, indent=2) + "\n")
    partial.replace(file)
