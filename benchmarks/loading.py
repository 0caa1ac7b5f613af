"""Measure loading a large checkpoint into NF4: host memory, and the second start from the quantized copy.

    python benchmarks/loading.py

Writes a random bf16 checkpoint with the shapes of klein 9B and fewer blocks (about 4 GB, in a temporary folder). New
processes load it: a first start, which writes the quantized copy, and a second one, which reads the copy. The memory is
the peak of the process above its memory before the load, less the loaded model, in units of the largest tensor of the
checkpoint. Files are read and not mapped, so their pages do not count. Starts alternate and run in two states: with the
files in the page cache, as after a download or an earlier start, and without, as on a new machine.

The target is at most two tensors above the model, and a second start at least twice as fast.
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
import shutil
import statistics
import subprocess
import tempfile
import threading
import time
from dataclasses import replace
from importlib.metadata import version
from typing import Any

import torch

from benchmarks.common import RESULTS, environment, integer_type, write_result
from flux2.models.transformer import Transformer
from flux2.models.variants import VARIANTS, Variant
from flux2.quantization.precision import Precision
from flux2.weights.loading import load_transformer
from flux2.weights.safetensors_files import DTYPE_NAMES
from flux2.weights.sources import ModelSource

GB = 1e9


def shortened_klein(double: int, single: int) -> Variant:
    """Return klein 9B with so many blocks."""
    variant = VARIANTS["klein_base_9b"]
    return replace(variant, transformer=replace(variant.transformer, double_blocks=double, single_blocks=single))


def write_checkpoint(variant: Variant, file: Path) -> tuple[int, int]:
    """Write random bf16 weights with Black Forest Labs' key names. Return the bytes of all tensors and of the largest.

    The file is written piece by piece, because the machine may have little memory.
    """
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Transformer(variant.transformer).state_dict().items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * shape.numel()
        header[name] = {"dtype": DTYPE_NAMES[torch.bfloat16], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    generator = torch.Generator().manual_seed(0)
    # tensors are different parts of one random sequence, because drawing gigabytes would take minutes
    noise = torch.randn((1 << 22) + 4099, generator=generator)
    with file.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        for i, shape in enumerate(shapes.values()):
            scaled = (noise / shape[-1] ** 0.5).bfloat16().view(torch.uint8).numpy().data
            remaining, offset = 2 * shape.numel(), 2 * ((i * 977) % 4099)
            while remaining:
                part = scaled[offset : offset + min(remaining, len(scaled) - offset)]
                handle.write(part)
                remaining, offset = remaining - len(part), 0
    return end, max(2 * shape.numel() for shape in shapes.values())


# ------------------------------------------------------------------ one start, in its own process


def process_memory(key: str) -> int:
    """Return the bytes of this process: VmRSS is the current value, VmHWM the peak."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def measure_start(variant: Variant, file: Path, cache: Path | None) -> dict[str, float]:
    """Load once and measure `load_transformer` alone, without Python's imports."""
    precision = Precision(torch.bfloat16, storage="nf4")
    sampled, stop = [process_memory("VmRSS")], threading.Event()

    def sample() -> None:
        while not stop.wait(0.02):
            sampled.append(process_memory("VmRSS"))

    sampler = threading.Thread(target=sample)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    sampler.start()
    start = time.perf_counter()
    messages: list[tuple[float, str]] = []
    model = load_transformer(
        ModelSource(variant, str(file)),
        "cpu",
        precision,
        cache=cache,
        say=lambda text: messages.append((time.perf_counter() - start, text)),
    )
    seconds = time.perf_counter() - start
    stop.set()
    sampler.join()
    kept = sum(parameter.nbytes for parameter in model.parameters())
    return {
        "seconds": seconds,
        # until load_transformer reports that it writes the copy
        "seconds_without_writing": next((when for when, text in messages if text.startswith("writing")), seconds),
        "model_bytes": kept,
        "peak_bytes": process_memory("VmHWM") - sampled[0],
        "peak_sampled_bytes": max(sampled) - sampled[0],
        "from_copy": float(any(text.startswith("read from the quantized copy") for _, text in messages)),
    }


def run_start(options: argparse.Namespace, file: Path, cache: Path | None, dropped: bool) -> dict[str, float]:
    """Call `measure_start` in a new process. If `dropped`, remove the files from the page cache first."""
    for each in [file, *(cache.glob("*.safetensors") if cache else [])]:
        with each.open("rb") as handle:
            os.fsync(handle.fileno())
            if dropped:
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                while handle.read(1 << 24):
                    pass
    words = [sys.executable, __file__, "--start", str(file), "--double", str(options.double)]
    words += ["--single", str(options.single), *(["--cache", str(cache)] if cache else [])]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


# ------------------------------------------------------------------ all starts


def median(starts: list[dict[str, float]], key: str) -> float:
    """Return the median of one figure."""
    return statistics.median(start[key] for start in starts)


def compare(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Write the checkpoint, run all starts and return their figures."""
    variant = shortened_klein(options.double, options.single)
    file, cache = folder / "checkpoint.safetensors", folder / "copies"
    size, largest = write_checkpoint(variant, file)
    print(f"{size / GB:.2f} GB in {file}, the largest tensor {largest / GB:.3f} GB", flush=True)
    starts: dict[str, list[dict[str, float]]] = {}
    for _ in range(options.repeats):
        for dropped in (False, True):
            where = "from disk" if dropped else "in the page cache"
            shutil.rmtree(cache, ignore_errors=True)
            for name in ("first", "second"):
                measured = run_start(options, file, cache, dropped)
                assert measured["from_copy"] == (name == "second"), (
                    f"the {name} start read the copy: {bool(measured['from_copy'])}"
                )
                starts.setdefault(f"{name}, {where}", []).append(measured)
                print(f"{name} start, files {where}: {measured['seconds']:.1f} s", flush=True)
    kept = [copy.stat().st_size for copy in cache.glob("*.safetensors")]
    result: dict[str, Any] = {
        "what": "load_transformer into NF4, other weights in bf16, on the CPU",
        "checkpoint_gb": size / GB,
        "largest_tensor_gb": largest / GB,
        "copy_gb": kept[0] / GB,
        "blocks": [options.double, options.single],
        "repeats": options.repeats,
        **environment(),
        "bitsandbytes": version("bitsandbytes"),
        "starts": {},
    }
    for name, measured in starts.items():
        above = max(start["peak_bytes"] - start["model_bytes"] for start in measured)
        result["starts"][name] = {
            "seconds": [round(start["seconds"], 2) for start in measured],
            "seconds_without_writing": [round(start["seconds_without_writing"], 2) for start in measured],
            "model_gb": measured[0]["model_bytes"] / GB,
            "peak_gb": max(start["peak_bytes"] for start in measured) / GB,
            "peak_sampled_gb": max(start["peak_sampled_bytes"] for start in measured) / GB,
            "above_model_in_largest_tensors": above / largest,
        }
    for where in ("in the page cache", "from disk"):
        first, second = starts[f"first, {where}"], starts[f"second, {where}"]
        result[f"faster, {where}"] = median(first, "seconds_without_writing") / median(second, "seconds")
        result[f"faster, {where}, writing counted"] = median(first, "seconds") / median(second, "seconds")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(prog="python benchmarks/loading.py", description=__doc__)
    parser.add_argument("--double", type=int, default=2, help="double blocks")
    parser.add_argument("--single", type=int, default=4, help="single blocks")
    parser.add_argument("--repeats", type=integer_type(1), default=3)
    parser.add_argument("--folder", type=Path, help="parent of the temporary folder for the checkpoint")
    parser.add_argument("--out", type=Path, default=RESULTS / "loading_cpu.json")
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.start:
        print(json.dumps(measure_start(shortened_klein(options.double, options.single), options.start, options.cache)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        result = compare(options, Path(folder))
    write_result(options.out, result)
    for name, measured in result["starts"].items():
        print(
            f"{name}: {measured['seconds']} s, {measured['above_model_in_largest_tensors']:.2f} tensors above the model"
        )
    print(
        f"second start {result['faster, in the page cache']:.1f}x faster, from disk {result['faster, from disk']:.1f}x"
    )
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
