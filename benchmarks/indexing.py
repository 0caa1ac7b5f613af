"""How long a source takes to index many samples, and how much memory it keeps.

    python benchmarks/indexing.py [--samples 100000]

Writes small JPEGs with captions, once in each of three ways, and opens each in a fresh process: a folder with .txt
captions, a folder with metadata.jsonl, tar shards. Opening reads every caption and every picture's header. The memory
is the highest of the whole process, Python and libraries included. Files are in the page cache, as they were written
just before.

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

FOLDERS = 16  # of pictures that metadata.jsonl names
A_SHARD = 10_000  # samples
WAYS = ("sidecars", "metadata", "shards")


def jpeg(number: int) -> bytes:
    """A picture of its own, 64 pixels wide; as small as a file system's block, so that 100,000 fit anywhere."""
    noise = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).resize((64, 48 + 16 * (number % 3))).save(stream, "JPEG")
    return stream.getvalue()


def caption(number: int) -> str:
    return f"picture {number}, a caption of about a hundred characters, as they are written for training, more or less"


def write_sidecars(folder: Path, samples: int) -> None:
    for number in range(samples):
        (folder / f"{number:06}.jpg").write_bytes(jpeg(number))
        (folder / f"{number:06}.txt").write_text(caption(number))


def write_metadata(folder: Path, samples: int) -> None:
    for number in range(FOLDERS):
        (folder / f"{number:02}").mkdir()
    with (folder / "metadata.jsonl").open("w") as file:
        for number in range(samples):
            name = f"{number % FOLDERS:02}/{number:06}.jpg"
            (folder / name).write_bytes(jpeg(number))
            print(json.dumps({"file_name": name, "text": caption(number)}), file=file)


def write_shards(folder: Path, samples: int) -> None:
    for first in range(0, samples, A_SHARD):
        with tarfile.open(folder / f"{first:06}.tar", "w") as tar:
            for number in range(first, min(first + A_SHARD, samples)):
                for suffix, content in (("jpg", jpeg(number)), ("txt", caption(number).encode())):
                    member = tarfile.TarInfo(f"{number:06}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))


def measure(way: str, folder: str, samples: int) -> None:
    """Opens the source in this process and prints what it took."""
    from data.sources import Folder, WebDataset

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, cpu = time.perf_counter(), time.process_time()
    source = WebDataset(folder) if way == "shards" else Folder(folder)
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
    given = parser.parse_args()
    if given.measure:
        return measure(*given.measure, given.samples)

    results = {
        "what": "a source of small JPEGs is opened: captions and headers are read",
        "samples": given.samples,
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "pillow": version("pillow"),
        "ways": {},
    }
    write = {"sidecars": write_sidecars, "metadata": write_metadata, "shards": write_shards}
    for way in WAYS:
        with tempfile.TemporaryDirectory() as folder:
            write[way](Path(folder), given.samples)
            command = [sys.executable, __file__, "--samples", str(given.samples), "--measure", way, folder]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            results["ways"][way] = json.loads(done.stdout.splitlines()[-1])
            print(f"{way}: {results['ways'][way]}", flush=True)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(results, indent=2) + "\n")
    print(f"written to {given.out}")


if __name__ == "__main__":
    main()
