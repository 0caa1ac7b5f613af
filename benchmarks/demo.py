"""Run the demo with several seeds, to see how much its figures vary by chance.

    python benchmarks/demo.py --seeds 0 1 2 [key=value ...]

Runs train/demo.py once per seed with the given settings. Writes its figures, with medians, lowest and highest values,
the hardware and the versions, to benchmarks/results/demo.json.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import argparse
import json
import statistics
import subprocess
import tempfile

import peft
import torch

from benchmarks.common import RESULTS, hardware, write_result

KEYS = (
    "training_seconds",
    "style_moved",
    "plain_style_moved",
    "subjects_right_before",
    "subjects_right",
    "plain_subjects_right_before",
    "plain_subjects_right",
    "base_unchanged",
)


def run(seed: int, settings: list[str], folder: Path) -> dict[str, float]:
    """Run the demo once and return its figures. Raises CalledProcessError if it fails."""
    command = [sys.executable, "train/demo.py", f"seed={seed}", f"output_dir={folder}", *settings]
    subprocess.run(command, cwd=ROOT, check=True)
    report = json.loads((folder / "demo.json").read_text())
    return {key: report[key] for key in KEYS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS / "demo.json")
    options, settings = parser.parse_known_args()

    runs = {}
    for seed in options.seeds:
        with tempfile.TemporaryDirectory() as folder:
            runs[seed] = run(seed, settings, Path(folder) / "run")
    columns = {key: [values[key] for values in runs.values()] for key in KEYS}
    result = {
        "what": "train/demo.py, one run per seed; shares of 48 images",
        "settings": settings,
        "hardware": hardware(torch.device("cpu")),
        "versions": {"torch": torch.__version__, "peft": peft.__version__},
        "summary": {
            key: {"median": statistics.median(values), "min": min(values), "max": max(values)}
            for key, values in columns.items()
        },
        "runs": runs,
    }
    write_result(options.out, result)
    print(json.dumps(result["summary"], indent=2))
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
