"""Races between streams, as PyTorch's CUDA sanitizer sees them: none in ours, and those that are made on purpose."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from simulated_gpu.build import environment
from simulated_gpu.simulated import ROOT

POLICIES = ("none", "full", "selective", "budget")


def races(*case: object) -> str:
    """What a process that trains under the sanitizer prints: "no race", or the first race."""
    given = {**environment(gb=100), "TORCH_CUDA_SANITIZER": "1", "OMP_NUM_THREADS": "1"}
    given["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    words = [sys.executable, str(Path(__file__).with_name("sanitized.py")), *map(str, case)]
    done = subprocess.run(words, cwd=ROOT, env=given, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("storage", ["bf16", "fp8", "int8", "nf4"])
def test_streaming_and_offloading_have_no_race(storage: str) -> None:
    for line in races(storage, *POLICIES).splitlines():
        assert line.endswith("no race"), line


@pytest.mark.parametrize("fault", ["no-wait", "no-order"])
def test_a_wait_that_is_missing_is_seen(fault: str) -> None:
    assert "True race (" in races("bf16", "full", fault)
