"""The demo, trained on bases of every precision: does a LoRA learn the same on 8 and 4 bits as on 32?

    python benchmarks/demo_precisions.py

Trains conf/experiment/demo.yaml at three seeds on the embedded model in float32, in FP8 (products in FP8 too, forward
and backward, as on a GPU) and in NF4, and takes the demo's own measures of what came of it (train/demo.py). A precision
passes if its mean lies within the spread of float32's seeds, widened by what one picture of the 48 counts. The last
validation loss is written too but not judged: it starts from the base's own, which is another in every precision.
Results go to benchmarks/results/demo_precisions.json with the hardware and the versions.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import flux2  # noqa: F401, I001  before torch: it sets how long threads spin

import argparse
import json
import shlex
import statistics
import tempfile
from collections.abc import Sequence
from typing import Any

import bitsandbytes
import hydra
import peft
import torch

from benchmarks.common import at_least, hardware, write_result
from train import demo

PRECISIONS = {
    "fp32": ["precision=fp32"],
    "fp8": ["precision=fp8", "precision.matmul=fp8"],
    "nf4": ["precision=nf4"],
}
MEASURES = ("style_moved", "plain_style_moved", "subjects_right", "plain_subjects_right")
PICTURES = len(demo.SUBJECTS) * len(demo.COLORS) * demo.PICTURES


def trained(overrides: Sequence[str], folder: Path, cache: Path) -> dict[str, Any]:
    """Train the demo into `folder`: its measures, and the losses of its steps."""
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = hydra.compose(
            "train",
            [
                "+experiment=demo",
                "sample_every=0",
                "checkpoint_every=0",
                f"cache_dir={cache}",
                f"output_dir={folder}",
                *overrides,
            ],
        )
    demo.main(config)
    report = json.loads((folder / "demo.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        **{key: report[key] for key in (*MEASURES, "base_unchanged", "training_seconds")},
        "losses": [line["loss"] for line in lines if "loss" in line],
        "validation_loss": [line["validation_loss"] for line in lines if "validation_loss" in line],
    }


def summary(runs: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Of each precision and measure: mean, least and greatest over the seeds, and whether the mean is float32's."""
    found: dict[str, dict[str, Any]] = {}
    for name, each in runs.items():
        found[name] = {}
        for key in (*MEASURES, "final_validation_loss"):
            values, exact = ([of(run, key) for run in runs] for runs in (each, runs["fp32"]))
            mean = statistics.mean(values)
            found[name][key] = {"mean": mean, "min": min(values), "max": max(values)}
            if key in MEASURES:
                slack = 1 / PICTURES + 1e-9
                found[name][key]["within_fp32"] = min(exact) - slack <= mean <= max(exact) + slack
    return found


def of(run: dict[str, Any], key: str) -> float:
    return run["validation_loss"][-1] if key == "final_validation_loss" else run[key]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=at_least(1), default=3, help="runs of each precision")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "demo_precisions.json")
    parser.add_argument("overrides", nargs="*", help="settings of the runs, such as steps=4")
    options = parser.parse_args(argv)

    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in PRECISIONS}
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(options.seeds):
            for name, chosen in PRECISIONS.items():
                print(f"--- {name}, seed {seed}", flush=True)
                folder = Path(scratch) / f"{name}_{seed}"
                overrides = [*chosen, f"seed={seed}", *options.overrides]
                runs[name].append(trained(overrides, folder, Path(scratch) / "cache"))
    result = {
        "what": f"conf/experiment/demo.yaml {shlex.join(options.overrides)}".strip(),
        "settings": PRECISIONS,
        "hardware": hardware(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "versions": {
            "torch": torch.__version__,
            "bitsandbytes": bitsandbytes.__version__,
            "peft": peft.__version__,
        },
        "seeds": options.seeds,
        "summary": summary(runs),
        "runs": runs,
    }
    write_result(options.out, result)
    for name, measures in result["summary"].items():
        shown = ", ".join(f"{key} {value['mean']:.3f}" for key, value in measures.items())
        outside = [key for key, value in measures.items() if not value.get("within_fp32", True)]
        print(f"{name}: {shown}" + (f"; outside of fp32's spread: {', '.join(outside)}" if outside else ""))
    print(f"written to {options.out}")
    return result


if __name__ == "__main__":
    main()
