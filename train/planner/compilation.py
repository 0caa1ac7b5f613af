"""Whether compiling the blocks saves a run more time than it takes: `memory.compile=auto`."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace

import torch

from flux2.memory.compile_blocks import check_compiles
from train.config.memory import choice_of
from train.config.run_config import RunConfig
from train.planner.from_config import gpu_name, workload_of
from train.planner.gpus import GIB, gpu
from train.planner.predictor import Planner
from train.utils.text import many

# Seconds to compile a graph, forward and backward: for a block of dev they are 7 to 17 CPU seconds on a simulated GPU
# (benchmarks/results/compilation_simulated.json)
SECONDS_PER_GRAPH = 15
GRAPHS = 3  # of a shape: double blocks, single blocks, and the first block, whose input has no gradient
MARGIN = 2  # the saving is predicted, not measured


def compiles(config: RunConfig, shapes: int) -> tuple[bool, str]:
    """Return whether to compile for `shapes` token shapes, and why."""
    device, settings = config.accelerator.device, config.settings
    if device.type != "cuda":
        return False, "only on a GPU is compiled code predicted to be faster"
    if config.processes.sharded:
        return False, "a sharded base is not compiled"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return False, "PyTorch compiles no bfloat16 for GPUs below compute capability 8.0"
    if missing := missing_tools():
        return False, f"{missing} is not installed"
    planner = Planner(workload_of(config, on_gpu=True))
    try:
        check_compiles(planner.job.model)
    except ValueError:
        return False, "the layers of this adapter cannot be compiled"
    on = gpu(gpu_name(device), torch.cuda.get_device_properties(device).total_memory / GIB)
    prediction = planner.predict(choice_of(config.composed["memory"]))
    saved = settings.steps * (prediction.seconds(on) - replace(prediction, compiled=True).seconds(on))
    evaluates = settings.validate_every > 0 or settings.sample_every > 0 or bool(planner.job.frozen_rows)
    scales = len(set(config.target.scales))  # each is a constant of its graphs
    graphs = GRAPHS * shapes * planner.job.num_gpus  # each GPU has its own
    taken = SECONDS_PER_GRAPH * graphs * (scales + 0.5 * evaluates)  # assumed: half as long without gradients
    text = (
        f"{many(settings.steps, 'step')} are predicted to be {saved:.0f} s shorter, and compiling for "
        f"{many(shapes, 'shape')} to take {taken:.0f} s"
    )
    return saved > MARGIN * taken, text


def missing_tools() -> str:
    """Return what PyTorch's compiler lacks for a GPU on this machine; empty if nothing."""
    from torch.utils._triton import has_triton  # it looks at the GPU

    if not has_triton():
        return "Triton"
    return "" if "CC" in os.environ or shutil.which("gcc") or shutil.which("clang") else "a C compiler (gcc)"
