"""Check that training fits the GPU that the planner predicts, in the predicted memory and time.

    python benchmarks/fits.py                                      all cases that this GPU is large enough for
    python benchmarks/fits.py --only "nf4 1024 24"                 one of them
    python benchmarks/fits.py --on cpu --only small                tests the script; its figures mean nothing

A case is a model with random weights at its published shapes, a precision, an image size and a GPU size. The planner
(train/planner/predictor.py) chooses the group `memory` for that GPU, and PyTorch is limited to its memory. Steps are
complete: forward, backward, AdamW. The result has the peak of PyTorch's allocator next to the predicted one.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import flux2  # noqa: F401, I001  before torch: it sets how long threads spin

import argparse
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import bitsandbytes
import peft
import torch

from benchmarks.common import (
    add_case_options,
    choose_cases,
    choose_device,
    free_memory,
    hardware,
    integer_type,
    limit_memory,
    peak_memory,
    read_clock,
    result_file,
    run_cases,
)
from benchmarks.models import MODELS, Inputs, attach_adapter, make_precision, random_transformer
from flux2 import adapters
from flux2.layers.attention import computes_in_float32, preferred_backends
from flux2.memory.activation_checkpointing import set_policy
from flux2.memory.block_offload import offload, offloaded_blocks
from flux2.memory.model_split import module_devices, split_devices, split_model
from flux2.memory.ring_buffer import Copier
from flux2.models.transformer import Transformer
from flux2.quantization.precision import Precision, Storage
from flux2.models.variants import VARIANTS, Variant
from train.planner.gpus import GIB, gpu, usable
from train.planner.search import choose
from train.config.memory import settings_of
from train.planner.from_config import skeleton
from train.planner.prediction import Prediction
from train.planner.predictor import LIBRARIES, Planner
from train.planner.workload import Workload

OPTIMIZER = partial(torch.optim.AdamW, lr=1e-4)


@dataclass(frozen=True)
class Case:
    """A training run of rank 16 on the block linears with one image per step."""

    model: str
    storage: Storage | None
    pixels: int
    gpu_memory_gb: float
    num_gpus: int = 1  # that the model is divided over

    @property
    def name(self) -> str:
        gpus = f"{self.num_gpus}x" if self.num_gpus > 1 else ""
        return f"{self.model} {self.storage or 'bf16'} {self.pixels} {gpus}{self.gpu_memory_gb:g}"

    @property
    def variant(self) -> Variant:
        template = VARIANTS["klein_base_4b"]
        return VARIANTS.get(self.model, replace(template, name=self.model, transformer=MODELS[self.model]))


CASES = [
    Case("dev", "nf4", 512, 16),
    Case("dev", "nf4", 1024, 24),
    Case("dev", "nf4", 1024, 32),
    Case("dev", "fp8", 1024, 48),
    Case("dev", None, 1024, 48),
    Case("dev", None, 1024, 80),
    Case("dev", "fp8", 1024, 80),
    Case("dev", "fp8", 1024, 141),
    Case("dev", "int8", 1024, 32),
    Case("dev", "int8", 1024, 80),
    Case("klein_base_9b", "nf4", 1024, 12),
    Case("klein_base_9b", None, 1024, 24),
    Case("klein_base_4b", None, 1024, 8),
    Case("klein_base_4b", None, 1024, 24),
    Case("small", None, 128, 8),
    Case("small", "fp8", 128, 8),
    Case("small", "int8", 128, 8),
    Case("small", "nf4", 128, 8),
]


def make_planner(
    variant: Variant, storage: Storage | None, pixels: int, in_fp8: bool, rank: int = 16, num_gpus: int = 1
) -> Planner:
    """Return the planner of a run with AdamW and one image per step, without sample grids and validation."""
    precision = make_precision(storage, in_fp8)
    model = skeleton(variant, precision, lambda model: adapters.attach(model, rank=rank))
    size = (pixels, pixels)
    in_float32 = torch.cuda.is_available() and computes_in_float32(torch.device("cuda"))
    more = {"float32_attention": in_float32, "storage": storage, "num_gpus": num_gpus}
    return Planner(Workload(variant, model, torch.bfloat16, OPTIMIZER, size, **more))


def train(
    case: Case,
    prediction: Prediction,
    device: torch.device,
    repeats: int,
    in_fp8: bool,
    make_model: Callable[..., Transformer] = random_transformer,
    copier: Callable[[torch.device], Copier] | None = None,
) -> list[float]:
    """Return the seconds of `repeats` steps after two warm-up steps. The memory peak includes the warm-up.

    `make_model` takes the arguments of `random_transformer`, and `copier` is that of `offload`.
    """
    choice, config = prediction.choice, case.variant.transformer
    streamed = offloaded_blocks(config, choice.offload_blocks)
    precision = make_precision(case.storage, in_fp8, choice.cache_transposed_weights)
    devices: dict[str, torch.device] = {}
    if prediction.split:
        devices = module_devices(config, prediction.split, split_devices(device, len(prediction.split)))
    model = make_model(config, precision, device, host=streamed, devices=devices)
    backends = preferred_backends(None, device)
    set_policy(model, choice.checkpointing, budget_gb=choice.budget_gb, attention=backends)
    attach_adapter(model, rank=16)
    for parameter in adapters.adapter_parameters(model):
        parameter.data = parameter.data.to(device)
    split_model(model, devices)
    offload(model, choice.offload_blocks, activations=choice.offload_activations, device=device, copier=copier)
    optimizer = OPTIMIZER(adapters.adapter_parameters(model))
    inputs = Inputs(config, case.pixels // 16, 512, device)
    free_memory(device)
    for place in {device, *devices.values()}:
        if place.type == "cuda":
            torch.cuda.reset_peak_memory_stats(place)

    times = []
    for _ in range(repeats + 2):
        start = read_clock(device)
        inputs.backward(model)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(read_clock(device) - start)
    return times[2:]


def measure(case: Case, device: torch.device, repeats: int) -> dict[str, Any]:
    """Return the predicted and the measured time and memory of a case."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    card = gpu(name, case.gpu_memory_gb)
    in_fp8 = Precision(torch.bfloat16, case.storage).multiplies_in_8_bits(device)
    planner = make_planner(case.variant, case.storage, case.pixels, in_fp8)
    prediction = choose(planner, {}, usable(case.gpu_memory_gb), card)
    if prediction is None:
        return {"case": asdict(case), "skipped": "predicted not to fit"}
    result: dict[str, Any] = {"case": asdict(case), "memory": settings_of(prediction.choice)}
    if device.type == "cuda" and not limit_memory(device, case.gpu_memory_gb):
        total = torch.cuda.get_device_properties(device).total_memory
        return result | {"skipped": f"this GPU has {total / GIB:.0f} GiB"}
    try:
        times = train(case, prediction, device, repeats, in_fp8)
    except torch.OutOfMemoryError as error:
        return result | {"out of memory": str(error).splitlines()[0]}
    result["seconds"] = {"median": statistics.median(times), "min": min(times), "max": max(times)}
    result["predicted seconds"] = prediction.seconds(card)
    if device.type == "cuda":
        predicted = (prediction.training - LIBRARIES) / 1e9
        result["GB"] = {"predicted": predicted, **peak_memory(device)}
        result["predicted / allocated"] = predicted / result["GB"]["allocated"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_case_options(parser, "'nf4' or 'dev bf16 1024 80'", "fits_<GPU>")
    parser.add_argument("--repeats", type=integer_type(1), default=5, help="timed steps of each case")
    options = parser.parse_args()
    device = choose_device(parser, options.on, "--on cpu --only small")
    cases = choose_cases(parser, CASES, options.only)
    if not options.only:
        cases = [case for case in cases if case.model != "small"]
    machine = hardware(device)
    result = {
        "what": "training steps with memory as chosen by the planner: one image, rank 16, AdamW, random weights",
        "hardware": machine,
        "versions": {module.__name__: module.__version__ for module in (torch, peft, bitsandbytes)},
    }
    out = options.out or result_file("fits", machine)
    run_cases(out, result, cases, lambda case: measure(case, device, options.repeats), device)


if __name__ == "__main__":
    main()
