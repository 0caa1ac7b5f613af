"""memory.compile=auto: compiled where that is predicted to save more time than it takes."""

import copy
import shutil
from types import SimpleNamespace

import pytest
import torch
from train_helpers import compose, lines

from train.planner import compilation
from train.stages.memory import load_config, memory_advice
from train.utils.files import read_yaml

pytest_plugins = ("train_helpers",)


@pytest.fixture
def decided(monkeypatch):
    """`decided(*overrides)`: the decision for two shapes on an H100 that compiles."""
    monkeypatch.setattr(compilation, "missing_tools", lambda: "")
    monkeypatch.setattr(compilation, "gpu_name", lambda device: "NVIDIA H100")
    properties = SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def decide(*overrides):
        config = copy.copy(load_config(compose("device=cpu", "model=dev", "memory.compile=auto", *overrides)))
        config.accelerator = SimpleNamespace(device=torch.device("cuda"), is_main_process=True, num_processes=1)
        return compilation.compiles(config, 2)

    return decide


def test_a_long_run_is_compiled_and_a_short_one_is_not(decided):
    chosen, why = decided("precision=fp8", "steps=2000")
    assert chosen
    assert "2,000 steps are predicted" in why
    assert "2 shapes" in why
    assert not decided("precision=fp8", "steps=20")[0]


def test_the_graphs_of_both_scales_of_a_slider_and_of_the_bases_predictions_are_counted(decided):
    """3 graphs of a shape, for which 15 s each are assumed, and half of that without gradients."""
    quiet = ["precision=fp8", "steps=2000", "validate_every=0", "sample_every=0"]
    slider = ["target=slider", "target.positive=old", "target.negative=young"]
    for given, scales in (([], 1.0), (slider, 2.5), (["loss=dpo"], 1.5)):
        assert f"for 2 shapes to take {scales * 15 * 3 * 2:.0f} s" in decided(*quiet, *given)[1]


def test_what_cannot_be_compiled_is_not(decided, monkeypatch):
    assert decided("adapter=dora", "steps=2000") == (False, "the layers of this adapter cannot be compiled")
    monkeypatch.setattr(compilation, "missing_tools", lambda: "Triton")
    assert decided("steps=2000") == (False, "Triton is not installed")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    chosen, why = decided("steps=2000")
    assert not chosen
    assert "below compute capability 8.0" in why


def test_a_c_compiler_is_needed(monkeypatch):
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "gcc" in compilation.missing_tools()
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/clang" if name == "clang" else None)
    assert compilation.missing_tools() == ""
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: False)
    assert compilation.missing_tools() == "Triton"


def test_the_decision_is_said_kept_and_repeated_on_resume(train, capfd, monkeypatch):
    run = train("run", "memory.compile=auto", "steps=2", "checkpoint_every=2")
    assert "memory.compile=false: only on a GPU" in capfd.readouterr().out
    assert read_yaml(run / "config.yaml")["memory"]["compile"] is False
    monkeypatch.setattr("train.stages.memory.compiles", lambda config, shapes: 1 / 0)
    train("run", "memory.compile=auto", "steps=3", "resume=auto")
    assert "memory.compile=false: as in the resumed run" in capfd.readouterr().out
    assert [line["step"] for line in lines(run)] == [1, 2, 3]


def test_a_failure_of_the_compiler_within_a_backward_says_what_to_do(small):
    config = load_config(compose(*small("memory.compile=true")))
    with (
        pytest.raises(ValueError, match=r"compile a block \(Unsupported: why.*memory\.compile=false"),
        memory_advice(config),
    ):
        raise torch._dynamo.exc.Unsupported("why")
    with pytest.raises(KeyError), memory_advice(config):
        raise KeyError(1)
