"""Precisions, recompute policies and compilation, side by side with diffusers' transformer + PEFT, on one GPU.

    python benchmarks/matrix.py --model dev --side 64          a step at 1024 px; random weights, made on the GPU
    python benchmarks/matrix.py --model small --side 8 --repeats 2 --on cpu       proves the script, measures nothing

Every case has the same weights, the same adapter layers (all block linears, q, k, v apart in diffusers) and the same
batch of one; a step is forward and backward, with full recompute for the peers. Cases run one after the other, the
first one again at the end: the ratio of the two is the noise. First the ceilings are measured: the time of a step is
also given as the share of them that is used (MFU: two times the linears' multiplications and 3.5 times the attention's,
by the rate of a bf16 product). LoRA gradients of ours are compared with those of ours in bf16 (cosine).
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import flux2  # noqa: F401, I001  before torch: it sets how long threads spin

import argparse
import gc
import importlib.util
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import bitsandbytes
import diffusers
import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import at_least, clock, hardware, write_result
from benchmarks.models import (
    MODELS,
    adapt,
    adapt_with_peft,
    diffusers_transformer,
    precision_of,
    random_transformer,
    to_four_bits,
)
from flux2 import adapters
from flux2.layers.attention import preferred_backends, use_backends
from flux2.memory.activation_checkpointing import set_policy
from flux2.quantization.precision import STORAGES
from flux2.models.positions import image_positions, text_positions
from flux2.models.variants import TransformerConfig


@dataclass(frozen=True)
class Setup:
    """What all cases share."""

    name: str
    config: TransformerConfig
    device: torch.device
    rank: int
    compiler: str
    side: int
    text: int
    dtype: torch.dtype = torch.bfloat16

    @property
    def tokens(self) -> int:
        return self.side**2 + self.text


@dataclass(frozen=True)
class Case:
    """One way to compute a step."""

    peer: bool
    precision: str
    policy: str = "full"
    compile: bool = False
    cudnn: bool = True
    layouts: int = 1

    @property
    def name(self) -> str:
        words = ["diffusers + PEFT" if self.peer else "flux2-lora", self.precision]
        words += [] if self.peer else [self.policy]
        words += ["both layouts"] if self.layouts == 2 else []
        words += ["compiled"] if self.compile else []
        return ", ".join(words + (["cuDNN attention"] if self.peer and self.cudnn else []))


CASES = [
    Case(False, "bf16"),
    Case(False, "bf16", "selective"),
    Case(False, "bf16", compile=True),
    Case(False, "fp8"),
    Case(False, "fp8", layouts=2),
    Case(False, "fp8", "selective"),
    Case(False, "fp8", compile=True),
    Case(False, "fp8", "selective", compile=True),
    Case(False, "fp8", "none", compile=True),
    Case(False, "nf4"),
    Case(False, "nf4", "selective"),
    Case(True, "bf16", cudnn=False),
    Case(True, "bf16"),
    Case(True, "bf16", compile=True),
    Case(True, "torchao float8"),
    Case(True, "torchao float8", compile=True),
    Case(True, "bitsandbytes nf4"),
]


# ------------------------------------------------------------------ models


def ours(setup: Setup, case: Case) -> Any:
    """Our transformer with an adapter whose B is not zero."""
    storage = next((known for known in STORAGES if known == case.precision), None)
    precision = precision_of(storage, in_fp8=True, both=case.layouts == 2)
    model = random_transformer(setup.config, precision, setup.device)
    attention = preferred_backends(None, setup.device) if case.cudnn else None
    set_policy(model, case.policy, attention=attention, compile=case.compile, compiler=setup.compiler)
    adapt(model, setup.rank)
    return model.train()


def theirs(setup: Setup, case: Case) -> Any:
    """diffusers' transformer with the same weights and a PEFT adapter."""
    other = diffusers_transformer(setup.config, None, setup.device, setup.dtype)
    if case.precision == "bitsandbytes nf4":
        to_four_bits(other, setup.device)
    adapt_with_peft(other, setup.rank)
    other.to(setup.device).train()
    if case.precision == "torchao float8":
        from torchao.float8 import convert_to_float8_training

        convert_to_float8_training(other, module_filter_fn=lambda _, name: name.endswith("base_layer"))
    if case.compile:
        for block in [*other.transformer_blocks, *other.single_transformer_blocks]:
            block.compile(dynamic=False, backend=setup.compiler)
    return other


# ------------------------------------------------------------------ measuring


def setting(setup: Setup, case: Case, model: nn.Module) -> dict[str, Any]:
    """A case of ours in the words of train/plan.py, which looks for its own setting among those measured."""
    return {
        "model": setup.name,
        "precision": case.precision,
        "pictures": 1,
        "image_tokens": setup.side**2,
        "text_tokens": setup.text,
        "trained_parameters": sum(parameter.numel() for parameter in adapters.adapter_parameters(model)),
        "compile": case.compile,
        "checkpointing": case.policy,
        "budget_gb": None,
        "offload_blocks": 0,
        "offload_activations": False,
        "cache_transposed_weights": case.layouts == 2,
    }


def timed(step: Callable[[], Any], repeats: int, device: torch.device) -> list[float]:
    """Seconds of each of `repeats` runs."""
    times = []
    for _ in range(repeats):
        began = clock(device)
        step()
        times.append(clock(device) - began)
    return times


def ceilings(config: TransformerConfig, tokens: int, device: torch.device, repeats: int) -> dict[str, float]:
    """TFLOP/s of the largest product of a block, in bf16 and FP8, and of attention."""
    k, n = config.hidden, 3 * config.hidden + 2 * config.mlp_width
    x, w = (torch.randn(rows, k, device=device, dtype=torch.bfloat16) for rows in (tokens, n))
    q = torch.randn(1, config.heads, tokens, config.head_dim, device=device, dtype=torch.bfloat16)

    def attend() -> None:
        with use_backends(preferred_backends(None, device)):
            F.scaled_dot_product_attention(q, q, q)

    one = torch.ones((), device=device)
    x8, w8 = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)
    work: dict[str, tuple[Callable[[], Any], float]] = {
        "bf16": (lambda: x @ w.t(), 2 * tokens * k * n),
        "attention": (attend, 4 * tokens**2 * config.hidden),
    }
    if device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 9):
        work["fp8"] = (lambda: torch._scaled_mm(x8, w8.t(), one, one, out_dtype=torch.bfloat16), 2 * tokens * k * n)
    found = {}
    for name, (run, flops) in work.items():
        timed(run, 3, device)
        found[name] = flops / statistics.median(timed(run, repeats, device)) / 1e12
    return found


def flops(config: TransformerConfig, tokens: int) -> float:
    """Of a step without recompute: forward and input gradient of the linears, forward and backward of the attention."""
    blocks = config.double_blocks + config.single_blocks
    linear = 2 * tokens * blocks * (4 * config.hidden**2 + 3 * config.hidden * config.mlp_width)
    return 2 * linear + 3.5 * blocks * 4 * tokens**2 * config.hidden


def cosine(a: list[Tensor], b: list[Tensor]) -> float:
    dot = sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))
    norms = [sum(float(x.double().square().sum()) for x in side) ** 0.5 for side in (a, b)]
    return dot / (norms[0] * norms[1])


class Inputs:
    """One batch, and the step of either model on it."""

    def __init__(self, setup: Setup) -> None:
        config, device, side, text = setup.config, setup.device, setup.side, setup.text
        generator = torch.Generator().manual_seed(1)
        self.dtype = setup.dtype
        self.tokens = torch.randn(1, side**2, config.channels, generator=generator).to(device)
        self.text = torch.randn(1, text, config.text_width, generator=generator).to(device)
        self.target = torch.randn(self.tokens.shape, generator=generator).to(device)
        self.at = torch.tensor([0.5], device=device)
        self.guidance = torch.ones(1, device=device) if config.guidance else None
        self.positions, self.text_at = image_positions(side, side, device=device), text_positions(text, device)

    def predict(self, model: Any, peer: bool) -> Tensor:
        if not peer:
            return model(self.tokens, self.positions, self.text, self.text_at, self.at, self.guidance)
        return model(
            hidden_states=self.tokens.to(self.dtype),
            encoder_hidden_states=self.text.to(self.dtype),
            timestep=self.at,
            img_ids=self.positions[None],
            txt_ids=self.text_at[None],
            guidance=self.guidance,
            return_dict=False,
        )[0]

    def step(self, model: Any, case: Case) -> Tensor:
        backends = preferred_backends(None, self.tokens.device) if case.peer and case.cudnn else None
        model.zero_grad(set_to_none=True)
        with use_backends(backends):
            with torch.autocast(self.tokens.device.type, torch.bfloat16):
                loss = (self.predict(model, case.peer).float() - self.target).square().mean()
            loss.backward()  # which recomputes
        return loss.detach()


def measure(
    setup: Setup, case: Case, inputs: Inputs, options: argparse.Namespace, reference: list[Tensor] | None
) -> tuple[dict[str, Any], list[Tensor] | None]:
    """What a case costs, and its LoRA gradients if it is ours."""
    device = setup.device
    gpu = device.type == "cuda"
    model = (theirs if case.peer else ours)(setup, case)
    if gpu:
        torch.cuda.reset_peak_memory_stats(device)
    first = timed(lambda: inputs.step(model, case), 1, device)[0]
    timed(lambda: inputs.step(model, case), options.warmup, device)
    times = timed(lambda: inputs.step(model, case), options.repeats, device)
    median = statistics.median(times)
    result: dict[str, Any] = {
        "seconds": {"median": median, "min": min(times), "max": max(times), "first step": first},
        "image tokens/s": inputs.tokens.shape[1] / median,
        "loss": inputs.step(model, case).item(),
    }
    if gpu:
        result["GB"] = {
            "allocated": torch.cuda.max_memory_allocated(device) / 1e9,
            "reserved": torch.cuda.max_memory_reserved(device) / 1e9,
        }
    gradients = None
    if not case.peer:
        result["setting"] = setting(setup, case, model)
        gradients = [p.grad.cpu() for p in adapters.adapter_parameters(model) if p.grad is not None]
        if reference is not None:
            result["cosine of LoRA gradients with bf16"] = cosine(gradients, reference)
    return result, gradients


def run(setup: Setup, options: argparse.Namespace, keep: Callable[[dict[str, Any]], None]) -> None:
    """All cases, and what they are measured against; `keep` gets what is known after each."""
    limits = ceilings(setup.config, setup.tokens, setup.device, options.repeats)
    inputs = Inputs(setup)
    chosen = [case for case in CASES if options.only in case.name]
    results: dict[str, Any] = {}
    reference = None
    for case in [*chosen, replace(chosen[0])]:
        name = f"{case.name}, again" if case.name in results else case.name
        if "torchao" in case.precision and importlib.util.find_spec("torchao") is None:
            results[name] = {"left out": "torchao is not installed"}
        else:
            try:
                results[name], gradients = measure(setup, case, inputs, options, reference)
                best = flops(setup.config, setup.tokens) / limits["bf16"] / 1e12
                results[name]["MFU"] = best / results[name]["seconds"]["median"]
                reference = reference or gradients
            except torch.OutOfMemoryError as error:
                results[name] = {"out of memory": str(error).splitlines()[0]}
        torch._dynamo.reset()
        gc.collect()
        if setup.device.type == "cuda":
            torch.cuda.empty_cache()
        print(f"{name}: {json.dumps(results[name])}", flush=True)
        keep({"TFLOP/s": limits, "cases": results})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="klein_base_4b")
    parser.add_argument("--side", type=at_least(1), default=64, help="side of the latent grid: 64 is 1024 px")
    parser.add_argument("--text", type=at_least(1), default=512, help="prompt tokens")
    parser.add_argument("--rank", type=at_least(1), default=16)
    parser.add_argument("--repeats", type=at_least(1), default=20, help="timed steps of each")
    parser.add_argument("--warmup", type=at_least(0), default=3, help="steps before, after the first, which compiles")
    parser.add_argument("--only", default="", help="only cases with this in their name, as 'fp8' or 'diffusers'")
    parser.add_argument("--on", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--compiler", default="inductor", help="backend of torch.compile; aot_eager proves the script")
    parser.add_argument("--memory-gb", type=float, help="a smaller card's memory; 1 GiB of it is CUDA's own")
    parser.add_argument("--out", type=Path, help="result file; by default benchmarks/results/matrix_<model>_<px>.json")
    options = parser.parse_args()

    if not any(options.only in case.name for case in CASES):
        parser.error(f"--only {options.only!r} names no case; there are: {'; '.join(case.name for case in CASES)}")
    device = torch.device(options.on)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU here; --on cpu --model small --compiler aot_eager proves the script")
    if options.memory_gb is not None:
        if device.type != "cuda":
            parser.error("--memory-gb is of a GPU")
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction((options.memory_gb * 2**30 - 2**30) / total, device)
    config = MODELS[options.model]
    setup = Setup(options.model, config, device, options.rank, options.compiler, options.side, options.text)
    about = {
        "what": f"{options.model}, batch 1, {options.side**2} + {options.text} tokens, rank {options.rank}",
        "hardware": hardware(device),
        "memory limit, GB": options.memory_gb,
        "versions": {module.__name__: module.__version__ for module in (torch, diffusers, peft, bitsandbytes)},
    }
    default = Path(__file__).parent / "results" / f"matrix_{options.model}_{16 * options.side}.json"
    out = options.out or default
    write_result(out, about)  # what cannot be written says so now
    run(setup, options, lambda found: write_result(out, about | found))
    print(f"written to {out}")


if __name__ == "__main__":
    main()
