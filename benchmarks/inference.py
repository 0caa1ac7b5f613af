"""Compare inference with offloaded blocks to the offloading of diffusers, on one GPU limited to smaller sizes.

    python benchmarks/inference.py                             dev at 1024 px, on GPUs of 24, 18 and 8 GB
    python benchmarks/inference.py --only "8 GB" --steps 4
    python benchmarks/inference.py --small --on cpu            tests the script; its figures mean nothing

Weights are random and drawn on the GPU at the published shapes; prompts are random embeddings, so the text encoder is
not counted. PyTorch is limited to the memory of a GPU of each size. Each case samples and decodes one image after a
warm-up image of one step; if it runs out of memory, the result says so. For our cases, the result also contains the
memory predicted from shapes (`predict_memory`).
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    import flux2  # noqa: F401  before torch: it sets how long threads spin

import argparse
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

from benchmarks.common import (
    add_case_options,
    choose_cases,
    choose_device,
    hardware,
    integer_type,
    limit_memory,
    peak_memory,
    read_clock,
    result_file,
    run_cases,
)
from benchmarks.models import (
    SMALL,
    diffusers_transformer,
    make_precision,
    quantize_to_nf4,
    random_transformer,
    random_weight,
)
from flux2.memory.block_offload import offload, offloaded_blocks
from flux2.models import tiled_decoding
from flux2.models.autoencoder import Autoencoder
from flux2.models.transformer import Transformer
from flux2.models.variants import VARIANTS, AutoencoderConfig, TransformerConfig, Variant
from flux2.pipeline import render
from flux2.quantization.precision import Storage
from train.planner.from_config import skeleton
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
    """A way to generate an image.

    Attributes:
        gpu_memory_gb: Size of the GPU.
        storage: Storage of the block linears; None is bfloat16.
        offload_blocks: Share or number of the blocks that ours offloads.
        tiled: Whether ours decodes in stripes.
        offload: Offload mode of diffusers; None runs ours.
    """

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
    Case(size, storage, offload=mode)
    for size in (24, 18, 8)
    for mode, storage in (("model", None), ("model", "nf4"), ("sequential", None), ("group", None))
)
SMALL_CASES = (
    Case(8, None),
    Case(8, "nf4", 2, tiled=True),
    Case(8, None, offload="group"),
    Case(8, None, offload="no"),
)


# ------------------------------------------------------------------ prediction


@cache
def whole_peak(config: AutoencoderConfig, pixels: int) -> tuple[int, int]:
    """Return the bytes of the autoencoder's weights, and the peak above them to decode one image as a whole."""
    weights, _, decode = autoencoder_peaks(config, pixels, pixels)
    return weights, decode


@cache
def stripes_peak(config: AutoencoderConfig, pixels: int) -> int:
    """Return the peak above the autoencoder's weights to decode one image in stripes, in bytes."""
    with torch.device("meta"):
        model = Autoencoder(config)
    with gpu_kernels(), FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        fake(model)
        latents = torch.empty(1, 4 * config.latent_channels, pixels // 16, pixels // 16)
        with AllocationCounter([*model.parameters(), *model.buffers(), latents]) as count:
            tiled_decoding.decode(model, latents)
    return count.peak + size([latents])


def predict_memory(variant: Variant, case: Case, pixels: int = 1024) -> dict[str, float]:
    """Return the bytes on a GPU by purpose while `pipe.generate` makes one image from prompt embeddings."""
    precision = make_precision(case.storage, in_fp8=True)
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


# ------------------------------------------------------------------ measurement


def ours(variant: Variant, case: Case, device: torch.device, pixels: int) -> Callable[[int], Any]:
    """Return a function that makes images with our pipeline in a number of steps."""
    config = variant.transformer
    precision = make_precision(case.storage, in_fp8=True)
    host = offloaded_blocks(config, case.offload_blocks)
    model = random_transformer(config, precision, device, host=host)
    offload(model, case.offload_blocks, device=device)
    autoencoder = Autoencoder(variant.autoencoder).to(device).requires_grad_(False).eval()
    text = torch.randn(1, TEXT, config.text_width, generator=torch.Generator().manual_seed(0)).to(device)

    def generate(steps: int) -> Any:
        size = {"width": pixels, "height": pixels}
        return render(model.eval(), autoencoder, text, seeds=[0], steps=steps, guidance=4.0, tiled=case.tiled, **size)

    return generate


class HostWeights(Mapping[str, Tensor]):
    """The weights of `random_transformer` in host memory, each drawn on `device` when it is read."""

    def __init__(self, config: TransformerConfig, device: torch.device) -> None:
        with torch.device("meta"):
            self.shapes = {name: tensor.shape for name, tensor in Transformer(config).state_dict().items()}
        self.device = device

    def __getitem__(self, name: str) -> Tensor:
        return random_weight(name, self.shapes[name], self.device, torch.bfloat16).cpu()

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def theirs(variant: Variant, case: Case, device: torch.device, pixels: int) -> Callable[[int], Any]:
    """Return a function that makes images with diffusers' pipeline: same weights, one of its own offload modes."""
    config, sizes = variant.transformer, variant.autoencoder
    model = diffusers_transformer(config, HostWeights(config, device), torch.device("cpu"), torch.bfloat16)
    if case.storage == "nf4":
        quantize_to_nf4(model, device)
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
    arguments = {"width": pixels, "height": pixels, "guidance_scale": 4.0}
    return lambda steps: pipe(prompt_embeds=text.to(device), num_inference_steps=steps, **arguments).images


def measure(variant: Variant, case: Case, device: torch.device, pixels: int, steps: int) -> dict[str, Any]:
    """Return the seconds per image and the memory of a case, or the out-of-memory error."""
    result: dict[str, Any] = {}
    if not case.offload:
        result["predicted GB"] = sum(predict_memory(variant, case, pixels).values()) / 1e9
    if device.type == "cuda":
        limit_memory(device, case.gpu_memory_gb)
        torch.cuda.reset_peak_memory_stats(device)
    try:
        generate = (theirs if case.offload else ours)(variant, case, device, pixels)
        generate(1)
        start = read_clock(device)
        (image,) = generate(steps)
        result["seconds per image"] = read_clock(device) - start
        assert image.size == (pixels, pixels)
    except torch.OutOfMemoryError as error:
        result["out of memory"] = str(error).splitlines()[0]
    if device.type == "cuda":
        result["GB"] = peak_memory(device)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_case_options(parser, "'8 GB' or 'diffusers'", "inference_<GPU>")
    parser.add_argument("--steps", type=integer_type(1), default=DEV.steps)
    parser.add_argument("--pixels", type=integer_type(64), default=1024, help="width and height of the image")
    parser.add_argument("--small", action="store_true", help="run a small model without a memory limit")
    options = parser.parse_args()
    device = choose_device(parser, options.on, "--small --on cpu")
    if device.type == "cpu" and not options.small:
        parser.error("dev on a CPU takes days. Add --small.")
    cases = choose_cases(parser, SMALL_CASES if options.small else [*OURS, *THEIRS], options.only)

    variant = SMALL_DEV if options.small else DEV
    machine = hardware(device)
    result = {
        "what": f"one image of {options.pixels} px in {options.steps} steps, {variant.name}, random weights",
        "hardware": machine,
        "versions": {module.__name__: module.__version__ for module in (torch, diffusers, bitsandbytes)},
    }
    out = options.out or result_file("inference", machine)
    run_cases(out, result, cases, lambda case: measure(variant, case, device, options.pixels, options.steps), device)


if __name__ == "__main__":
    main()
