"""The generate command on a small model, for its tests."""

import sys
from collections.abc import Callable
from pathlib import Path

import helpers
import pytest

from flux2.generate import command as generate
from flux2.models.variants import VARIANTS


@pytest.fixture
def command(
    model_folders: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., int]:
    """Runs the command in an empty folder with a small model in the place of `tiny`."""
    monkeypatch.setitem(VARIANTS, "tiny", helpers.VARIANTS["dev"])
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> int:
        path = ["--path", str(model_folders("dev"))]
        sizes = ["--width", "32", "--height", "32", "--steps", "2"]
        monkeypatch.setattr(
            sys, "argv", ["generate", "--prompt", "a cup", "--device", "cpu", *path, *sizes, *arguments]
        )
        return generate.main()

    run.path = str(model_folders("dev"))  # type: ignore[attr-defined]
    return run
