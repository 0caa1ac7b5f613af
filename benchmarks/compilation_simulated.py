"""Compile blocks for a simulated GPU: CPU seconds of compiling, and the memory of a step beside uncompiled blocks.

    .venv-cuda/bin/python benchmarks/compilation_simulated.py --only "fp8 90"

Needs an environment with a CUDA build of PyTorch (`make .venv-cuda/installed`), and no GPU: see
tests/simulated_gpu/README.md. Inductor generates Triton's kernels and compiles them for the compute capability, on this
machine's processor; nothing computes, so it shows no times of steps. Two double and three single blocks have dev's true
widths, with one image of 1024 px and 512 prompt tokens. A graph is a kind of block with its forward and backward.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)
sys.path.insert(1, str(ROOT / "tests"))

import flux2  # noqa: F401, I001  before torch: it sets how long threads spin

import time
from dataclasses import replace
from typing import Any

import torch
from torch._dynamo.utils import counters

from benchmarks.common import free_memory
from benchmarks.models import Inputs, make_precision
from benchmarks.simulated_cases import run_cases
from flux2 import adapters
from flux2.layers.attention import preferred_backends
from flux2.memory.activation_checkpointing import set_policy
from flux2.models.variants import DEV
from flux2.quantization.precision import Precision
from simulated_gpu.simulated import empty_transformer

RESULT = ROOT / "benchmarks" / "results" / "compilation_simulated.json"
CAPABILITIES = (90, 120)
CUDA = torch.device("cuda")


def step(storage: str, policy: str, compile: bool) -> dict[str, Any]:
    """Return the CPU seconds of the first step, and the GB that steps take in addition to model and batch."""
    config = replace(DEV, double_blocks=2, single_blocks=3)
    in_fp8 = storage == "fp8" and Precision(torch.bfloat16, "fp8").multiplies_in_8_bits(CUDA)
    model = empty_transformer(config, make_precision(None if storage == "bf16" else storage, in_fp8), CUDA)
    set_policy(model, policy, attention=preferred_backends(None, CUDA), compile=compile)
    adapters.attach(model, rank=16)
    for parameter in adapters.adapter_parameters(model):
        parameter.data = parameter.data.to(CUDA)
    inputs = Inputs(config, 64, 512, CUDA)
    before, begun = torch.cuda.memory_allocated(), time.process_time() + sum(os.times()[2:4])
    inputs.backward(model)
    seconds = time.process_time() + sum(os.times()[2:4]) - begun
    torch.cuda.reset_peak_memory_stats()  # without what compiling took
    inputs.backward(model)
    return {"CPU seconds": seconds, "GB": (torch.cuda.max_memory_allocated() - before) / 1e9}


def compare(storage: str, policy: str) -> dict[str, Any]:
    """Return what a step takes with and without compilation."""
    found = {"uncompiled GB": step(storage, policy, compile=False)["GB"]}
    free_memory(CUDA)
    torch._dynamo.reset()
    counters.clear()
    compiled = step(storage, policy, compile=True)
    free_memory(CUDA)
    graphs = counters["stats"]["unique_graphs"]
    assert not counters["graph_break"], counters["graph_break"]
    found |= {"compiled GB": compiled["GB"], "graphs": graphs}
    return found | {"CPU seconds a graph": compiled["CPU seconds"] / graphs}


if __name__ == "__main__":
    about = {
        "what": "steps of two double and three single blocks of dev, 1024 px: simulated memory, measured CPU time",
        "hardware": "simulated GPU (tests/simulated_gpu), two CPU cores",
    }
    run_cases(__file__, about, CAPABILITIES, compare, RESULT)
