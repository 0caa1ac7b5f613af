"""Measure how fast the loader reads, how long training waits for it, and how long a start with a full cache takes.

    python benchmarks/loader.py

- Reading: batches of two samples of dev's sizes (1024 x 1024 pixels, 512 tokens) from files in the page cache, nothing
  kept in memory, with full embeddings and with embeddings in 8 bits.
- Waiting: the share of the time from the first step of the demo to the last that `Prefetcher.get` takes.
- Start: a folder of 100,000 images, from listing the folder to finding the missing cache entries. The first start has
  an empty cache; at the second, every entry exists and the files are in the page cache.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    import flux2  # noqa: F401  before torch: it sets how long threads spin

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from io import BytesIO
from typing import Any
from unittest import mock

import torch
from PIL import Image

from benchmarks.common import RESULTS, environment, integer_type, write_result
from benchmarks.demo_training import train_demo
from data.buckets import Buckets
from data.cache import Cache
from data.cache.embeddings import pack, plan_embeddings
from data.cache.image_digests import Digests
from data.cache.latents import LatentEntry, plan_latents
from data.loader import Loader
from data.sources import Folder
from train.utils.prefetch import Prefetcher


def time_call(call: Callable[[], Any]) -> tuple[float, Any]:
    """Call and return the seconds and the result."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


# ------------------------------------------------------------------ reading


def measure_reading(folder: Path, fp8: bool, samples: int = 32, batches: int = 48) -> dict[str, float]:
    """Return the batches and gigabytes per second that the loader reads from a cache of random entries."""
    cache, entries, captions, keys = Cache(folder), [], [], {}
    generator = torch.Generator().manual_seed(0)
    for index in range(samples):
        caption, key = f"caption {index}", cache.key("latents", index=index)
        keys[caption] = cache.key("embeddings", caption=caption, fp8=fp8)
        cache.put(key, {"latents": torch.randn(128, 64, 64, generator=generator)}, {})
        embeddings = torch.randn(512, 15360, generator=generator).bfloat16()
        cache.put(keys[caption], pack(embeddings) if fp8 else {"embeddings": embeddings}, {})
        entries.append(LatentEntry((1024, 1024), key))
        captions.append((caption,))
    loader = Loader(cache, entries, captions, keys, batch_size=2, seed=0, memory_limit_gb=0)
    loader.micro_batches(0)

    def read() -> None:
        for step in range(1, batches + 1):
            loader.micro_batches(step)

    seconds, _ = time_call(read)
    size = sum(file.stat().st_size for file in folder.rglob("*.safetensors")) / samples
    return {"batches_per_second": batches / seconds, "gigabytes_per_second": 2 * size * batches / seconds / 1e9}


# ------------------------------------------------------------------ waiting


def measure_waiting(folder: Path, steps: int) -> dict[str, float]:
    """Train the demo and return the share of waiting between its first and its last step."""
    waits, calls = [], []
    get = Prefetcher.get

    def timed_get(prefetcher: Prefetcher[Any], step: int) -> Any:
        calls.append(time.perf_counter())
        seconds, batch = time_call(lambda: get(prefetcher, step))
        waits.append(seconds)
        return batch

    with mock.patch.object(Prefetcher, "get", timed_get):
        train_demo("device=cpu", f"steps={steps + 1}", f"cache_dir={folder}/cache", f"output_dir={folder}/run")
    total = calls[-1] - calls[0]
    return {
        "steps": steps,
        "seconds_per_step": total / steps,
        "share_of_waiting": sum(waits[:-1]) / total,
        "share_of_waiting_without_the_first": sum(waits[1:-1]) / (calls[-1] - calls[1]),
    }


# ------------------------------------------------------------------ starting


def write_samples(folder: Path, count: int) -> None:
    """Write small distinct images, each with a caption."""
    folder.mkdir()
    with (folder / "metadata.jsonl").open("w") as metadata:
        for index in range(count):
            stream = BytesIO()
            color = index % 256, index // 256 % 256, index // 65536
            Image.new("RGB", (32, 32), color).save(stream, "BMP")
            (folder / f"{index:06d}.bmp").write_bytes(stream.getvalue())
            metadata.write(json.dumps({"file_name": f"{index:06d}.bmp", "text": f"image number {index}"}) + "\n")


def time_computing(call: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """Call and return the seconds in total, the seconds that this process computed, and the result.

    The rest of the time is waiting for the disk or for a core.
    """
    start = time.process_time()
    seconds, result = time_call(call)
    return {"seconds": seconds, "computing": time.process_time() - start}, result


def measure_start(folder: Path, cache: Cache) -> dict[str, Any]:
    """Return the time of each part of a start, and the number of missing entries."""
    listed, samples = time_computing(lambda: Folder(folder))

    def plan() -> Any:
        digests = Digests(cache.folder / "pictures.sqlite")
        latents = plan_latents(cache, samples, Buckets(32), "vae", 32**2, digests)
        embeddings = plan_embeddings(cache, [sample.caption for sample in samples], "text")
        if cache.folder.is_dir():
            digests.save()
        return latents, embeddings

    planned, (latents, embeddings) = time_computing(plan)
    looked, missing = time_computing(lambda: latents.missing + embeddings.missing)
    return {
        "listing_the_folder": listed,
        "finding_the_keys": planned,
        "looking_for_the_entries": looked,
        "missing": missing,
        "keys": [*latents.work, *embeddings.keys.values()] if missing else [],
        "latents": len(latents.work) if missing else 0,
    }


def fill_quickly(cache: Cache, keys: list[str], latents: int, example: Path) -> None:
    """Write entries of the right form without flushing each to the disk, which would take long."""
    template = Cache(example)
    template.put("00" * 32, {"latents": torch.zeros(128, 2, 2)}, {"picture": "a"})
    template.put("11" * 32, {"embeddings": torch.zeros(8, 16)}, {"prompt": "a"})
    contents = template.path("00" * 32).read_bytes(), template.path("11" * 32).read_bytes()
    for number, key in enumerate(keys):
        path = cache.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents[number >= latents])


def measure_starts(folder: Path, count: int) -> dict[str, Any]:
    """Return the time of a start with an empty cache and with a full one, each in a new process."""

    def run_start() -> dict[str, Any]:
        command = [sys.executable, __file__, "--start", str(folder / "images"), str(folder / "cache")]
        return json.loads(subprocess.check_output(command, text=True))

    folder.mkdir()
    write_samples(folder / "images", count)
    cache = Cache(folder / "cache")
    cache.folder.mkdir()
    first = run_start()
    assert first["missing"] == 2 * count
    fill_quickly(cache, first["keys"], first["latents"], folder / "example")
    second = run_start()
    assert second["missing"] == 0
    for figures in (first, second):
        del figures["keys"], figures["latents"]
    return {"samples": count, "first_start": first, "with_a_full_cache": second}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--samples", type=integer_type(1), default=100_000, help="samples of the start")
    parser.add_argument("--steps", type=integer_type(1), default=30, help="steps of the demo")
    parser.add_argument("--out", type=Path, default=RESULTS / "loader_cpu.json")
    parser.add_argument("--start", nargs=2, type=Path, metavar=("IMAGES", "CACHE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start:
        print(json.dumps(measure_start(options.start[0], Cache(options.start[1]))))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        result: dict[str, Any] = {"what": "data.loader: reading, waiting in training, and starting with a full cache"}
        result["reading"] = {
            storage: measure_reading(folder / storage, storage == "fp8") for storage in ("full embeddings", "fp8")
        }
        print(json.dumps(result["reading"]), flush=True)
        result["waiting_in_the_demo"] = measure_waiting(folder / "demo", options.steps)
        print(json.dumps(result["waiting_in_the_demo"]), flush=True)
        result["starting"] = measure_starts(folder / "start", options.samples)
        print(json.dumps(result["starting"]), flush=True)
    write_result(options.out, result | environment())


if __name__ == "__main__":
    main()
