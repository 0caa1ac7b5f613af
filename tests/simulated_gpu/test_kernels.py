"""Steps with Triton's kernels: compiled and launched for each generation, in less memory than PyTorch's operations."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from simulated_gpu.simulated import device, run
from simulated_gpu.test_steps import ATTACH, CUDA, SHALLOW, make, steps

from flux2.memory.activation_checkpointing import POLICIES
from flux2.memory.kernels import choose_kernels, kernel_failure, use_kernels
from flux2.quantization.precision import Storage


def peak_and_launches(storage: Storage | None, policy: str, kernels: bool, blocks: float) -> tuple[int, int]:
    """Return the peak of a step in addition to the model, in bytes, and the launches of a step and a prediction."""
    config = SHALLOW["dev"]
    model = make(config, storage, policy, ATTACH["lora"], blocks, False)
    use_kernels(model, kernels)
    before = torch.cuda.memory_allocated()
    steps(model, config, 1)
    torch.cuda.reset_peak_memory_stats()
    launches = device().simulated_gpu_launches()
    first, second = steps(model, config)
    assert first == second, "a step keeps nothing"
    return torch.cuda.max_memory_allocated() - before, device().simulated_gpu_launches() - launches


@pytest.mark.parametrize("storage", [None, "fp8", "int8", "nf4"])
@pytest.mark.parametrize("policy", POLICIES)
def test_kernels_take_less_memory_and_fewer_launches(policy: str, storage: Storage | None) -> None:
    (eager, many), (fused, few) = (peak_and_launches(storage, policy, kernels, 0.0) for kernels in (False, True))
    # at most 0.90, with nf4, which dequantizes weights, and 0.58 were seen
    assert fused < 0.92 * eager
    assert few < 0.6 * many


def test_blocks_that_stream_run_with_kernels() -> None:
    """Weights that a kernel's backward reads are looked up in the block, which is elsewhere by then."""
    peak_and_launches("fp8", "none", True, 0.5)


def test_a_trial_compiles_and_launches() -> None:
    kernel_failure.cache_clear()
    launches = device().simulated_gpu_launches()
    assert choose_kernels("triton", torch.device("cuda", 0)) == "triton"
    assert device().simulated_gpu_launches() > launches + 500
    assert choose_kernels("auto", CUDA) == "triton"


@pytest.mark.parametrize("capability", [80, 89, 120])
def test_a_run_with_kernels_ends_on_every_generation(capability: int, tmp_path: Path) -> None:
    places = f"output_dir={tmp_path}/run", f"cache_dir={tmp_path}/cache"
    command = "train/run.py", "+experiment=debug", "device=cuda", "memory.kernels=auto", *places
    assert "memory.kernels=triton" in run(*command, capability=capability)
