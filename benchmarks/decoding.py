"""Decoding a large picture whole and in stripes: peak memory, time, and how far the pixels are apart.

    python benchmarks/decoding.py [--sides 1024 2048] [--whole-up-to 1024]

Weights at the published autoencoder's shapes are random: neither time nor memory depends on them. Each case is a
process of its own; memory is what is held above the model and the latents, on a CPU the largest resident set, with an
allocator that gives back what is freed. A case that the machine ends because its memory does not suffice is a result
too: what it held then is less than it needs. The embedded model's pixels, whose norms were trained, are compared at the
largest side.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    import flux2  # noqa: F401  before torch: it sets how long threads spin

import argparse
import json
import os
import resource
import signal
import subprocess
import time
from contextlib import suppress
from typing import Any

import psutil
import torch
from torch import Tensor

from benchmarks.common import at_least, clock, environment, hardware, write_result
from flux2.models import tiled_decoding
from flux2.models.autoencoder import Autoencoder
from flux2.models.variants import AutoencoderConfig
from flux2.utils.device import pick_device
from flux2.weights.loading import load_autoencoder
from flux2.weights.sources import model_source

RESULTS = Path(__file__).parent / "results"


def drawn(side: int, device: torch.device) -> Tensor:
    return torch.randn(1, 128, side // 16, side // 16, generator=torch.Generator().manual_seed(0)).to(device)


def peak(device: torch.device) -> float:
    """Bytes held at most so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


@torch.no_grad()
def case(side: int, mode: str) -> dict[str, Any]:
    """Seconds and bytes of one decoding."""
    device = pick_device(None)
    Path("/proc/self/oom_score_adj").write_text("1000")  # if memory does not suffice, nothing else shall end
    torch.manual_seed(0)
    model = Autoencoder(AutoencoderConfig()).to(device)
    z = drawn(side, device)
    decode = model.decode if mode == "whole" else lambda given: tiled_decoding.decode(model, given)
    decode(drawn(64, device))  # libraries' own buffers
    before, began = peak(device), clock(device)
    pixels = decode(z)
    seconds = clock(device) - began
    assert pixels.shape == (1, 3, side, side)
    return {"seconds": seconds, "gigabytes": (peak(device) - before) / 1e9}


def in_process(side: int, mode: str) -> dict[str, Any]:
    """`case` in a process of its own; of one that is killed, the largest resident set that was seen."""
    giving_back = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 20)}
    command = [sys.executable, __file__, "--case", str(side), mode]
    held = 0
    with subprocess.Popen(command, env=os.environ | giving_back, stdout=subprocess.PIPE, text=True) as process:
        seen = psutil.Process(process.pid)
        while process.poll() is None:
            with suppress(psutil.NoSuchProcess):
                held = max(held, seen.memory_info().rss)
            time.sleep(0.05)
        assert process.stdout is not None
        said = process.stdout.read()
    if process.returncode == -signal.SIGKILL:
        return {"killed": "out of memory", "more_than_gigabytes": held / 1e9}
    if process.returncode:
        raise RuntimeError(f"decoding {side} px {mode} ended with exit code {process.returncode}")
    return json.loads(said)


@torch.no_grad()
def difference(side: int) -> dict[str, float]:
    """Of the embedded model's pixels, in units of 1/255."""
    model = load_autoencoder(model_source("tiny"), pick_device(None))
    z = drawn(side, next(model.parameters()).device)
    apart = (model.decode(z) - tiled_decoding.decode(model, z)).abs() * 127.5
    return {"side": side, "mean": apart.mean().item(), "largest": apart.max().item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sides", type=at_least(64), nargs="+", default=[1024, 2048])
    parser.add_argument("--whole-up-to", type=at_least(64), default=2048, help="larger ones only in stripes")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(case(int(options.case[0]), options.case[1])))
        return
    device = pick_device(None)
    result: dict[str, Any] = {"what": "decoding a picture whole and in stripes", "hardware": hardware(device)}
    for side in options.sides:
        for mode in ("whole", "stripes"):
            if mode == "whole" and side > options.whole_up_to:
                continue
            found = result.setdefault(str(side), {})[mode] = in_process(side, mode)
            print(side, mode, found, flush=True)
    for found in (value for key, value in result.items() if key.isdecimal() and "seconds" in value.get("whole", {})):
        for key in ("seconds", "gigabytes"):
            if found["whole"][key]:  # 0 GB if a small image needs less than loading the libraries did
                found[f"ratio_of_{key}"] = found["stripes"][key] / found["whole"][key]
    result["pixels_of_the_embedded_model_apart"] = difference(max(options.sides))
    write_result(options.out or RESULTS / f"decoding_{device.type}.json", result | environment())


if __name__ == "__main__":
    main()
