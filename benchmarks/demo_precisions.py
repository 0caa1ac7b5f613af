"""Train the demo on a base of each precision: does a LoRA learn the same on 8 and 4 bits as on 32?

    python benchmarks/demo_precisions.py                 all of them, an hour
    python benchmarks/demo_precisions.py --only int8     some; the others keep their results

Trains conf/experiment/demo.yaml with three seeds on the embedded model in float32, in FP8 and INT8 (products in 8 bits
too, forward and backward, as on a GPU), in INT8 with rotation and in NF4, and measures the result as train/demo.py
does. A precision passes if its mean lies within the spread of the float32 seeds, widened by one image of the 48. The
last validation loss is written but not judged, because the loss of the base differs between precisions. Results are
written to benchmarks/results/demo_precisions.json with the hardware and the versions.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import flux2  # noqa: F401, I001  before torch: it sets how long threads spin

import argparse
import json
import shlex
import statistics
import tempfile
from collections.abc import Sequence
from typing import Any

import bitsandbytes
import peft
import torch

from benchmarks.common import RESULTS, hardware, integer_type, write_result
from benchmarks.demo_training import compose_demo
from train import demo

PRECISIONS = {
    "fp32": ["precision=fp32"],
    "fp8": ["precision=fp8", "precision.matmul=fp8"],
    "int8": ["precision=int8"],
    "int8_rotated": ["precision=int8", "precision.rotate=true"],
    "nf4": ["precision=nf4"],
}
MEASURES = ("style_moved", "plain_style_moved", "subjects_right", "plain_subjects_right")
IMAGES = len(demo.SUBJECTS) * len(demo.COLORS) * demo.PICTURES


def train_demo(overrides: Sequence[str], folder: Path, cache: Path) -> dict[str, Any]:
    """Run train/demo.py in `folder`. Return its measures, and the losses of its steps and validations."""
    folders = (f"cache_dir={cache}", f"output_dir={folder}")
    demo.main(compose_demo("sample_every=0", "checkpoint_every=0", *folders, *overrides))
    report = json.loads((folder / "demo.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        **{key: report[key] for key in (*MEASURES, "base_unchanged", "training_seconds")},
        "losses": [line["loss"] for line in lines if "loss" in line],
        "validation_loss": [line["validation_loss"] for line in lines if "validation_loss" in line],
    }


def summarize(runs: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Return the mean, minimum and maximum over the seeds of each precision and measure.

    `within_fp32` is whether the mean lies within the values of float32, widened by one image.
    """
    slack = 1 / IMAGES + 1e-9
    columns = {name: {key: [run[key] for run in given] for key in MEASURES} for name, given in runs.items()}
    summary: dict[str, dict[str, Any]] = {}
    for name, given in runs.items():
        columns[name]["final_validation_loss"] = [run["validation_loss"][-1] for run in given]
        summary[name] = {
            key: {"mean": statistics.mean(values), "min": min(values), "max": max(values)}
            for key, values in columns[name].items()
        }
        for key in MEASURES:
            lowest, highest = min(columns["fp32"][key]) - slack, max(columns["fp32"][key]) + slack
            summary[name][key]["within_fp32"] = lowest <= summary[name][key]["mean"] <= highest
    return summary


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=integer_type(1), default=3, help="runs per precision")
    parser.add_argument("--only", action="append", choices=PRECISIONS, help="train this one; may be repeated")
    parser.add_argument("--out", type=Path, default=RESULTS / "demo_precisions.json")
    parser.add_argument("overrides", nargs="*", help="settings of the runs, e.g. steps=4")
    options = parser.parse_args(argv)

    about = {
        "what": f"conf/experiment/demo.yaml {shlex.join(options.overrides)}".strip(),
        "settings": PRECISIONS,
        "hardware": hardware(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "versions": {
            "torch": torch.__version__,
            "bitsandbytes": bitsandbytes.__version__,
            "peft": peft.__version__,
        },
        "seeds": options.seeds,
    }
    trained: dict[str, list[dict[str, Any]]] = {name: [] for name in options.only or PRECISIONS}
    before = json.loads(options.out.read_text()) if options.only else about | {"runs": {}}
    for key in about.keys() - {"settings"}:
        if before[key] != about[key]:
            parser.error(
                f"--only: {options.out} has {key} {before[key]!r} instead of {about[key]!r}. Leave out --only."
            )
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(options.seeds):
            for name in trained:
                print(f"--- {name}, seed {seed}", flush=True)
                folder = Path(scratch) / f"{name}_{seed}"
                overrides = [*PRECISIONS[name], f"seed={seed}", *options.overrides]
                trained[name].append(train_demo(overrides, folder, Path(scratch) / "cache"))
    every = before["runs"] | trained
    runs = {name: every[name] for name in PRECISIONS if name in every}
    result = about | {"summary": summarize(runs), "runs": runs}
    write_result(options.out, result)
    for name, measures in result["summary"].items():
        shown = ", ".join(f"{key} {value['mean']:.3f}" for key, value in measures.items())
        outside = [key for key, value in measures.items() if not value.get("within_fp32", True)]
        print(f"{name}: {shown}" + (f"; outside the spread of fp32: {', '.join(outside)}" if outside else ""))
    print(f"written to {options.out}")
    return result


if __name__ == "__main__":
    main()
