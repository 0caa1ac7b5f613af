"""Predicted and simulated memory of a run on the device of this process: `planned.py MODEL STORAGE GB`, as JSON."""

from __future__ import annotations

import json
import sys

from simulated_gpu.simulated import device

from benchmarks.fits import Case
from benchmarks.planner_simulated import simulate

if __name__ == "__main__":
    model, storage, size = sys.argv[1:]
    device().simulated_gpu_answer_ones(1)
    print(json.dumps(simulate(Case(model, None if storage == "bf16" else storage, 1024, float(size)))))
