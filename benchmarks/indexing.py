"""Measure how long a source takes to index many samples, and the peak memory.

    python benchmarks/indexing.py [--samples 100000]

Writes small JPEGs with captions in three layouts (.txt captions, metadata.jsonl, tar shards) and opens each in a new
process. Opening reads every caption and the header of every image. The memory is the peak of
the whole process, including Python and libraries. The files were just written and are in the page cache.

The target for 100,000 samples in a folder is under 60 s and under 500 MB.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import io
import json
import os
import platform
import resource
import subprocess
import tarfile
import tempfile
import time
from importlib.metadata import version

import numpy as np
from PIL import Image

FOLDERS = 16  # image folders next to metadata.jsonl
SHARD_SAMPLES = 10_000
LAYOUTS = ("sidecars", "metadata", "shards")


def jpeg(number: int) -> bytes:
    """Return a distinct image, 64 pixels wide, that fits into one block of the file system."""
    noise = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).resize((64, 48 + 16 * (number % 3))).save(stream, "JPEG")
    return stream.getvalue()


def caption(number: int) -> str:
    """Return a caption of about a hundred characters."""
    return f"image {number}, a caption of about a hundred characters, as they are written for training, more or less"


def write_sidecars(folder: Path, samples: int) -> None:
    """Write images with .txt captions."""
    for number in range(samples):
        (folder / f"{number:06}.jpg").write_bytes(jpeg(number))
        (folder / f"{number:06}.txt").write_text(caption(number))


def write_metadata(folder: Path, samples: int) -> None:
    """Write images in `FOLDERS` folders and their captions in metadata.jsonl."""
    for number in range(FOLDERS):
        (folder / f"{number:02}").mkdir()
    with (folder / "metadata.jsonl").open("w") as file:
        for number in range(samples):
            name = f"{number % FOLDERS:02}/{number:06}.jpg"
            (folder / name).write_bytes(jpeg(number))
            print(json.dumps({"file_name": name, "text": caption(number)}), file=file)


def write_shards(folder: Path, samples: int) -> None:
    """Write tar shards of `SHARD_SAMPLES` samples."""
    for first in range(0, samples, SHARD_SAMPLES):
        with tarfile.open(folder / f"{first:06}.tar", "w") as tar:
            for number in range(first, min(first + SHARD_SAMPLES, samples)):
                for suffix, content in (("jpg", jpeg(number)), ("txt", caption(number).encode())):
                    member = tarfile.TarInfo(f"{number:06}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def measure(layout: str, folder: str, samples: int) -> None:
    """Open the source in this process and print the time and memory."""
    from data.sources import Folder, WebDataset

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, cpu = time.perf_counter(), time.process_time()
    source = WebDataset(folder) if layout == "shards" else Folder(folder)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in KiB on Linux
    assert len(source) == samples
    figures = {"seconds": wall, "cpu_seconds": cpu, "peak_mb": peak * 1024 / 1e6, "before_mb": before * 1024 / 1e6}
    print(json.dumps({key: round(value, 2) for key, value in figures.items()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=100_000)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/indexing_cpu.json"))
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return measure(*options.measure, options.samples)

    results = {
        "what": "a source of small JPEGs is opened: captions and headers are read",
        "samples": options.samples,
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "pillow": version("pillow"),
        "ways": {},
    }
    write = {"sidecars": write_sidecars, "metadata": write_metadata, "shards": write_shards}
    for layout in LAYOUTS:
        with tempfile.TemporaryDirectory() as folder:
            write[layout](Path(folder), options.samples)
            command = [sys.executable, __file__, "--samples", str(options.samples), "--measure", layout, folder]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            results["ways"][layout] = json.loads(done.stdout.splitlines()[-1])
            print(f"{layout}: {results['ways'][layout]}", flush=True)
    from benchmarks.common import write_result  # here, because it imports torch, which would count in `measure`

    write_result(options.out, results)
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
