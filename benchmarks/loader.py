"""The loader: how fast it reads, how long training waits for it, and how long a start with a full cache takes.

    python benchmarks/loader.py

Reading: batches of two samples of dev's sizes (1024 x 1024 pixels, 512 tokens) from files in the page cache, with
nothing kept in memory; full embeddings and packed ones. Waiting: the share of the demo's time from the first step to
the last that is spent in `Prefetcher.get`. Start: 100,000 pictures in a folder, all cached and all seen before,
from the listing of the folder to the plan that finds nothing missing; once with everything in memory.
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

import hydra
import torch
from PIL import Image

from benchmarks.common import environment, write_result
from data.buckets import Buckets
from data.cache import Cache
from data.cache.embeddings import pack, plan_embeddings
from data.cache.image_digests import Digests
from data.cache.latents import LatentEntry, plan_latents
from data.loader import Loader
from data.sources import Folder
from train.config.paths import CONFIG
from train.run import train
from train.stages.memory import load_config
from train.stages.run_folder import claim_run_folder
from train.utils.prefetch import Prefetcher

RESULT = Path(__file__).parent / "results" / "loader_cpu.json"


def timed(act: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = act()
    return time.perf_counter() - began, result


# ------------------------------------------------------------------ reading


def reading(folder: Path, fp8: bool, samples: int = 32, batches: int = 48) -> dict[str, float]:
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

    seconds, _ = timed(read)
    size = sum(file.stat().st_size for file in folder.rglob("*.safetensors")) / samples
    return {"batches_per_second": batches / seconds, "gigabytes_per_second": 2 * size * batches / seconds / 1e9}


# ------------------------------------------------------------------ waiting


def waiting(place: Path, steps: int) -> dict[str, float]:
    """In the demo, from the first step to the last."""
    waited, calls = [], []
    plain = Prefetcher.get

    def watched(ahead: Prefetcher[Any], step: int) -> Any:
        calls.append(time.perf_counter())
        seconds, found = timed(lambda: plain(ahead, step))
        waited.append(seconds)
        return found

    with hydra.initialize_config_dir(str(CONFIG), version_base="1.3"):
        config = hydra.compose(
            "train",
            [
                *("+experiment=demo", "device=cpu", f"steps={steps + 1}", f"cache_dir={place}/cache"),
                *(f"output_dir={place}/run", "sample_every=0", "validate_every=0", "checkpoint_every=0"),
            ],
        )
    Prefetcher.get = watched  # type: ignore[method-assign]
    try:
        run = load_config(config)
        with claim_run_folder(run) as location:
            train(run, location)
    finally:
        Prefetcher.get = plain  # type: ignore[method-assign]
    total = calls[-1] - calls[0]
    return {
        "steps": steps,
        "seconds_a_step": total / steps,
        "share_of_waiting": sum(waited[:-1]) / total,
        "share_of_waiting_without_the_first": sum(waited[1:-1]) / (calls[-1] - calls[1]),
    }


# ------------------------------------------------------------------ starting


def write_samples(folder: Path, count: int) -> None:
    """Small pictures that differ, with a caption each."""
    folder.mkdir()
    with (folder / "metadata.jsonl").open("w") as metadata:
        for index in range(count):
            stream = BytesIO()
            color = index % 256, index // 256 % 256, index // 65536
            Image.new("RGB", (32, 32), color).save(stream, "BMP")
            (folder / f"{index:06d}.bmp").write_bytes(stream.getvalue())
            metadata.write(json.dumps({"file_name": f"{index:06d}.bmp", "text": f"picture number {index}"}) + "\n")


def both(act: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """Seconds, and those of them that this process computed: the others it waited for the disk, or its turn."""
    began = time.process_time()
    seconds, result = timed(act)
    return {"seconds": seconds, "computing": time.process_time() - began}, result


def start(folder: Path, cache: Cache) -> dict[str, Any]:
    """One start: what its parts take, and how many entries it finds missing."""
    listed, samples = both(lambda: Folder(folder))

    def plan() -> Any:
        digests = Digests(cache.folder / "pictures.json")
        latents = plan_latents(cache, samples, Buckets(32), "vae", 32**2, digests)
        embeddings = plan_embeddings(cache, [sample.caption for sample in samples], "text")
        if cache.folder.is_dir():
            digests.save()
        return latents, embeddings

    planned, (latents, embeddings) = both(plan)
    looked, missing = both(lambda: latents.missing + embeddings.missing)
    return {
        "listing_the_folder": listed,
        "finding_the_keys": planned,
        "looking_for_the_entries": looked,
        "missing": missing,
        "keys": [*latents.work, *embeddings.keys.values()] if missing else [],
        "latents": len(latents.work) if missing else 0,
    }


def fill_quickly(cache: Cache, keys: list[str], latents: int, example: Path) -> None:
    """Entries of the right form, without the flush to the disk that makes each of them safe."""
    one = Cache(example)
    one.put("00" * 32, {"latents": torch.zeros(128, 2, 2)}, {"picture": "a"})
    one.put("11" * 32, {"embeddings": torch.zeros(8, 16)}, {"prompt": "a"})
    contents = one.path("00" * 32).read_bytes(), one.path("11" * 32).read_bytes()
    for number, key in enumerate(keys):
        path = cache.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents[number >= latents])


def starting(place: Path, count: int) -> dict[str, Any]:
    """Each start is a process of its own."""

    def once() -> dict[str, Any]:
        command = [sys.executable, __file__, "--start", str(place / "pictures"), str(place / "cache")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    place.mkdir()
    write_samples(place / "pictures", count)
    cache = Cache(place / "cache")
    cache.folder.mkdir()
    first = once()
    assert first["missing"] == 2 * count
    fill_quickly(cache, first["keys"], first["latents"], place / "example")
    second = once()
    assert second["missing"] == 0
    for found in (first, second):
        del found["keys"], found["latents"]
    return {"samples": count, "first_start": first, "with_a_full_cache": second}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--samples", type=int, default=100_000, help="of the start")
    parser.add_argument("--steps", type=int, default=30, help="of the demo")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--start", nargs=2, type=Path, metavar=("PICTURES", "CACHE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start:
        print(json.dumps(start(options.start[0], Cache(options.start[1]))))
        return
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        result: dict[str, Any] = {"what": "data.loader: reading, waiting for it, and starting with a full cache"}
        result["reading"] = {
            storage: reading(place / storage, storage == "fp8") for storage in ("full embeddings", "fp8")
        }
        print(json.dumps(result["reading"]), flush=True)
        result["waiting_in_the_demo"] = waiting(place / "demo", options.steps)
        print(json.dumps(result["waiting_in_the_demo"]), flush=True)
        result["starting"] = starting(place / "start", options.samples)
        print(json.dumps(result["starting"]), flush=True)
    write_result(options.out, result | environment())


if __name__ == "__main__":
    main()
