"""train.utils.throughput: speed and peak memory are those of the steps alone."""

import pytest
import torch

from train.utils.throughput import Clock, peak_memory_gb


@pytest.fixture
def allocator(monkeypatch):
    """The peak of a GPU's allocator in bytes, which a reset lowers to the 3 GB that stay allocated."""
    state = {"peak": 40e9}  # encoding and loading
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: state["peak"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: state.update(peak=3e9))
    return state


def test_the_peak_memory_of_a_gpu_is_that_of_the_steps(allocator):
    clock, peaks = Clock([torch.device("cuda")]), []
    for step, sampling in ((8e9, 30e9), (5e9, 3e9), (9e9, 3e9)):
        allocator["peak"] = max(allocator["peak"], step)
        with clock.paused():
            peaks.append(clock.peak_memory()["peak_memory_gb"])
            allocator["peak"] = max(allocator["peak"], sampling)
    assert peaks == [8, 8, 9]


def test_each_device_has_its_peak(monkeypatch):
    peaks = {torch.device("cuda", 0): 2e9, torch.device("cuda", 1): 3e9}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", peaks.__getitem__)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peaks.update({device: 0.0}))
    clock = Clock(list(peaks))
    assert set(peaks.values()) == {0.0}
    peaks.update({torch.device("cuda", 0): 5e9, torch.device("cuda", 1): 4e9})
    with clock.paused():
        assert clock.peak_memory() == {"peak_memory_gb": 5.0, "peak_memory_gb/cuda:1": 4.0}


def test_without_a_gpu_the_peak_memory_is_that_of_the_process(allocator):
    clock = Clock([torch.device("cpu")])
    with clock.paused():
        assert 0.05 < clock.peak_memory()["peak_memory_gb"] <= 0.001 + peak_memory_gb(torch.device("cpu"))
    assert allocator["peak"] == 40e9, "nothing was reset"
