"""GPUs of every generation: which kernels a step takes, and what that means for memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from simulated_gpu.simulated import run

CAPABILITIES = (75, 80, 86, 89, 90, 100, 120)
RUN = ("train/run.py", "+experiment=debug", "device=cuda")


def step(capability: int, storage: str, **settings: object) -> dict[str, object]:
    """What a step of a shallow dev reports in a process of its own."""
    said = run(Path(__file__).with_name("one_step.py"), storage, capability=capability, gb=100, **settings)
    (report,) = (line for line in said.splitlines() if line.startswith("{"))
    return json.loads(report)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("storage", ["bf16", "fp8", "int8", "nf4"])
def test_a_step_runs_and_its_attention_takes_no_square_of_memory(capability: int, storage: str) -> None:
    found = step(capability, storage)
    assert found["backend"] == ("efficient" if capability == 75 else "cudnn" if capability >= 90 else "flash")
    assert found["in 8 bits"] == (storage == "int8" or (storage == "fp8" and capability >= 89))
    square = 48 * 4608**2 * 2  # bytes of one matrix of attention weights in bfloat16
    assert found["attention peak"] < square


def test_where_cudnn_has_no_plan_flash_attention_computes() -> None:
    assert step(90, "bf16", no_cudnn_plan=1)["backend"] == "flash"


@pytest.mark.parametrize("capability", [75, 89, 120])
def test_a_run_ends_on_every_generation(capability: int, tmp_path: Path) -> None:
    said = run(*RUN, f"output_dir={tmp_path}/run", f"cache_dir={tmp_path}/cache", capability=capability)
    assert "attention: " + ("efficient" if capability == 75 else "cudnn" if capability >= 90 else "flash") in said


@pytest.mark.parametrize(("storage", "size"), [("bf16", 16), ("int8", 16), ("nf4", 12)])
def test_attention_in_float32_is_planned(storage: str, size: int) -> None:
    """GPUs of capability 7.5 have no attention in bfloat16 that is linear in memory."""
    said = run(Path(__file__).with_name("planned.py"), "klein_base_4b", storage, size, capability=75, gb=150)
    (found,) = (json.loads(line) for line in said.splitlines() if line.startswith("{"))
    assert 1 <= found["predicted / simulated"] < 1.03, found
