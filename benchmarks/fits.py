"""Does training fit the card that the planner says it fits, and does it take what was predicted?

    python benchmarks/fits.py                                      all cases that this GPU is large enough for
    python benchmarks/fits.py --only "nf4 1024 24"                 one of them
    python benchmarks/fits.py --on cpu --only small                proves the script; its figures mean nothing

Each case is a model with random weights at its true shapes, a precision, a picture size and a size of card. The planner
(train/planner/predictor.py) chooses the group `memory` for that card, PyTorch may take no more than such a card has,
and whole steps are made as training makes them: forward, backward, AdamW. The peak that PyTorch's allocator saw is set
beside the predicted one. Results go to benchmarks/results/fits_<GPU>.json.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import flux2  # noqa: F401, I001  before torch: it sets how long threads spin

import argparse
import gc
import json
import re
import statistics
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import bitsandbytes
import peft
import torch

from benchmarks.common import at_least, clock, hardware, write_result
from benchmarks.models import MODELS, adapt, precision_of, random_transformer
from flux2 import adapters
from flux2.layers.attention import preferred_backends
from flux2.memory.activation_checkpointing import set_policy
from flux2.memory.block_offload import offload, offloaded_blocks
from flux2.quantization.precision import Storage
from flux2.models.positions import image_positions, text_positions
from flux2.models.variants import VARIANTS, Variant
from train.planner.gpus import CONTEXT_GB, GIB, gpu, usable
from train.planner.search import choose
from train.config.memory import settings_of
from train.planner.from_config import skeleton
from train.planner.predictor import LIBRARIES, Planner, Prediction
from train.planner.workload import Workload

OPTIMIZER = partial(torch.optim.AdamW, lr=1e-4)


@dataclass(frozen=True)
class Case:
    """One training run: rank 16 on the linears of the blocks, one picture a step."""

    model: str
    storage: Storage | None
    pixels: int
    gpu_memory_gb: float

    @property
    def name(self) -> str:
        return f"{self.model} {self.storage or 'bf16'} {self.pixels} {self.gpu_memory_gb:g}"

    @property
    def variant(self) -> Variant:
        known = VARIANTS["klein_base_4b"]
        return VARIANTS.get(self.model, replace(known, name=self.model, transformer=MODELS[self.model]))


CASES = [
    Case("dev", "nf4", 512, 16),
    Case("dev", "nf4", 1024, 24),
    Case("dev", "nf4", 1024, 32),
    Case("dev", "fp8", 1024, 48),
    Case("dev", None, 1024, 48),
    Case("dev", None, 1024, 80),
    Case("dev", "fp8", 1024, 80),
    Case("dev", "fp8", 1024, 141),
    Case("klein_base_9b", "nf4", 1024, 12),
    Case("klein_base_9b", None, 1024, 24),
    Case("klein_base_4b", None, 1024, 8),
    Case("klein_base_4b", None, 1024, 24),
    Case("small", None, 128, 8),
    Case("small", "fp8", 128, 8),
    Case("small", "nf4", 128, 8),
]


def planner(variant: Variant, storage: Storage | None, pixels: int, in_fp8: bool, rank: int = 16) -> Planner:
    """Of one picture a step, AdamW, and nothing but steps."""
    precision = precision_of(storage, in_fp8)
    model = skeleton(variant, precision, lambda model: adapters.attach(model, rank=rank))
    return Planner(Workload(variant, model, torch.bfloat16, OPTIMIZER, (pixels, pixels), storage=storage))


def train(case: Case, chosen: Prediction, device: torch.device, repeats: int, in_fp8: bool) -> list[float]:
    """Seconds of `repeats` steps, after two that are not counted; the peak is counted from the first."""
    choice, config = chosen.choice, case.variant.transformer
    streamed = offloaded_blocks(config, choice.offload_blocks)
    precision = precision_of(case.storage, in_fp8, choice.cache_transposed_weights)
    model = random_transformer(config, precision, device, host=streamed)
    backends = preferred_backends(None, device)
    set_policy(model, choice.checkpointing, budget_gb=choice.budget_gb, attention=backends)
    adapt(model, rank=16)
    for parameter in adapters.adapter_parameters(model):
        parameter.data = parameter.data.to(device)
    offload(model, choice.offload_blocks, activations=choice.offload_activations, device=device)
    optimizer = OPTIMIZER(adapters.adapter_parameters(model))

    side, text = case.pixels // 16, 512
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(1, side**2, config.channels, generator=generator).to(device)
    prompt = torch.randn(1, text, config.text_width, generator=generator).to(device)
    target = torch.randn(tokens.shape, generator=generator).to(device)
    at, guidance = torch.tensor([0.5], device=device), torch.ones(1, device=device) if config.guidance else None
    positions, text_at = image_positions(side, side, device=device), text_positions(text, device)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)

    times = []
    for _ in range(repeats + 2):
        began = clock(device)
        with torch.autocast(device.type, torch.bfloat16):
            predicted = model(tokens, positions, prompt, text_at, at, guidance)
            loss = (predicted.float() - target).square().mean()
        loss.backward()
        del predicted
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        times.append(clock(device) - began)
    return times[2:]


def measure(case: Case, device: torch.device, repeats: int) -> dict[str, Any]:
    """What the planner predicts for a case and what came."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    on = gpu(name, case.gpu_memory_gb)
    in_fp8 = precision_of(case.storage, in_fp8=True).multiplies_in_fp8(device)
    chosen = choose(planner(case.variant, case.storage, case.pixels, in_fp8), {}, usable(case.gpu_memory_gb), on)
    if chosen is None:
        return {"asked": asdict(case), "left out": "predicted not to fit"}
    result: dict[str, Any] = {"asked": asdict(case), "memory": settings_of(chosen.choice)}
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        share = (case.gpu_memory_gb - CONTEXT_GB) * GIB / total
        if share > 1:
            return result | {"left out": f"this GPU has {total / GIB:.0f} GiB"}
        torch.cuda.set_per_process_memory_fraction(share, device)
    try:
        times = train(case, chosen, device, repeats, in_fp8)
    except torch.OutOfMemoryError as error:
        return result | {"out of memory": str(error).splitlines()[0]}
    result["seconds"] = {"median": statistics.median(times), "min": min(times), "max": max(times)}
    result["predicted seconds"] = chosen.seconds(on)
    if device.type == "cuda":
        predicted, seen = chosen.training - LIBRARIES, torch.cuda.max_memory_allocated(device)
        reserved = torch.cuda.max_memory_reserved(device)
        result["GB"] = {"predicted": predicted / 1e9, "allocated": seen / 1e9, "reserved": reserved / 1e9}
        result["predicted / allocated"] = predicted / seen
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only cases with this in their name, as 'nf4' or 'dev bf16 1024 80'")
    parser.add_argument("--repeats", type=at_least(1), default=5, help="timed steps of each")
    parser.add_argument("--on", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, help="result file; by default benchmarks/results/fits_<GPU>.json")
    options = parser.parse_args()
    device = torch.device(options.on)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; --on cpu --only small proves the script")
    cases = [case for case in CASES if options.only in case.name and (case.model != "small" or options.only)]
    if not cases:
        parser.error(f"--only {options.only!r} names no case; there are: {', '.join(case.name for case in CASES)}")

    machine = hardware(device)
    short = re.sub(r"\W+", "_", machine.split(",")[0]).strip("_").lower()
    out = options.out or ROOT / "benchmarks" / "results" / f"fits_{short}.json"
    result: dict[str, Any] = {
        "what": "training steps with memory as chosen by the planner: one picture, rank 16, AdamW, random weights",
        "hardware": machine,
        "versions": {module.__name__: module.__version__ for module in (torch, peft, bitsandbytes)},
        "runs": {},
    }
    write_result(out, result)  # what cannot be written says so now
    for case in cases:
        result["runs"][case.name] = measure(case, device, options.repeats)
        write_result(out, result)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"{case.name}: {json.dumps(result['runs'][case.name])}", flush=True)
    print(f"written to {out}")


if __name__ == "__main__":
    main()
