"""The folders that a run writes: one run at a time, writable before anything slow begins, files whole or absent.

A run folder is held by a lock on its `.lock`, which the system lets go when the process ends, however it ends. So
nothing stale can be left that blocks the next run. Where there are no such locks (Windows, some network file systems)
nothing is held.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path

from PIL import Image

from data.files import atomic_write


def reason(error: OSError) -> str:
    """What the system says, without number and path."""
    return error.strerror or str(error)


def near(path: Path) -> Path:
    """An absolute `path` as it is said: from the current folder, if it lies within."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def make_writable(folder: Path, key: str) -> None:
    """Make `folder` and try it out. Raises ValueError, naming `key`, if nothing can be written there."""
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("written")
    except OSError as error:
        raise ValueError(f"{key}={str(folder)!r} cannot be written ({reason(error)}): give another folder") from error
    finally:
        if probe.is_file():
            probe.unlink()


def make_new(folder: Path) -> Path:
    """Make `folder`, or where the name is taken the first free one of `folder_1`, `folder_2` ..., and return it."""
    for name in itertools.chain([folder.name], (f"{folder.name}_{i}" for i in itertools.count(1))):
        try:
            folder.with_name(name).mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise ValueError(
                f"{folder} cannot be made ({reason(error)}): give another place, output_dir=..."
            ) from error
        return folder.with_name(name)
    raise AssertionError("names do not end")


def write_whole(file: Path, content: str | Image.Image) -> None:
    """Write a text, or an image as PNG, to `file`; it is as before or complete. Raise ValueError if that fails."""
    try:
        with atomic_write(file) as temporary:
            if isinstance(content, str):
                temporary.write_text(content)
            else:
                content.save(temporary, "PNG")
    except OSError as error:
        raise ValueError(
            f"{file} cannot be written ({reason(error)}): make room there, or move away what is in its place"
        ) from error


def opened(file: Path) -> Image.Image | None:
    """The picture in `file`; None if it cannot be read, as when it is half written."""
    try:
        with Image.open(file) as image:
            image.load()
            return image
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
