"""Sweeps in this process, and what they load: what the tests of sweeps share.

A test module says `pytest_plugins = ("train_helpers", "sweep_helpers")` to get the fixtures, and may import the rest
before that: PYTEST_DONT_REWRITE.
"""

from pathlib import Path

import pytest
from train_helpers import adapter, lines, same_tensors

import train.stages.model

LOOKS = ["validate_every=2", "sample_every=2", "sample.prompts=[a red cup]", "sample.steps=2"]


@pytest.fixture
def grid(run_command, small, tmp_path):
    """`grid("adapter.rank=2,4", kind="klein")`: a sweep into `tmp_path / "sweep"`; (exit code, output, errors)."""

    def run(*overrides, kind="dev"):
        return run_command("-m", *small(f"output_dir={tmp_path / 'sweep'}", *overrides, kind=kind))

    return run


@pytest.fixture
def loads(monkeypatch):
    """What was loaded, in order."""
    found = []

    def spy(name):
        load = getattr(train.stages.model, name)

        def loaded(*arguments, **options):
            found.append(name)
            return load(*arguments, **options)

        monkeypatch.setattr(train.stages.model, name, loaded)

    spy("load_transformer")
    spy("load_autoencoder")
    return found


def same_runs(one: Path, other: Path) -> None:
    assert lines(one) == lines(other)
    assert len(lines(one)) >= 3
    assert same_tensors(adapter(one), adapter(other))
    for sheet in (one / "samples").glob("*.png"):
        assert sheet.read_bytes() == (other / "samples" / sheet.name).read_bytes()
