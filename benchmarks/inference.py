"""A picture on a smaller card: ours with streamed blocks beside diffusers' own ways of offloading, on one GPU.

    python benchmarks/inference.py                             dev at 1024 px, on cards of 24, 18 and 8 GB
    python benchmarks/inference.py --only "8 GB" --steps 4
    python benchmarks/inference.py --small --on cpu            proves the script; its figures mean nothing

Weights are random, made on the GPU at their true shapes; prompts are random embeddings, so no text encoder is counted.
PyTorch may take no more of the GPU than such a card has. A picture is sampled and decoded; the first one, of a single
step, is not counted. Where memory does not suffice, the result says so. Beside what the allocator saw of ours stands
what was predicted (`predicted`), counted from shapes.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__":
    sys.path[0] = str(ROOT)
    import flux2  # noqa: F401  before torch: it sets how long threads spin

import argparse
import gc
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import bitsandbytes
import diffusers
import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Pipeline
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.common import at_least, clock, hardware, write_result
from benchmarks.models import SMALL, diffusers_transformer, drawn, precision_of, random_transformer, to_four_bits
from flux2.memory.block_offload import offload, offloaded_blocks
from flux2.models import tiled_decoding
from flux2.models.autoencoder import Autoencoder
from flux2.models.transformer import Transformer
from flux2.models.variants import VARIANTS, AutoencoderConfig, TransformerConfig, Variant
from flux2.pipeline import render
from flux2.quantization.precision import Storage
from train.planner.from_config import skeleton
from train.planner.gpus import CONTEXT_GB, GIB
from train.planner.predictor import LIBRARIES, Planner
from train.planner.step_memory import AllocationCounter, Shape, autoencoder_peaks, fake, gpu_kernels, size
from train.planner.workload import Workload

TEXT = 512  # tokens of a prompt
DEV = VARIANTS["dev"]
SMALL_DEV = replace(
    DEV,
    name="small",
    transformer=replace(SMALL, guidance=True),
    autoencoder=AutoencoderConfig(widths=(16, 16, 16, 16), blocks=1, groups=4),
)


@dataclass(frozen=True)
class Case:
    """One way to make a picture. `offload` is diffusers' mode; ours streams `offload_blocks` and decodes `tiled`."""

    gpu_memory_gb: int
    storage: Storage | None
    offload_blocks: int | float = 0
    tiled: bool = False
    offload: str | None = None

    @property
    def name(self) -> str:
        how = f"diffusers, {self.offload} offload" if self.offload else f"flux2-lora, {self.offload_blocks} streamed"
        return f"{self.gpu_memory_gb} GB: {how}, {self.storage or 'bf16'}"


OURS = (
    Case(24, "nf4", tiled=True),
    Case(24, "fp8", 0.5, tiled=True),
    Case(24, None, 0.8, tiled=True),
    Case(18, "nf4", 0.4, tiled=True),
    Case(18, "fp8", 0.65, tiled=True),
    Case(8, "nf4", 1.0, tiled=True),
    Case(8, "fp8", 1.0, tiled=True),
)
THEIRS = tuple(
    Case(card, storage, offload=mode)
    for card in (24, 18, 8)
    for mode, storage in (("model", None), ("model", "nf4"), ("sequential", None), ("group", None))
)


# ------------------------------------------------------------------ predicted


@cache
def whole_peak(config: AutoencoderConfig, pixels: int) -> tuple[int, int]:
    """Bytes of the autoencoder's weights, and the most above them to decode one picture at once."""
    weights, _, decode = autoencoder_peaks(config, pixels, pixels)
    return weights, decode


@cache
def stripes_peak(config: AutoencoderConfig, pixels: int) -> int:
    """The most bytes above the weights to decode one picture in stripes, counted as train/planner/step_memory.py
    counts.
    """
    with torch.device("meta"):
        model = Autoencoder(config)
    with gpu_kernels(), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        fake(model)
        given = torch.empty(1, 4 * config.latent_channels, pixels // 16, pixels // 16)
        with AllocationCounter([*model.parameters(), *model.buffers(), given]) as count:
            tiled_decoding.decode(model, given)
    return count.peak + size([given])


def predicted(variant: Variant, case: Case, pixels: int = 1024) -> dict[str, float]:
    """Bytes on a GPU while `pipe.generate` makes one picture from a known prompt, by what they are for."""
    precision = precision_of(case.storage, in_fp8=True)
    model = skeleton(variant, precision, lambda model: model.requires_grad_(False))
    unused = partial(torch.optim.AdamW, lr=1.0)
    job = Workload(variant, model, precision.dtype, unused, (pixels, pixels), sample_pixels=(pixels, pixels))
    planner = Planner(replace(job, storage=case.storage))
    streamed, ring = planner.count_streamed(case.offload_blocks, planner.weights)
    image = (pixels // 16) ** 2
    weights, decoding = whole_peak(variant.autoencoder, pixels)
    if case.tiled:
        decoding = stripes_peak(variant.autoencoder, pixels)
    return {
        "weights of blocks": sum(planner.weights) - streamed,
        "buffers of streamed blocks": ring,
        "other weights": planner.other_weights,
        "dequantized layer": planner.workspace,
        "autoencoder": weights,
        "working set": max(planner.inference(Shape(1, image, TEXT, image), False)[0], decoding),
        "libraries (assumed)": LIBRARIES,
    }


# ------------------------------------------------------------------ made


def ours(variant: Variant, case: Case, device: torch.device, pixels: int) -> Callable[[int], Any]:
    config = variant.transformer
    precision = precision_of(case.storage, in_fp8=True)
    host = offloaded_blocks(config, case.offload_blocks)
    model = random_transformer(config, precision, device, host=host)
    offload(model, case.offload_blocks, device=device)
    autoencoder = Autoencoder(variant.autoencoder).to(device).requires_grad_(False).eval()
    text = torch.randn(1, TEXT, config.text_width, generator=torch.Generator().manual_seed(0)).to(device)

    def make(steps: int) -> Any:
        given = {"seeds": [0], "width": pixels, "height": pixels, "steps": steps, "guidance": 4.0, "tiled": case.tiled}
        return render(model.eval(), autoencoder, text, **given)

    return make


class DrawnAway(Mapping[str, Tensor]):
    """The weights of `random_transformer`, each drawn on `device` when it is asked for, and given in host memory."""

    def __init__(self, config: TransformerConfig, device: torch.device) -> None:
        with torch.device("meta"):
            self.shapes = {name: tensor.shape for name, tensor in Transformer(config).state_dict().items()}
        self.device = device

    def __getitem__(self, name: str) -> Tensor:
        return drawn(name, self.shapes[name], self.device, torch.bfloat16).cpu()

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def theirs(variant: Variant, case: Case, device: torch.device, pixels: int) -> Callable[[int], Any]:
    """diffusers' pipeline with the same weights, offloaded as it can itself."""
    config, sizes = variant.transformer, variant.autoencoder
    model = diffusers_transformer(config, DrawnAway(config, device), torch.device("cpu"), torch.bfloat16)
    if case.storage == "nf4":
        to_four_bits(model, device)
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * len(sizes.widths),
        up_block_types=("UpDecoderBlock2D",) * len(sizes.widths),
        block_out_channels=sizes.widths,
        layers_per_block=sizes.blocks,
        norm_num_groups=sizes.groups,
    ).to(torch.bfloat16)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0, time_shift_type="exponential")
    pipe = Flux2Pipeline(scheduler=scheduler, vae=vae, text_encoder=None, tokenizer=None, transformer=model)
    pipe.set_progress_bar_config(disable=True)
    if case.offload == "group":
        options = {"onload_device": device, "offload_type": "leaf_level", "use_stream": device.type == "cuda"}
        model.enable_group_offload(offload_device=torch.device("cpu"), **options)
        vae.to(device)
    elif case.offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    elif case.offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.to(device)
    text = torch.randn(1, TEXT, config.text_width, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    sizes_of = {"width": pixels, "height": pixels, "guidance_scale": 4.0}
    return lambda steps: pipe(prompt_embeds=text.to(device), num_inference_steps=steps, **sizes_of).images


def measure(variant: Variant, case: Case, device: torch.device, pixels: int, steps: int) -> dict[str, Any]:
    """Seconds of a picture and the memory it took, or why there is none."""
    gpu = device.type == "cuda"
    result: dict[str, Any] = {}
    if not case.offload:
        result["predicted GB"] = sum(predicted(variant, case, pixels).values()) / 1e9
    if gpu:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (case.gpu_memory_gb - CONTEXT_GB) * GIB / total), device)
        torch.cuda.reset_peak_memory_stats(device)
    try:
        make = (theirs if case.offload else ours)(variant, case, device, pixels)
        make(1)
        began = clock(device)
        (picture,) = make(steps)
        result["seconds a picture"] = clock(device) - began
        assert picture.size == (pixels, pixels)
    except torch.OutOfMemoryError as error:
        result["out of memory"] = str(error).splitlines()[0]
    if gpu:
        result["GB"] = {
            "allocated": torch.cuda.max_memory_allocated(device) / 1e9,
            "reserved": torch.cuda.max_memory_reserved(device) / 1e9,
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="only cases with this in their name, as '8 GB' or 'diffusers'")
    parser.add_argument("--steps", type=at_least(1), default=DEV.steps)
    parser.add_argument("--pixels", type=at_least(64), default=1024, help="of a side")
    parser.add_argument("--small", action="store_true", help="a small model, without a limit of memory")
    parser.add_argument("--on", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, help="result file; by default benchmarks/results/inference_<GPU>.json")
    options = parser.parse_args()
    device = torch.device(options.on)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; --small --on cpu proves the script")
    if device.type == "cpu" and not options.small:
        parser.error("dev on a CPU takes days: add --small")
    cases = [*OURS, *THEIRS]
    if options.small:
        small = (
            Case(8, None),
            Case(8, "nf4", 2, tiled=True),
            Case(8, None, offload="group"),
            Case(8, None, offload="no"),
        )
        cases = [*small]
    cases = [case for case in cases if options.only in case.name]
    if not cases:
        parser.error(f"--only {options.only!r} names no case")

    variant = SMALL_DEV if options.small else DEV
    machine = hardware(device)
    short = re.sub(r"\W+", "_", machine.split(",")[0]).strip("_").lower()
    result: dict[str, Any] = {
        "what": f"one picture of {options.pixels} px in {options.steps} steps, {variant.name}, random weights",
        "hardware": machine,
        "versions": {module.__name__: module.__version__ for module in (torch, diffusers, bitsandbytes)},
        "runs": {},
    }
    out = options.out or ROOT / "benchmarks" / "results" / f"inference_{short}.json"
    write_result(out, result)  # what cannot be written says so now
    for case in cases:
        result["runs"][case.name] = measure(variant, case, device, options.pixels, options.steps)
        write_result(out, result)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"{case.name}: {json.dumps(result['runs'][case.name])}", flush=True)
    print(f"written to {out}")


if __name__ == "__main__":
    main()
