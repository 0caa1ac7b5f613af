"""Run the cases of a benchmark on simulated GPUs, one process for each storage and compute capability."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from simulated_gpu.build import environment
from simulated_gpu.simulated import device

from benchmarks.common import write_result

STORAGES = ("bf16", "fp8", "int8", "nf4")
POLICIES = ("full", "selective", "none")


def run_cases(
    file: str, about: dict[str, Any], capabilities: Sequence[int], compare: Callable[[str, str], Any], result: Path
) -> None:
    """Write what `compare(storage, policy)` returns on GPUs of these capabilities to `result`: the program's main.

    Args:
        file: The program, which is started again for each case.
        about: What the result file says about itself.
    """
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", default="", help="run only cases whose name contains this, e.g. 'nf4 90'")
    parser.add_argument("--out", type=Path, default=result)
    parser.add_argument("--case", help=argparse.SUPPRESS)  # of the process that runs it
    options = parser.parse_args()
    if options.case is not None:
        device().simulated_gpu_answer_ones(1)
        print(json.dumps({policy: compare(options.case, policy) for policy in POLICIES}))
        return
    runs = json.loads(options.out.read_text())["runs"] if options.only and options.out.exists() else {}
    found: dict[str, Any] = {**about, "versions": {"torch": torch.__version__}, "runs": runs}
    for name in (f"{storage} {number}" for number in capabilities for storage in STORAGES):
        if options.only in name:
            storage, number = name.split()
            with tempfile.TemporaryDirectory() as cache:  # nothing is compiled yet
                given = environment(capability=int(number), gb=150) | {"TORCHINDUCTOR_CACHE_DIR": cache}
                command = [sys.executable, file, "--case", storage]
                done = subprocess.run(command, env=given, stdout=subprocess.PIPE, text=True, check=True)
            found["runs"][name] = json.loads(done.stdout.splitlines()[-1])
            print(name, json.dumps(found["runs"][name]), flush=True)
            write_result(options.out, found)
