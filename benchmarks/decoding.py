"""Compare decoding a large image as a whole and in stripes: peak memory, time and difference of the pixels.

    python benchmarks/decoding.py [--sides 1024 2048] [--whole-up-to 1024]

Weights have the published autoencoder's shapes and are random, because neither time nor memory depends on them. Each
case runs in its own process. Memory is the peak above the model and the latents; on a CPU it is the largest resident
set, with an allocator that returns freed memory to the system. If the system kills a case for lack of memory, the
result has the memory that it held then, a lower bound of its need. The pixels are compared for the embedded model,
whose norms were trained, at the largest side.
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

from benchmarks.common import RESULTS, environment, hardware, integer_type, read_clock, write_result
from flux2.models import tiled_decoding
from flux2.models.autoencoder import Autoencoder
from flux2.models.variants import AutoencoderConfig
from flux2.utils.device import pick_device
from flux2.weights.loading import load_autoencoder
from flux2.weights.sources import model_source


def random_latents(side: int, device: torch.device) -> Tensor:
    """Return the latents of an image of `side` x `side` pixels, shape (1, 128, side / 16, side / 16)."""
    return torch.randn(1, 128, side // 16, side // 16, generator=torch.Generator().manual_seed(0)).to(device)


def peak_bytes(device: torch.device) -> float:
    """Return the largest number of bytes that this process has held so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


@torch.no_grad()
def measure(side: int, mode: str) -> dict[str, Any]:
    """Return the seconds and the gigabytes of one decoding."""
    device = pick_device(None)
    Path("/proc/self/oom_score_adj").write_text("1000")  # out of memory, the system kills this process first
    torch.manual_seed(0)
    model = Autoencoder(AutoencoderConfig()).to(device)
    z = random_latents(side, device)
    decode = model.decode if mode == "whole" else lambda latents: tiled_decoding.decode(model, latents)
    decode(random_latents(64, device))  # a small image first, for the buffers of the libraries
    before, start = peak_bytes(device), read_clock(device)
    pixels = decode(z)
    seconds = read_clock(device) - start
    assert pixels.shape == (1, 3, side, side)
    return {"seconds": seconds, "gigabytes": (peak_bytes(device) - before) / 1e9}


def measure_in_process(side: int, mode: str) -> dict[str, Any]:
    """Call `measure` in a new process. If it is killed, return the largest resident set that was sampled."""
    trim_early = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 20)}
    command = [sys.executable, __file__, "--case", str(side), mode]
    largest = 0
    with subprocess.Popen(command, env=os.environ | trim_early, stdout=subprocess.PIPE, text=True) as process:
        sampled = psutil.Process(process.pid)
        while process.poll() is None:
            with suppress(psutil.NoSuchProcess):
                largest = max(largest, sampled.memory_info().rss)
            time.sleep(0.05)
        assert process.stdout is not None
        output = process.stdout.read()
    if process.returncode == -signal.SIGKILL:
        return {"killed": "out of memory", "more_than_gigabytes": largest / 1e9}
    if process.returncode:
        raise RuntimeError(f"decoding {side} px {mode} ended with exit code {process.returncode}")
    return json.loads(output)


@torch.no_grad()
def pixel_difference(side: int) -> dict[str, float]:
    """Return the difference of the embedded model's pixels between both ways, in units of 1/255."""
    model = load_autoencoder(model_source("tiny"), pick_device(None))
    z = random_latents(side, next(model.parameters()).device)
    difference = (model.decode(z) - tiled_decoding.decode(model, z)).abs() * 127.5
    return {"side": side, "mean": difference.mean().item(), "largest": difference.max().item()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sides", type=integer_type(64), nargs="+", default=[1024, 2048])
    parser.add_argument("--whole-up-to", type=integer_type(64), default=2048, help="larger images: only in stripes")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(int(options.case[0]), options.case[1])))
        return
    device = pick_device(None)
    result: dict[str, Any] = {"what": "decoding an image whole and in stripes", "hardware": hardware(device)}
    for side in options.sides:
        for mode in ("whole", "stripes"):
            if mode == "whole" and side > options.whole_up_to:
                continue
            figures = result.setdefault(str(side), {})[mode] = measure_in_process(side, mode)
            print(side, mode, figures, flush=True)
    for figures in (result[str(side)] for side in options.sides):
        whole = figures.get("whole", {})
        for key in ("seconds", "gigabytes"):
            if whole.get(key):  # 0 GB if a small image needs less than loading the libraries did
                figures[f"ratio_of_{key}"] = figures["stripes"][key] / whole[key]
    result["pixel_difference_of_the_embedded_model"] = pixel_difference(max(options.sides))
    write_result(options.out or RESULTS / f"decoding_{device.type}.json", result | environment())


if __name__ == "__main__":
    main()
