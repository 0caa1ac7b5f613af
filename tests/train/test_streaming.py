"""Runs of train/run.py with blocks that stream: curve, adapter and pictures are those without, bit for bit."""

from pathlib import Path

import pytest
from train_helpers import CONF, EVENTS, adapter, compose, lines, same_tensors, slow_but

from flux2.memory.activation_checkpointing import POLICIES
from flux2.memory.block_offload import Offloader
from train.stages.memory import load_config

pytest_plugins = ("train_helpers", "offload_helpers")

SETTINGS = [*EVENTS, "checkpoint_every=2"]


def same_runs(one: Path, other: Path) -> None:
    assert lines(one) == lines(other)
    assert len(lines(one)) >= 3
    assert same_tensors(adapter(one), adapter(other))
    grids = sorted(path.name for path in (one / "samples").glob("*.png"))
    assert all((one / "samples" / name).read_bytes() == (other / "samples" / name).read_bytes() for name in grids)


PRECISIONS = sorted(file.stem for file in (CONF / "precision").glob("*.yaml"))


@pytest.mark.parametrize("precision", slow_but(PRECISIONS, fast=("nf4",)))
def test_a_run_is_the_same_in_every_precision(train, scrambled: list[Offloader], precision: str) -> None:
    plain = train("plain", f"precision={precision}", *SETTINGS)
    assert scrambled == []
    streaming = train("streaming", f"precision={precision}", *SETTINGS, "memory.offload_blocks=0.5")
    same_runs(streaming, plain)
    (offloader,) = scrambled
    assert [block.name for block in offloader.blocks] == ["double_blocks.0", "single_blocks.0", "single_blocks.2"]
    assert offloader.ring is not None
    assert offloader.ring.copied > 30 * sum(block.host.nbytes for block in offloader.blocks)
    assert len(list((streaming / "samples").glob("*.png"))) == 3


@pytest.mark.parametrize("policy", POLICIES)
def test_a_run_is_the_same_under_every_policy(train, scrambled: list[Offloader], policy: str) -> None:
    settings = [f"memory.checkpointing={policy}", "adapter.dropout=0.2", "steps=3"]
    settings += ["memory.budget_gb=2e-4"] if policy == "budget" else []
    plain = train("plain", *settings, kind="klein")
    streaming = train(
        "streaming", *settings, "memory.offload_blocks=3", "memory.offload_activations=true", kind="klein"
    )
    same_runs(streaming, plain)
    (offloader,) = scrambled
    assert len(offloader.blocks) == 3
    assert offloader.activation_pool is not None
    assert offloader.activation_pool.copied > 0


def test_a_run_resumes_with_streaming_where_it_stopped_without(train, scrambled: list[Offloader]) -> None:
    whole = train("whole")
    first = train("parts", "steps=2", "checkpoint_every=2")
    parts = train("parts", f"resume={first}", "memory.offload_blocks=1.0")
    assert same_tensors(adapter(parts), adapter(whole))
    assert len(scrambled) == 1


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("memory.offload_blocks=1.5", r"memory\.offload_blocks=1\.5"),
        ("memory.offload_blocks=half", r"memory\.offload_blocks='?half"),
        ("memory.offload_blocks=true", r"memory\.offload_blocks=[Tt]rue"),
        ("memory.offload_blocks=6", r"memory\.offload_blocks=6.* 5 "),
        ("memory.offload_activations=1", r"memory\.offload_activations=1.* true .*false"),
    ],
)
def test_settings_that_cannot_be_are_one_message(small, setting: str, said: str) -> None:
    with pytest.raises(ValueError, match=f"^{said}"):
        load_config(compose(*small(setting)))
