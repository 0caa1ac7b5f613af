"""Folders and files that a run writes: checked before slow work begins, and complete or absent."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf._utils import get_yaml_loader
from PIL import Image

from data.files import atomic_write
from flux2.utils.images import open_image
from flux2.utils.json_files import MOST_DEPTH, read_text

MOST_YAML = 1 << 20  # bytes; the configuration of a run has some 5,000


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
        probe.write_text("written", encoding="utf-8")
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


def write_whole(file: Path, content: str | Iterator[str] | Image.Image) -> None:
    """Write a text, also in pieces, or an image as PNG, to `file` atomically. Raise ValueError if that fails."""
    try:
        with atomic_write(file) as temporary:
            if isinstance(content, Image.Image):
                content.save(temporary, "PNG")
            else:
                pieces = [content] if isinstance(content, str) else content
                with temporary.open("wb") as stream:
                    stream.writelines(piece.encode(errors="backslashreplace") for piece in pieces)  # not UTF-8: names
    except OSError as error:
        raise ValueError(
            f"{file} cannot be written ({reason(error)}). Make room there, or remove what is in its place"
        ) from error


def read_yaml(file: Path) -> Any:
    """Return the value in a YAML file that may come from someone else: plain dicts, lists and scalars.

    Nothing is interpolated. Numbers are read as OmegaConf reads them. Raise ValueError for a file that cannot be read,
    that is larger or more deeply nested than a configuration, or that has aliases, which can stand for any amount of
    memory, or values that are no plain ones.
    """
    text = read_text(file, MOST_YAML)
    depth = 0
    try:
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MOST_DEPTH:
                raise ValueError("it is nested too deeply")
            if isinstance(event, yaml.AliasEvent):
                raise ValueError("it has an alias, which is not read")
            if isinstance(event, yaml.ScalarEvent) and re.fullmatch(r"[-+0-9_:.]{40,}", event.value):
                raise ValueError("it has a number of more than 40 digits")
        found = yaml.load(text, get_yaml_loader())  # a SafeLoader
        check_plain(found)
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"{file} cannot be read ({' '.join(str(error).split())})") from error
    return found


def check_plain(value: Any) -> None:
    """Raise ValueError unless `value` consists of dicts, lists, texts, and numbers that fit into 64 bits."""
    if isinstance(value, dict | list):
        for item in [*value, *value.values()] if isinstance(value, dict) else value:
            check_plain(item)
    elif not isinstance(value, str | int | float | None) or (isinstance(value, int) and abs(value) >= 2**64):
        raise ValueError(f"it has a value of the type {type(value).__name__} that no configuration has")


def read_image(file: Path | None) -> Image.Image | None:
    """Return the image in `file`; None if there is none or it cannot be read, for example if it is incomplete."""
    if file is None or not file.is_file():  # a pipe would block
        return None
    try:
        with open_image(file) as image:
            image.load()
            return image
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
