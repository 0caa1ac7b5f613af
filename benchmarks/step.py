"""Compare one training step with diffusers' transformer + PEFT: `make bench`.

Both models have the same weights, the same adapter on the same layers (rank 16, all block linears; q, k and v separate
in diffusers) and the same batch, and recompute every block in the backward. On a CPU the model is small (hidden size
512) and in float32; on a GPU it has the shapes of klein 4B in bfloat16. Runs alternate and the result is the ratio of
medians, because times on a shared machine drift. The result file contains the hardware and the versions.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import flux2  # noqa: F401, I001  before torch: it sets how long threads spin

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import diffusers
import peft
import torch

from benchmarks.common import RESULTS, hardware, integer_type, read_clock, write_result
from benchmarks.models import Inputs, attach_peft_adapter, diffusers_transformer
from flux2 import adapters
from flux2.memory.activation_checkpointing import set_policy
from flux2.models.transformer import Transformer
from flux2.models.variants import KLEIN_4B, TransformerConfig

SMALL = replace(KLEIN_4B, heads=4, double_blocks=2, single_blocks=4, text_width=1536)


def ours(config: TransformerConfig, device: torch.device, dtype: torch.dtype, rank: int) -> Transformer:
    """Return our transformer with random weights and a new adapter."""
    torch.manual_seed(0)
    with torch.device(device):
        model = Transformer(config).to(dtype)
    set_policy(model, "full")
    adapters.attach(model, rank=rank)
    return model.train()


def theirs(config: TransformerConfig, model: Transformer, device: torch.device, rank: int) -> torch.nn.Module:
    """Return diffusers' transformer with the weights of `model` and a new PEFT adapter."""
    weights = {
        name.replace(".base_layer", ""): tensor for name, tensor in model.state_dict().items() if ".lora_" not in name
    }
    peer = diffusers_transformer(config, weights, device, dtype=torch.float32)
    attach_peft_adapter(peer, rank)
    return peer.to(device).train()


def measure(steps: dict[str, Callable[[], None]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Return the seconds of each step. Steps alternate, after one warm-up of each."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            start = read_clock(device)
            step()
            if repeat:
                times[name].append(read_clock(device) - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=integer_type(1), default=7, help="timed steps of each model")
    parser.add_argument("--side", type=integer_type(1), default=32, help="side of the latent grid: 32 is 512 px")
    parser.add_argument("--text", type=integer_type(1), default=512, help="prompt tokens")
    parser.add_argument("--rank", type=integer_type(1), default=16)
    parser.add_argument("--out", type=Path, help="result file (default: benchmarks/results/step_<cpu or gpu>.json)")
    options = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config, dtype = (KLEIN_4B, torch.bfloat16) if device.type == "cuda" else (SMALL, torch.float32)
    model = ours(config, device, dtype, options.rank)
    peer = theirs(config, model, device, options.rank)

    inputs = Inputs(config, options.side, options.text, device, dtype)

    def step(model: torch.nn.Module, is_peer: bool) -> None:
        inputs.backward(model, is_peer)
        model.zero_grad(set_to_none=True)

    steps = {"flux2-lora": partial(step, model, False), "diffusers + PEFT": partial(step, peer, True)}
    times = measure(steps, options.repeats, device)
    medians = {name: statistics.median(values) for name, values in times.items()}
    result = {
        "what": f"forward and backward, batch 1, {options.side**2} + {options.text} tokens, rank {options.rank}, full "
        f"recompute, hidden {config.hidden}, {config.double_blocks} + {config.single_blocks} blocks, {dtype}",
        "hardware": hardware(device),
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__, "peft": peft.__version__},
        "seconds": {
            name: {"median": medians[name], "min": min(values), "max": max(values)} for name, values in times.items()
        },
        "ratio": medians["flux2-lora"] / medians["diffusers + PEFT"],
    }
    out = options.out or RESULTS / f"step_{'gpu' if device.type == 'cuda' else 'cpu'}.json"
    write_result(out, result)
    print(json.dumps(result, indent=2))
    print(f"written to {out}")


if __name__ == "__main__":
    main()
