"""flux2.memory.kernels: the choice between PyTorch's operations and Triton's kernels, and the trial before it."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import relative_error
from kernel_helpers import interpreted_kernels, needs_triton

from flux2.layers import fused_elementwise
from flux2.memory import kernels
from flux2.memory.kernels import check_kernels, choose_kernels, kernel_failure

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def tried(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`tried()`: the result of a trial, which is on the CPU and with fewer tokens than on a GPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(kernels, "TRIED_TOKENS", 3)
    layer_norm = F.layer_norm
    # as a GPU does under autocast
    monkeypatch.setattr(F, "layer_norm", lambda x, *args: layer_norm(x.float(), *args))
    return lambda: kernel_failure.__wrapped__(CPU)


@needs_triton
def test_a_trial_of_every_kernel_gives_the_results_of_pytorch(tried: Any) -> None:
    state = torch.get_rng_state()
    with interpreted_kernels() as launches:
        assert tried() is None
    assert torch.equal(torch.get_rng_state(), state), "random numbers of the run stay as they are"
    assert len(launches) == 7


@needs_triton
@pytest.mark.parametrize("storage", [None, "int8"])
def test_a_step_under_the_autocast_of_a_gpu_has_the_same_numbers(storage: Any, tried: Any) -> None:
    """They had the same bits where the exponentials of NumPy, which interprets, are those of PyTorch."""
    model = kernels.tried_model(storage, CPU)
    expected = kernels.tried_step(model)
    kernels.use_kernels(model, True)
    with interpreted_kernels():
        for one, other in zip(kernels.tried_step(model), expected, strict=True):
            assert relative_error(one, other) < 1e-3


@needs_triton
@pytest.mark.parametrize(("name", "output"), [("swiglu", 1), ("heads_gradient", 8), ("quantized_rows", 3)])
def test_a_kernel_that_computes_something_else_is_seen(
    name: str, output: int, tried: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with interpreted_kernels():
        launch = fused_elementwise.launch

        def faulty(kernel: str, grid: Any, *args: Any, **options: Any) -> None:
            launch(kernel, grid, *args, **options)
            if kernel == name:
                args[output].mul_(1.3)

        monkeypatch.setattr(fused_elementwise, "launch", faulty)
        expected = "fp8" if name == "quantized_rows" else "bf16"
        assert tried() == f"its results differ from PyTorch's with precision={expected}"
        monkeypatch.undo()


def test_what_is_missing_is_a_reason_and_out_of_memory_an_error(tried: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_elementwise, "runs_on_gpu", lambda x: True)
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "flux2.layers.triton_kernels", raising=False)
    monkeypatch.delattr("flux2.layers.triton_kernels", raising=False)
    assert tried().startswith("ModuleNotFoundError: ")

    def fail(*args: Any, **options: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(fused_elementwise, "launch", fail)
    with pytest.raises(torch.OutOfMemoryError):
        tried()


def test_the_choice_follows_the_setting_the_device_and_the_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "kernel_failure", lambda device: None)
    assert [choose_kernels(name, GPU) for name in ("torch", "auto", "triton")] == ["torch", "triton", "triton"]
    assert choose_kernels("auto", CPU) == "torch"
    with pytest.raises(ValueError, match=r"memory\.kernels=triton.*device=cpu is no GPU.*Set torch or auto"):
        choose_kernels("triton", CPU)
    monkeypatch.setattr(kernels, "kernel_failure", lambda device: "no C compiler")
    with pytest.warns(UserWarning, match=r"memory\.kernels=auto: PyTorch's operations.*\(no C compiler\)"):
        assert choose_kernels("auto", GPU) == "torch"
    with pytest.raises(ValueError, match=r"memory\.kernels=triton.*\(no C compiler\)"):
        choose_kernels("triton", GPU)


@pytest.mark.parametrize("given", ["cuda", None, True, ["triton"]])
def test_other_names_are_refused(given: Any) -> None:
    with pytest.raises(ValueError, match=r"memory\.kernels=.* must be one of auto, torch, triton"):
        check_kernels(given)
