"""Folders and files that a run writes: checked before slow work begins, and complete or absent."""

from __future__ import annotations

import os
from pathlib import Path

from PIL import Image

from data.files import atomic_write
from flux2.utils.images import open_image


def reason(error: OSError) -> str:
    """Return the system's message, without error number and path."""
    return error.strerror or str(error)


def short_path(path: Path) -> Path:
    """Return an absolute path relative to the current folder, if it is inside."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


def make_writable(folder: Path, key: str) -> None:
    """Create `folder` and write a test file. Raise ValueError, naming `key`, if that fails."""
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("written")
    except OSError as error:
        raise ValueError(f"{key}={str(folder)!r} cannot be written ({reason(error)}). Give another folder") from error
    finally:
        if probe.is_file():
            probe.unlink()


def make_new(folder: Path) -> Path:
    """Create and return `folder`, or the first free name of `folder_1`, `folder_2`, ... if it exists."""
    place, number = folder, 0
    while True:
        try:
            place.mkdir(parents=True)
            return place
        except FileExistsError:
            number += 1
            place = folder.with_name(f"{folder.name}_{number}")
        except OSError as error:
            raise ValueError(f"{folder} cannot be created ({reason(error)}). Set another output_dir=...") from error


def write_whole(file: Path, content: str | Image.Image) -> None:
    """Write a text, or an image as PNG, to `file` atomically. Raise ValueError if that fails."""
    try:
        with atomic_write(file) as temporary:
            if isinstance(content, str):
                temporary.write_text(content)
            else:
                content.save(temporary, "PNG")
    except OSError as error:
        raise ValueError(
            f"{file} cannot be written ({reason(error)}). Make room there, or remove what is in its place"
        ) from error


def read_image(file: Path | None) -> Image.Image | None:
    """Return the image in `file`; None if there is none or it cannot be read, for example because it is incomplete."""
    if file is None:
        return None
    try:
        with open_image(file) as image:
            image.load()
            return image
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
