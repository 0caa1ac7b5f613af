"""Images in files for the tests of data/cache/image_digests.py.

A test module says `pytest_plugins = ("digest_helpers",)` to get the fixtures, and may import the rest before that:
PYTEST_DONT_REWRITE.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from PIL import Image

from data.cache import image_digests
from data.sources.images import Picture, file_picture


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The pictures whose content is read, in order."""
    happened: list[str] = []
    digest = Picture.digest

    def watched(picture: Picture) -> str:
        happened.append(picture.name)
        return digest(picture)

    monkeypatch.setattr(Picture, "digest", watched)
    return happened


def drawn(path: Path, color: str, size: tuple[int, int] = (20, 10), age: float = 100.0) -> Picture:
    """A picture in a file that seems to have been written some seconds ago."""
    Image.new("RGB", size, color).save(path)
    then = time.time() - age
    os.utime(path, (then, then))
    return file_picture(path)


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of the index is ahead of the files': their inodes were changed just now."""
    now = time.time
    monkeypatch.setattr(image_digests.time, "time", lambda: now() + 100)
