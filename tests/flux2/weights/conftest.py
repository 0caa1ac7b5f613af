"""Folders of models that a test may damage."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def copied(model_folders: Callable[[str], Path], tmp_path: Path) -> Path:
    """A dev model folder that a test may damage."""
    shutil.copytree(model_folders("dev"), tmp_path / "model")
    return tmp_path / "model"
