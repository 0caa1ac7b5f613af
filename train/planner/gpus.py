"""Memory and throughput of GPUs.

The throughputs are assumptions, not measurements of this project: 70 to 80 % of the data sheet's dense figure for large
matrix products, less for attention. FP8 is accumulated in float32, which consumer GPUs do at half of their FP8 rate;
their rate in INT8 is not halved. `measured` looks up measured step times in benchmarks/results.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.config.memory import HEADROOM_GB
from train.planner.step_memory import Work

GIB = 2**30
SIZES = (8, 12, 16, 24, 32, 48, 80, 96, 141)  # GB as advertised, which are about as many GiB
CONTEXT_GB = 1  # used by the driver, the CUDA context and the display before PyTorch allocates anything
MARGIN = 0.03  # share of the rest that the allocator loses to fragmentation
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"


def usable(gpu_memory_gb: float, headroom_gb: float = HEADROOM_GB) -> int:
    """Return the bytes that tensors can use on a GPU of this size, of which other programs take `headroom_gb`."""
    return int(max(gpu_memory_gb - CONTEXT_GB - headroom_gb, 0) * GIB * (1 - MARGIN))


@dataclass(frozen=True)
class Gpu:
    """Throughput of a class of GPUs."""

    name: str
    pattern: str  # regular expression for the device name in CUDA
    size: int  # GB
    bf16: float  # TFLOP/s of large matrix products
    fp8: float | None  # the same; None below compute capability 8.9
    int8: float  # tera-operations/s of the same in integers; from compute capability 7.5 on
    fp32: float  # the same, without TF32
    attention: float  # TFLOP/s of flash attention
    attention_backward: float
    memory: float  # GB/s, bandwidth of the GPU's memory
    bus: float  # GB/s, bandwidth from pinned host memory

    def seconds(self, work: Work, fused: bool = False) -> float:
        """Return the time of `work` without overlap; `fused` means that elementwise operations are compiled."""
        products = sum(flops / ((getattr(self, kind) or self.bf16) * 1e12) for kind, flops in work.flops.items())
        # 3/4 of the data sheet's bandwidth is reached; compiled code moves 1/4 of the bytes (docs/memory.md)
        return products + work.bytes * (0.25 if fused else 1.0) / (0.75 * self.memory * 1e9)


GPUS = (
    Gpu("H200", r"\bH200\b|\bGH200\b", 141, 790, 1500, 1500, 50, 600, 500, 4800, 50),
    Gpu("B200", r"\bB200\b|\bGB200\b", 180, 1600, 3000, 3000, 60, 1000, 800, 8000, 50),
    Gpu("RTX PRO 6000", r"RTX PRO 6000", 96, 400, 800, 800, 80, 300, 230, 1790, 50),
    Gpu("H100", r"\bH100\b", 80, 720, 1400, 1400, 50, 550, 450, 3350, 50),
    Gpu("A100", r"\bA100\b", 80, 250, None, 480, 18, 190, 150, 2000, 25),
    Gpu("L40S", r"\bL40S?\b|RTX 6000 Ada", 48, 260, 500, 500, 60, 180, 140, 864, 25),
    Gpu("A6000", r"\bA6000\b|\bA40\b", 48, 120, None, 240, 25, 90, 70, 768, 25),
    Gpu("RTX 5090", r"\b5090\b", 32, 190, 380, 640, 80, 150, 120, 1790, 50),
    Gpu("RTX 4090", r"\b4090\b", 24, 150, 290, 500, 65, 120, 95, 1008, 25),
    Gpu("RTX 3090", r"\b3090\b", 24, 62, None, 215, 28, 50, 40, 936, 25),
    Gpu("RTX 4080", r"\b4080\b|\b5080\b", 16, 90, 180, 300, 40, 75, 60, 717, 25),
    Gpu("RTX 4060 Ti", r"\b4060\b|\b5060\b", 16, 40, 80, 135, 18, 32, 26, 288, 12),
    Gpu("RTX 3060", r"\b3060\b|\b4070\b", 12, 24, None, 78, 11, 20, 16, 360, 25),
    Gpu("RTX 3070", r"\b3070\b|\b2080\b", 8, 30, None, 125, 16, 25, 20, 448, 25),
)
TYPICAL = {8: "RTX 3070", 12: "RTX 3060", 16: "RTX 4080", 24: "RTX 4090", 32: "RTX 5090", 48: "L40S", 80: "H100"}


def gpu(name: str | None, gpu_memory_gb: float) -> Gpu:
    """Return the entry for the CUDA device `name`, or for a typical GPU of that size if it is unknown."""
    for known in GPUS:
        if name is not None and re.search(known.pattern, name):
            return known
    typical = [TYPICAL[size] for size in TYPICAL if size <= gpu_memory_gb + 2] or [TYPICAL[8]]
    wanted = "H200" if gpu_memory_gb > 100 else "RTX PRO 6000" if gpu_memory_gb > 85 else typical[-1]
    return next(known for known in GPUS if known.name == wanted)


def measured(name: str | None, setting: Mapping[str, Any], folder: Path = RESULTS) -> float | None:
    """Return the measured seconds per step for this GPU and setting from the files of `folder`, or None.

    benchmarks/matrix.py writes these files: `hardware` is the GPU's name, and each of the `cases` has a `setting`.
    """
    for file in sorted(folder.glob("*.json")) if name else []:
        content = json.loads(file.read_text(encoding="utf-8"))
        cases = content.get("cases") if isinstance(content, dict) and content.get("hardware") == name else None
        for case in cases.values() if isinstance(cases, dict) else []:
            if case.get("setting") == dict(setting) and "seconds" in case:
                return float(case["seconds"]["median"])
    return None
