"""Compare precisions, recompute policies and compilation with diffusers' transformer + PEFT, on one GPU.

    python benchmarks/matrix.py --model dev --side 64          a step at 1024 px; random weights drawn on the GPU
    python benchmarks/matrix.py --model small --side 8 --repeats 2 --on cpu       tests the script, measures nothing

All cases have the same weights, the same adapter layers (all block linears; q, k and v separate in diffusers) and the
same batch of one. A step is forward and backward, with full recompute in diffusers. Cases run one after the other and
the first runs again at the end: the ratio of its two times is the noise.

The benchmark first measures the throughput limits of the GPU. The MFU of a case is the time that its operations would
take at the measured rate of a bf16 product, divided by the time of the step; the operations are two times the products
of the linears and 3.5 times those of the attention. LoRA gradients of our cases are compared with those in bf16
(cosine).
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import flux2  # noqa: F401, I001  before torch: it sets how long threads spin

import argparse
import importlib.util
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import bitsandbytes
import diffusers
import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common import (
    RESULTS,
    add_case_options,
    choose_cases,
    choose_device,
    free_memory,
    hardware,
    integer_type,
    limit_memory,
    peak_memory,
    read_clock,
    write_result,
)
from benchmarks.models import (
    MODELS,
    Inputs,
    attach_adapter,
    attach_peft_adapter,
    diffusers_transformer,
    make_precision,
    quantize_to_nf4,
    random_transformer,
)
from flux2 import adapters
from flux2.layers.attention import preferred_backends, use_backends
from flux2.memory.activation_checkpointing import set_policy
from flux2.quantization.precision import STORAGES
from flux2.models.variants import TransformerConfig


@dataclass(frozen=True)
class Setup:
    """Model, batch and device, which are the same in all cases."""

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
    """A way to compute a step."""

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
    Case(False, "int8"),
    Case(False, "int8", "selective"),
    Case(False, "int8", compile=True),
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
    """Return our transformer with an adapter whose B is not zero."""
    storage = next((storage for storage in STORAGES if storage == case.precision), None)
    precision = make_precision(storage, in_fp8=True, cache_transposed=case.layouts == 2)
    model = random_transformer(setup.config, precision, setup.device)
    attention = preferred_backends(None, setup.device) if case.cudnn else None
    set_policy(model, case.policy, attention=attention, compile=case.compile, compiler=setup.compiler)
    attach_adapter(model, setup.rank)
    return model.train()


def theirs(setup: Setup, case: Case) -> Any:
    """Return diffusers' transformer with the same weights and a PEFT adapter."""
    peer = diffusers_transformer(setup.config, None, setup.device, setup.dtype)
    if case.precision == "bitsandbytes nf4":
        quantize_to_nf4(peer, setup.device)
    attach_peft_adapter(peer, setup.rank)
    peer.to(setup.device).train()
    if case.precision == "torchao float8":
        from torchao.float8 import convert_to_float8_training

        convert_to_float8_training(peer, module_filter_fn=lambda _, name: name.endswith("base_layer"))
    if case.compile:
        for block in [*peer.transformer_blocks, *peer.single_transformer_blocks]:
            block.compile(dynamic=False, backend=setup.compiler)
    return peer


# ------------------------------------------------------------------ measuring


def setting(setup: Setup, case: Case, model: nn.Module) -> dict[str, Any]:
    """Return the setting of one of our cases, as train/plan.py looks it up (train/planner/gpus.py)."""
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


def time_runs(step: Callable[[], Any], repeats: int, device: torch.device) -> list[float]:
    """Return the seconds of each of `repeats` runs."""
    times = []
    for _ in range(repeats):
        start = read_clock(device)
        step()
        times.append(read_clock(device) - start)
    return times


def measure_limits(config: TransformerConfig, tokens: int, device: torch.device, repeats: int) -> dict[str, float]:
    """Return the measured TFLOP/s of the largest product of a block, in bf16, FP8 and INT8, and of attention."""
    k, n = config.hidden, 3 * config.hidden + 2 * config.mlp_width
    x, w = (torch.randn(rows, k, device=device, dtype=torch.bfloat16) for rows in (tokens, n))
    q = torch.randn(1, config.heads, tokens, config.head_dim, device=device, dtype=torch.bfloat16)

    def attend() -> None:
        with use_backends(preferred_backends(None, device)):
            F.scaled_dot_product_attention(q, q, q)

    one = torch.ones((), device=device)
    x8, w8 = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)
    operations: dict[str, tuple[Callable[[], Any], float]] = {
        "bf16": (lambda: x @ w.t(), 2 * tokens * k * n),
        "attention": (attend, 4 * tokens**2 * config.hidden),
    }
    if device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 9):
        scaled_product = partial(torch._scaled_mm, x8, w8.t(), one, one, out_dtype=torch.bfloat16)
        operations["fp8"] = (scaled_product, 2 * tokens * k * n)
    x_int8, w_int8 = (tensor.mul(40).clamp(-127, 127).to(torch.int8) for tensor in (x, w))
    operations["int8"] = (lambda: torch._int_mm(x_int8, w_int8.t()), 2 * tokens * k * n)
    rates = {}
    for name, (run, flops) in operations.items():
        time_runs(run, 3, device)
        rates[name] = flops / statistics.median(time_runs(run, repeats, device)) / 1e12
    return rates


def step_flops(config: TransformerConfig, tokens: int) -> float:
    """Return the operations of a step without recompute.

    They are the forward and the input gradient of the linears, and the forward and the backward of the attention.
    """
    blocks = config.double_blocks + config.single_blocks
    linear = 2 * tokens * blocks * (4 * config.hidden**2 + 3 * config.hidden * config.mlp_width)
    return 2 * linear + 3.5 * blocks * 4 * tokens**2 * config.hidden


def cosine(a: list[Tensor], b: list[Tensor]) -> float:
    """Return the cosine between two lists of gradients, each taken as one vector."""
    dot = sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))
    norms = [sum(float(x.double().square().sum()) for x in side) ** 0.5 for side in (a, b)]
    return dot / (norms[0] * norms[1])


def run_step(inputs: Inputs, model: Any, case: Case) -> Tensor:
    """Run forward and backward of one step, and return the loss."""
    backends = preferred_backends(None, inputs.tokens.device) if case.peer and case.cudnn else None
    model.zero_grad(set_to_none=True)
    with use_backends(backends):  # around the backward too, because it recomputes the forward
        return inputs.backward(model, case.peer)


def measure(
    setup: Setup, case: Case, inputs: Inputs, options: argparse.Namespace, reference: list[Tensor] | None
) -> tuple[dict[str, Any], list[Tensor] | None]:
    """Return the time and memory of a case, and the LoRA gradients if it is one of ours."""
    device = setup.device
    model = (theirs if case.peer else ours)(setup, case)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    first = time_runs(lambda: run_step(inputs, model, case), 1, device)[0]
    time_runs(lambda: run_step(inputs, model, case), options.warmup, device)
    times = time_runs(lambda: run_step(inputs, model, case), options.repeats, device)
    median = statistics.median(times)
    result: dict[str, Any] = {
        "seconds": {"median": median, "min": min(times), "max": max(times), "first step": first},
        "image tokens/s": inputs.tokens.shape[1] / median,
        "loss": run_step(inputs, model, case).item(),
    }
    if device.type == "cuda":
        result["GB"] = peak_memory(device)
    gradients = None
    if not case.peer:
        result["setting"] = setting(setup, case, model)
        gradients = [p.grad.cpu() for p in adapters.adapter_parameters(model) if p.grad is not None]
        if reference is not None:
            result["cosine of LoRA gradients with bf16"] = cosine(gradients, reference)
    return result, gradients


def run(setup: Setup, options: argparse.Namespace, chosen: list[Case], write: Callable[[dict[str, Any]], None]) -> None:
    """Measure the throughput limits and the chosen cases; call `write` with all figures after each case."""
    limits = measure_limits(setup.config, setup.tokens, setup.device, options.repeats)
    inputs = Inputs(setup.config, setup.side, setup.text, setup.device, setup.dtype)
    results: dict[str, Any] = {}
    reference = None
    for case in [*chosen, chosen[0]]:
        name = f"{case.name}, again" if case.name in results else case.name
        if "torchao" in case.precision and importlib.util.find_spec("torchao") is None:
            results[name] = {"skipped": "torchao is not installed"}
        else:
            try:
                results[name], gradients = measure(setup, case, inputs, options, reference)
                best = step_flops(setup.config, setup.tokens) / limits["bf16"] / 1e12
                results[name]["MFU"] = best / results[name]["seconds"]["median"]
                reference = reference or gradients
            except torch.OutOfMemoryError as error:
                results[name] = {"out of memory": str(error).splitlines()[0]}
        torch._dynamo.reset()
        free_memory(setup.device)
        print(f"{name}: {json.dumps(results[name])}", flush=True)
        write({"TFLOP/s": limits, "cases": results})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_case_options(parser, "'fp8' or 'diffusers'", "matrix_<model>_<px>")
    parser.add_argument("--model", choices=MODELS, default="klein_base_4b")
    parser.add_argument("--side", type=integer_type(1), default=64, help="side of the latent grid: 64 is 1024 px")
    parser.add_argument("--text", type=integer_type(1), default=512, help="prompt tokens")
    parser.add_argument("--rank", type=integer_type(1), default=16)
    parser.add_argument("--repeats", type=integer_type(1), default=20, help="timed steps of each case")
    parser.add_argument(
        "--warmup", type=integer_type(0), default=3, help="untimed steps after the first, compiling one"
    )
    parser.add_argument("--compiler", default="inductor", help="backend of torch.compile; aot_eager tests the script")
    parser.add_argument("--memory-gb", type=float, help="GPU size to emulate; CUDA itself takes 1 GiB of it")
    options = parser.parse_args()

    cases = choose_cases(parser, CASES, options.only)
    device = choose_device(parser, options.on, "--on cpu --model small --compiler aot_eager")
    if options.memory_gb is not None:
        if device.type != "cuda":
            parser.error("--memory-gb needs --on cuda")
        if not limit_memory(device, options.memory_gb):
            parser.error(f"--memory-gb {options.memory_gb:g}: this GPU is smaller")
    config = MODELS[options.model]
    setup = Setup(options.model, config, device, options.rank, options.compiler, options.side, options.text)
    about = {
        "what": f"{options.model}, batch 1, {options.side**2} + {options.text} tokens, rank {options.rank}",
        "hardware": hardware(device),
        "memory limit, GB": options.memory_gb,
        "versions": {module.__name__: module.__version__ for module in (torch, diffusers, peft, bitsandbytes)},
    }
    out = options.out or RESULTS / f"matrix_{options.model}_{16 * options.side}.json"
    write_result(out, about)  # fails here, before any case runs, if the file cannot be written
    run(setup, options, cases, lambda figures: write_result(out, about | figures))
    print(f"written to {out}")


if __name__ == "__main__":
    main()
