"""What the demos of training say and leave: what their tests share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from train_helpers import Command, adapter, values

Judge = Callable[[dict[str, Any]], list[str]]


def short_settings(experiment: str, run: Path, cache: Path) -> list[str]:
    """The settings of a demo of two steps."""
    return [
        *(f"+experiment={experiment}", "steps=2", "batch_size=2", "preservation.samples=1"),
        *("sample_every=0", "validate_every=0", f"output_dir={run}", f"cache_dir={cache}"),
    ]


def run_demo(run_command: Command, settings: list[str], main: Callable[..., Any], file: Path) -> tuple[dict, str]:
    """Run a demo to a good end; its report in `file`, and what it said."""
    code, out, err = run_command(*settings, task=main)
    assert code == 0, err
    return json.loads(file.read_text()), out


def check_miss(judge: Judge, good: dict[str, float], key: str, bad: float, sentence: int) -> None:
    """One number that missed its threshold is judged so in its sentence alone, with its number."""
    judged = judge(good | {key: bad})
    assert [text[:3] for text in judged] == ["NO " if i == sentence else "yes" for i in range(len(judge(good)))]
    if key != "base_unchanged":
        assert f"{bad:.0%}" in judged[sentence]


def check_demo(run: Path, report: dict[str, Any], out: str, judge: Judge, columns: int) -> None:
    """A demo leaves its grid and its trained adapter, and says its judgment and where they are."""
    assert report["base_unchanged"] == 1.0
    page = Image.open(run / "grid.png")
    assert page.width > columns * 256
    assert page.height > 4 * 256
    assert len(values(run)) == 1  # the last step
    assert any(tensor.abs().max() > 0 for name, tensor in adapter(run).items() if "lora_B" in name)
    for sentence in judge(report):
        assert sentence in out
    assert f"{run / 'grid.png'}\n" in out
    assert f"-m flux2.generate --adapter {run / 'adapter'}" in out
