"""Measure a start with many cached samples: seconds and peak memory until the first batch is read.

    python benchmarks/starting.py [--samples 1000000]

Writes small images with captions in three layouts (metadata.jsonl, .txt captions, tar shards), fills the cache with
entries of the right shapes, without encoding or reading any image, and then starts: in a new process, from the imports
to the first batch, all that `train/run.py` does before it loads the base, and the list of samples that it writes into
the run folder. Files that were just written are in the page cache.

The target for 1,000,000 samples is under 60 s and under 2 GB.
"""

from __future__ import annotations

import time

BEGIN = time.perf_counter()  # before the imports, which are a part of a start

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import io
import json
import resource
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np

PER_FOLDER = 1000
SIZES = ((32, 32), (16, 32), (32, 16))
LAYOUTS = ("metadata", "sidecars", "shards")


def picture(number: int) -> bytes:
    """Return a distinct image in the format PPM, of a few hundred bytes of noise."""
    width, height = SIZES[number % len(SIZES)]
    noise = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return b"P6 %d %d 255\n" % (width, height) + noise.tobytes()


def caption(number: int) -> str:
    """Return a caption of about a hundred characters."""
    return f"image {number}, a caption of about a hundred characters, as they are written for training, more or less"


def write_files(folder: Path, samples: int, sidecars: bool) -> None:
    """Write images in folders of `PER_FOLDER`, and their captions next to them or in metadata.jsonl."""
    lines = []
    for number in range(samples):
        name = f"{number // PER_FOLDER:04}/{number:07}"
        if number % PER_FOLDER == 0:
            (folder / name).parent.mkdir()
        (folder / f"{name}.ppm").write_bytes(picture(number))
        if sidecars:
            (folder / f"{name}.txt").write_text(caption(number))
        else:
            lines.append(json.dumps({"file_name": f"{name}.ppm", "text": caption(number)}))
    if not sidecars:
        (folder / "metadata.jsonl").write_text("\n".join(lines))


def write_shards(folder: Path, samples: int) -> None:
    """Write tar shards of 10 * `PER_FOLDER` samples."""
    for first in range(0, samples, 10 * PER_FOLDER):
        with tarfile.open(folder / f"{first:07}.tar", "w") as tar:
            for number in range(first, min(first + 10 * PER_FOLDER, samples)):
                for suffix, content in (("ppm", picture(number)), ("txt", caption(number).encode())):
                    member = tarfile.TarInfo(f"{number:07}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


WRITE: dict[str, Callable[[Path, int], None]] = {
    "metadata": lambda folder, samples: write_files(folder, samples, sidecars=False),
    "sidecars": lambda folder, samples: write_files(folder, samples, sidecars=True),
    "shards": write_shards,
}


# ------------------------------------------------------------------ in a process of its own


def overrides(layout: str, folder: Path) -> list[str]:
    """Return the settings of a run on the samples of a layout."""
    dataset = ["dataset=webdataset"] if layout == "shards" else ["dataset=folder"]
    dataset += ["dataset.recursive=true"] if layout == "sidecars" else []
    return [
        *dataset,
        f"dataset.path={folder}/images",
        f"cache_dir={folder}/cache",
        f"output_dir={folder}/run",
        *("buckets.resolution=32", "batch_size=4", "device=cpu", "validation.held_out=0", "sample_every=0"),
    ]


def fill(layout: str, folder: Path) -> None:
    """Fill the cache of a layout with zeros in place of latents and embeddings, of images that are not read."""
    import hashlib

    import torch

    from benchmarks.demo_training import load_demo
    from data.cache.packs import PackWriter, form_of
    from data.cache.store import PACKS, Cache
    from data.sources.images import Header, Picture
    from train.stages.data import cache_request

    def read_header(picture: Picture) -> Header:
        number = int(Path(picture.name).name.partition(".")[0])
        return Header(SIZES[number % len(SIZES)], "RGB", False, False)

    def digest(picture: Picture) -> str:
        return hashlib.sha256(picture.name.encode()).hexdigest()

    def entry(name: str, tensor: torch.Tensor) -> tuple[int, bytes]:
        cache, key = Cache(folder / "template"), f"{name} {tuple(tensor.shape)}".encode().hex().ljust(64, "0")
        cache.put(key, {name: tensor}, {})
        content = cache.path(key).read_bytes()
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        del header["__metadata__"]
        return form_of(header), content

    with (
        mock.patch.object(Picture, "_read_header", read_header),
        mock.patch.object(Picture, "digest", digest),
        mock.patch.object(Picture, "pixel_digest", lambda picture, content: content),
    ):
        request = cache_request(load_demo(*overrides(layout, folder)))
        latents, embeddings = request.plan_latents(), request.plan_embeddings()
        request.digests.save()
    writer = PackWriter(folder / "cache" / PACKS, flushes=False)
    of_shape = {shape: entry("latents", torch.zeros(shape)) for shape in {work.shape for work in latents.work.values()}}
    for key, work in latents.work.items():
        writer.append(key, *of_shape[work.shape])
    form, content = entry("embeddings", torch.zeros(4, 16, dtype=torch.bfloat16))
    for key in embeddings.keys.values():
        writer.append(key, form, content)
    writer.close()


def start(layout: str, folder: Path) -> None:
    """Start a run on the filled cache and print the seconds and the peak memory."""
    from benchmarks.demo_training import load_demo
    from train.stages.data import prepare_data

    marks = {"imports": time.perf_counter()}
    config = load_demo(*overrides(layout, folder))
    marks["settings"] = time.perf_counter()
    data = prepare_data(config)
    marks["samples, cache and loader"] = time.perf_counter()
    (folder / "run").mkdir(exist_ok=True)
    data.manifest.write(folder / "run")
    marks["list of samples"] = time.perf_counter()
    data.loader.micro_batches(0)
    marks["first batch"] = time.perf_counter()
    times = [BEGIN, *marks.values()]
    parts = {name: round(end - begin, 2) for name, begin, end in zip(marks, times, times[1:], strict=False)}
    used = resource.getrusage(resource.RUSAGE_SELF)
    figures = {
        "samples": len(data.names),
        "seconds": round(times[-1] - BEGIN, 2),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 2),
        "peak_gb": round(used.ru_maxrss * 1024 / 1e9, 3),  # ru_maxrss is in KiB on Linux
        "parts": parts,
    }
    print(json.dumps(figures))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1_000_000)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=LAYOUTS)
    parser.add_argument("--folder", help="where the temporary files are written")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/starting_cpu.json"))
    parser.add_argument("--run", nargs=3, metavar=("PART", "LAYOUT", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        part, layout, folder = options.run
        return {"fill": fill, "start": start}[part](layout, Path(folder))

    ways: dict[str, Any] = {}
    for layout in options.layouts:
        with tempfile.TemporaryDirectory(dir=options.folder) as name:
            folder = Path(name)
            (folder / "images").mkdir()
            WRITE[layout](folder / "images", options.samples)
            command = [sys.executable, __file__, "--run"]
            subprocess.run([*command, "fill", layout, name], check=True, stdout=subprocess.DEVNULL)
            done = subprocess.run([*command, "start", layout, name], check=True, stdout=subprocess.PIPE, text=True)
            ways[layout] = json.loads(done.stdout.splitlines()[-1])
            files = sum(1 for path in (folder / "cache").rglob("*") if path.is_file())
            ways[layout]["cache_files"] = files
            print(f"{layout}: {json.dumps(ways[layout])}", flush=True)
    from benchmarks.common import environment, write_result  # here, because it imports torch

    what = "a start with a full cache, from the imports to the first batch, without loading the base"
    write_result(options.out, {"what": what, "samples": options.samples, **environment(), "layouts": ways})
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
