"""Warnings in one line, and the times of phases."""

import warnings

import pytest

from train.utils.console import PACKAGES, PHASES, phase, show_warning


def test_a_warning_of_python_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.showwarning = show_warning
        for file in (str(PACKAGES[0] / "layers" / "x.py"), "/lib/torch/x.py"):
            warnings.warn_explicit("the first\nand second line", UserWarning, file, 7)
    mine, other = capsys.readouterr().err.splitlines()
    assert mine == "warning: the first and second line"
    assert other == "warning: the first and second line (UserWarning at /lib/torch/x.py:7)"


def test_phases_are_timed_and_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1.0, 3.0, 10.0, 11.0])
    monkeypatch.setattr("train.utils.console.perf_counter", lambda: next(times))
    monkeypatch.setattr("train.utils.console.PHASES", PHASES)
    PHASES.clear()

    @phase("data")
    def prepare() -> str:
        return "samples"

    assert [prepare(), prepare()] == ["samples", "samples"]
    assert PHASES == {"data": 3.0}
    PHASES.clear()
