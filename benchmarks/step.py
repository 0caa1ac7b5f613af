"""One training step, side by side with diffusers' transformer + PEFT: `make bench`.

Both get the same weights, the same adapter on the same layers (rank 16, all block linears, q, k, v apart in diffusers),
the same batch, and recompute every block in the backward. On a CPU the model is small (hidden 512) and in float32, on a
GPU it has klein 4B's shapes in bfloat16. Runs alternate, and the result is the ratio of medians, as times of a shared
machine drift. Results go to benchmarks/results/ with the hardware and the versions.
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

import diffusers
import peft
import torch
from torch import Tensor

from benchmarks.common import at_least, clock, hardware, write_result
from benchmarks.models import adapt_with_peft, diffusers_transformer
from flux2 import adapters
from flux2.memory.activation_checkpointing import set_policy
from flux2.models.transformer import Transformer
from flux2.models.positions import image_positions, text_positions
from flux2.models.variants import KLEIN_4B, TransformerConfig

SMALL = replace(KLEIN_4B, heads=4, double_blocks=2, single_blocks=4, text_width=1536)


def ours(config: TransformerConfig, device: torch.device, dtype: torch.dtype, rank: int) -> Transformer:
    """Our transformer with random weights and a fresh adapter."""
    torch.manual_seed(0)
    with torch.device(device):
        model = Transformer(config).to(dtype)
    set_policy(model, "full")
    adapters.attach(model, rank=rank)
    return model.train()


def theirs(config: TransformerConfig, model: Transformer, device: torch.device, rank: int) -> torch.nn.Module:
    """diffusers' transformer with the weights of `model` and a fresh PEFT adapter."""
    weights = {
        name.replace(".base_layer", ""): tensor for name, tensor in model.state_dict().items() if ".lora_" not in name
    }
    other = diffusers_transformer(config, weights, device, dtype=torch.float32)
    adapt_with_peft(other, rank)
    return other.to(device).train()


def measure(steps: dict[str, Callable[[], None]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each step, alternating between them, after one warm-up each."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(repeats + 1):
        for name, step in steps.items():
            began = clock(device)
            step()
            if repeat:
                times[name].append(clock(device) - began)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=at_least(1), default=7, help="timed steps of each")
    parser.add_argument("--side", type=at_least(1), default=32, help="side of the latent grid: 32 is 512 px")
    parser.add_argument("--text", type=at_least(1), default=512, help="prompt tokens")
    parser.add_argument("--rank", type=at_least(1), default=16)
    parser.add_argument("--out", type=Path, help="result file; by default benchmarks/results/step_<cpu or gpu>.json")
    options = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config, dtype = (KLEIN_4B, torch.bfloat16) if device.type == "cuda" else (SMALL, torch.float32)
    model = ours(config, device, dtype, options.rank)
    other = theirs(config, model, device, options.rank)

    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(1, options.side**2, config.channels, generator=generator).to(device)
    text = torch.randn(1, options.text, config.text_width, generator=generator).to(device)
    target = torch.randn(tokens.shape, generator=generator).to(device)
    at = torch.tensor([0.5], device=device)
    positions = image_positions(options.side, options.side, device=device)
    text_at = text_positions(options.text, device)

    def backward(predict: Callable[[], Tensor], module: torch.nn.Module) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = (predict().float() - target).square().mean()
        loss.backward()
        module.zero_grad(set_to_none=True)

    def step_ours() -> None:
        backward(lambda: model(tokens, positions, text, text_at, at), model)

    def step_theirs() -> None:
        backward(
            lambda: other(
                hidden_states=tokens.to(dtype),
                encoder_hidden_states=text.to(dtype),
                timestep=at,
                img_ids=positions[None],
                txt_ids=text_at[None],
                return_dict=False,
            )[0],
            other,
        )

    times = measure({"flux2-lora": step_ours, "diffusers + PEFT": step_theirs}, options.repeats, device)
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
    out = options.out or Path(__file__).parent / "results" / f"step_{'gpu' if device.type == 'cuda' else 'cpu'}.json"
    write_result(out, result)
    print(json.dumps(result, indent=2))
    print(f"written to {out}")


if __name__ == "__main__":
    main()
