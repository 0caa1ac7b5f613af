"""Writing a file so that it is complete or absent."""

import os
from pathlib import Path

import pytest

from data.files import atomic_write


def test_a_file_takes_its_place_when_it_is_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda number: flushed.append(not (tmp_path / "file").exists()))
    with atomic_write(tmp_path / "file") as temporary:
        temporary.write_text("x")
    assert flushed == [True]
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_after_an_error_a_file_is_as_it_was(tmp_path: Path) -> None:
    def half(file: Path) -> None:
        with atomic_write(file) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    (tmp_path / "file").write_text("before")
    with pytest.raises(KeyboardInterrupt):
        half(tmp_path / "file")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "before")]
