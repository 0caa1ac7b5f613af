"""Run steps with Triton's kernels on a simulated GPU: their memory and launches next to those of PyTorch's operations.

    .venv-cuda/bin/python benchmarks/kernels_simulated.py --only "fp8 90"

Needs an environment with a CUDA build of PyTorch (`make .venv-cuda/installed`), and no GPU: see
tests/simulated_gpu/README.md. The kernels are compiled for the compute capability and launched; nothing computes, so it
shows no times. Two double and three single blocks have dev's true widths, with one image of 1024 px and 512 prompt
tokens.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)
sys.path.insert(1, str(ROOT / "tests"))

import flux2  # noqa: F401, I001  before torch: it sets how long threads spin

from collections import Counter
from dataclasses import replace
from typing import Any

import torch

from benchmarks.common import free_memory
from benchmarks.models import Inputs, make_precision
from benchmarks.simulated_cases import run_cases
from flux2 import adapters
from flux2.layers import fused_elementwise
from flux2.layers.attention import preferred_backends
from flux2.memory.activation_checkpointing import set_policy
from flux2.memory.kernels import use_kernels
from flux2.models.variants import DEV
from flux2.quantization.precision import Precision
from simulated_gpu.simulated import device, empty_transformer

RESULT = ROOT / "benchmarks" / "results" / "kernels_simulated.json"
CAPABILITIES = (80, 90, 120)
CUDA = torch.device("cuda")


def step(storage: str, policy: str, kernels: bool) -> dict[str, Any]:
    """Return what the second step takes: GB in addition to model and batch, all launches, and those of each kernel."""
    config = replace(DEV, double_blocks=2, single_blocks=3)
    in_fp8 = storage == "fp8" and Precision(torch.bfloat16, "fp8").multiplies_in_8_bits(CUDA)
    model = empty_transformer(config, make_precision(None if storage == "bf16" else storage, in_fp8), CUDA)
    set_policy(model, policy, attention=preferred_backends(None, CUDA))
    use_kernels(model, kernels)
    adapters.attach(model, rank=16)
    for parameter in adapters.adapter_parameters(model):
        parameter.data = parameter.data.to(CUDA)
    inputs = Inputs(config, 64, 512, CUDA)
    before = torch.cuda.memory_allocated()
    inputs.backward(model)
    torch.cuda.reset_peak_memory_stats()

    counts: Counter[str] = Counter()
    launch, launches = fused_elementwise.launch, device().simulated_gpu_launches()

    def counted(name: str, *args: Any, **options: Any) -> None:
        counts[name] += 1
        launch(name, *args, **options)

    fused_elementwise.launch = counted
    try:
        inputs.backward(model)
    finally:
        fused_elementwise.launch = launch
    launches = device().simulated_gpu_launches() - launches
    return {
        "GB": (torch.cuda.max_memory_allocated() - before) / 1e9,
        "launches": launches,
        "of kernels": dict(sorted(counts.items())),
    }


def compare(storage: str, policy: str) -> dict[str, Any]:
    """Return what a step takes with PyTorch's operations and with Triton's kernels."""
    found = {}
    for name in ("torch", "triton"):
        found[name] = step(storage, policy, kernels=name == "triton")
        free_memory(CUDA)
    return found


if __name__ == "__main__":
    about = {
        "what": "steps of two double and three single blocks of dev, 1024 px: simulated memory and launches",
        "hardware": "simulated GPU (tests/simulated_gpu)",
    }
    run_cases(__file__, about, CAPABILITIES, compare, RESULT)
