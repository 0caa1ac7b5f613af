"""Runs of train/run.py with a model that is divided over two devices: the losses are those on one, bit for bit.

A CPU stands for both devices, so that numbers can be compared; tests/simulated_gpu/test_split.py has two that differ.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from message_helpers import holds
from train_helpers import EVENTS, adapter, compose, lines, refusal, same_tensors, values

from flux2.memory.model_split import SplitRunner
from flux2.quantization.precision import Precision
from train.planner import from_config
from train.stages.memory import load_config
from train.stages.saved_run import SavedRun
from train.sweeps.reuse import SHARED

pytest_plugins = ("train_helpers",)

SETTINGS = [*EVENTS, "ema_decay=0.9"]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[SplitRunner]:
    """Two devices for every run, both of them the CPU; gives what runs the blocks of each divided model."""
    found: list[SplitRunner] = []
    make = SplitRunner.__init__

    def keep(self: SplitRunner, *arguments: object) -> None:
        make(self, *arguments)
        found.append(self)

    monkeypatch.setattr(SplitRunner, "__init__", keep)
    cpu = torch.device("cpu")
    monkeypatch.setattr("train.config.run_config.split_devices", lambda first, count=None, key="": [cpu] * (count or 2))
    return found


def same_runs(one: Path, other: Path) -> None:
    assert lines(one) == lines(other)
    assert same_tensors(adapter(one), adapter(other))
    for grid in sorted((one / "samples").glob("*.png")):
        assert grid.read_bytes() == (other / "samples" / grid.name).read_bytes()


@pytest.mark.parametrize("precision", ["fp32", "fp8", "int8", "nf4"])
@pytest.mark.parametrize("policy", ["full", "none"])
def test_a_divided_model_trains_the_same(
    train: Callable[..., Path], ran: list[SplitRunner], precision: str, policy: str
) -> None:
    settings = [f"precision={precision}", f"memory.checkpointing={policy}", *SETTINGS]
    whole = train("whole", *settings)
    assert ran == []
    same_runs(train("divided", *settings, "memory.split=[3,2]"), whole)
    assert len(ran) == 1
    assert len(list((whole / "samples").glob("*.png"))) == 3


@pytest.mark.parametrize(("before", "after"), [("[1,4]", "null"), ("null", "[3,2]"), ("[1,4]", "auto")])
def test_a_run_resumes_with_another_division(
    train: Callable[..., Path], reference: Callable[..., Path], ran: list[SplitRunner], before: str, after: str
) -> None:
    settings = ["adapter.dropout=0.2", "checkpoint_every=2"]
    whole = reference(*settings)
    half = train("half", *settings, "steps=2", f"memory.split={before}")
    resumed = train("resumed", *settings, f"resume={half}", f"memory.split={after}")
    assert values(half) + values(resumed) == values(whole)
    assert same_tensors(adapter(resumed), adapter(whole))
    assert len(ran) == (before != "null") + (after != "null")


def test_auto_is_said_and_written_as_numbers(
    train: Callable[..., Path], ran: list[SplitRunner], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train("run", "memory.split=auto")
    said = capsys.readouterr().out
    (runner,) = ran
    assert len(runner.devices) == 5
    assert "memory.split=[" in said
    assert "the model is divided: " in said
    assert "split:\n  - " in (folder / "config.yaml").read_text()


def test_a_resumed_run_keeps_the_division_that_was_chosen(
    train: Callable[..., Path], ran: list[SplitRunner], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    memory = ["memory=auto", "memory.split=auto", "checkpoint_every=2"]
    half = train("half", *memory, "steps=2")
    monkeypatch.setattr(from_config, "free_bytes", lambda device: 3 << 30)
    capsys.readouterr()
    train("resumed", *memory, f"resume={half}")
    assert "memory settings of the resumed run" in capsys.readouterr().out
    train("whole", "memory=auto", "checkpoint_every=2", f"resume={half}")
    assert "memory settings of the resumed run" not in capsys.readouterr().out
    assert len(ran) == 2


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("memory.split=[2,2]", "memory.split=[2, 2] has 4 blocks ... 2 double and 3 single ... add up to 5."),
        ("memory.split=[5]", "memory.split=[5] must be `auto`, or a list ... or null"),
        ("memory.split=[5,0]", "memory.split=[5, 0] must be"),
        ("memory.split=[2.0,3]", "must be `auto`"),
        ("memory.split=half", "memory.split='half' must be"),
        ("memory.split=true", "memory.split=True must be"),
        ("memory.split=[2,3] memory.offload_blocks=1", "memory.offload_blocks=1 does not work with memory.split"),
        (
            "memory.split=auto memory.offload_activations=true",
            "memory.offload_activations=true does not work ... Set memory.offload_activations=false",
        ),
        (
            "memory.split=[2,3]",
            "memory.split=[2, 3] divides a model over GPUs, and this is device=cpu. Set memory.split=null.",
        ),
        (
            "memory.split=auto",
            "memory.split=auto divides a model over GPUs, and this is device=cpu. Set memory.split=null.",
        ),
        ("memory.split=[2,3] shard=true", "memory.split=[2, 3] ... does not work with shard=true."),
    ],
)
def test_a_bad_division_is_refused(small: Callable[..., list[str]], setting: str, message: str) -> None:
    assert holds(refusal(*small(*setting.split()), task=load_config), message)


def test_more_gpus_than_blocks_are_refused(small: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr("train.config.run_config.split_devices", lambda *arguments: [cpu] * 6)
    with pytest.raises(ValueError, match=r"^memory\.split divides 5 blocks over 6 GPUs"):
        load_config(compose(*small("memory.split=auto")))


def test_jobs_of_a_sweep_use_a_divided_model_again(
    train: Callable[..., Path],
    ran: list[SplitRunner],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("train.run.is_sweep", lambda: True)
    try:
        first, second = (train(name, "memory.split=[3,2]") for name in ("first", "second"))
        assert "using the transformer of the previous job" in capsys.readouterr().out
        train("third", "memory.split=[2,3]")
        assert "using the transformer of the previous job" not in capsys.readouterr().out
    finally:
        SHARED.free()
    same_runs(first, second)
    assert len(ran) == 3


def test_an_evaluation_says_that_it_is_on_one_device(train: Callable[..., Path], ran: list[SplitRunner]) -> None:
    folder = train("run", "memory.split=[1,4]", "checkpoint_every=2")
    saved = SavedRun(folder, "cpu", {"prompts": ["a cup"]}, [0])
    assert "the model was divided over 2 GPUs in training, and is on one device here" in saved.notes
    assert saved.config.memory.split is None


def test_gpus_that_multiply_differently_are_refused(
    small: Callable[..., list[str]], ran: list[SplitRunner], monkeypatch: pytest.MonkeyPatch
) -> None:
    meta = torch.device("meta")
    monkeypatch.setattr("train.config.run_config.split_devices", lambda *arguments: [torch.device("cpu"), meta])
    monkeypatch.setattr(Precision, "multiplies_in_8_bits", lambda self, device: torch.device(device) != meta)
    with pytest.raises(ValueError, match=r"^memory\.split=\[2, 3\]: meta does not multiply in fp8, as other GPUs"):
        load_config(compose(*small("precision=fp8", "memory.split=[2,3]")))
