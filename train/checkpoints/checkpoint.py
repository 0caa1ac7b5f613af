"""Save and load the checkpoints of a run.

A checkpoint is a folder `checkpoints/step_000250/`: the adapter that is evaluated, a `<name>.pt` for each part of the
training state (such as the optimizer), and `state.json` with the number of finished steps and the size and checksum of
every file. It is written under a temporary name, flushed to the disk and renamed, so it is complete or absent, and
files that are damaged later are detected. There is no generator or sampler state to save: all random numbers depend on
the seed and the step alone (`data.loader`), and the learning rate on the step.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import peft
import torch
import xxhash
from safetensors import SafetensorError

from flux2 import adapters

CONFIG_FILE = "config.yaml"  # the run's configuration; each checkpoint has a copy
STATE_FILE = "state.json"
NAME = r"step_\d+"  # name of a checkpoint's folder
REMEDY = "Delete {} to resume from the checkpoint before it"
FILE_ERRORS = (OSError, RuntimeError, SafetensorError)  # what the libraries raise for a full disk or an unreadable file
CHUNK = 1 << 24  # bytes


class NotSaved(OSError):  # noqa: N818
    """A checkpoint could not be written; its incomplete files are removed."""


class Stateful(Protocol):
    """A part of the training state: an optimizer, a moving average."""

    def state_dict(self) -> Mapping[str, Any]:
        """Return what `torch.load` can read with `weights_only`: tensors, numbers, strings, lists, dictionaries."""

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Restore what `state_dict` returned, from tensors on the CPU. Raises if it does not fit."""


def number(checkpoint: Path) -> int:
    """Return the finished steps in the name of a checkpoint's folder."""
    return int(checkpoint.name.removeprefix("step_"))


def checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first; `check` verifies that one can be read."""
    found = [path.parent for path in folder.glob(f"checkpoints/step_*/{STATE_FILE}")]
    return sorted((path for path in found if re.fullmatch(NAME, path.name, re.ASCII)), key=number)


def state(checkpoint: Path) -> dict[str, Any]:
    """Return the content of a checkpoint's state file. Raises ValueError, naming the file, if it is invalid."""
    file = checkpoint / STATE_FILE
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read ({error}). {REMEDY.format(checkpoint)}") from error
    counts = [found.get(key) for key in ("step", "images_per_step")] if isinstance(found, dict) else [None]
    if any(type(count) is not int or count < 0 for count in counts):
        raise ValueError(f"{file} has no number of finished steps. {REMEDY.format(checkpoint)}")
    if "files" not in found:
        raise ValueError(
            f"{file} has no checksums: {checkpoint} was written by an older version. Its adapter can be used, but a "
            "run cannot resume from it: start a new one"
        )
    if found.pop("checksum", None) != checksum_of(found):
        raise ValueError(f"{file} is damaged (its checksum differs). {REMEDY.format(checkpoint)}")
    files = found["files"]
    if not isinstance(files, dict) or not all(
        isinstance(about, dict) and {"size", "xxh3_128"} <= about.keys() for about in files.values()
    ):
        raise ValueError(f"{file} does not list size and checksum of each file. {REMEDY.format(checkpoint)}")
    if re.fullmatch(NAME, checkpoint.name, re.ASCII) and number(checkpoint) != found["step"]:
        right = checkpoint.with_name(f"step_{found['step']:06d}")
        raise ValueError(
            f"{checkpoint} is the checkpoint of step {found['step']}, according to {STATE_FILE}. Rename it to "
            f"{right.name}, or delete it"
        )
    return found


def check(checkpoint: Path, within: str = "") -> dict[str, Any]:
    """Return a checkpoint's state after verifying all files, or those in its folder `within`.

    Raises ValueError, naming the file, for the first one that is missing or damaged.
    """
    found = state(checkpoint)
    for name, about in found["files"].items():
        file = checkpoint / name
        if not file.is_relative_to(checkpoint / within):
            continue
        try:
            size = file.stat().st_size
            same = size == about["size"] and checksum(file) == about["xxh3_128"]
        except OSError as error:
            raise ValueError(f"{file} cannot be read ({error}). {REMEDY.format(checkpoint)}") from error
        if not same:
            what = "its checksum differs" if size == about["size"] else f"{size} bytes, not {about['size']}"
            raise ValueError(f"{file} is damaged ({what}). {REMEDY.format(checkpoint)}")
    return found


def checksum(file: Path, *, flush: bool = False) -> str:
    """Return the checksum of a file; with `flush` the file is on the disk afterwards."""
    digest = xxhash.xxh3_128()
    with file.open("rb") as opened:
        while chunk := opened.read(CHUNK):
            digest.update(chunk)
        if flush:
            os.fsync(opened.fileno())
    return digest.hexdigest()


def checksum_of(about: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(about, sort_keys=True).encode())


def seal(folder: Path, about: Mapping[str, Any]) -> None:
    """Write the state file of a checkpoint: `about`, and size and checksum of every other file in `folder`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != STATE_FILE)
    listed = {
        file.relative_to(folder).as_posix(): {"size": file.stat().st_size, "xxh3_128": checksum(file, flush=True)}
        for file in files
    }
    content = {**about, "files": listed}
    (folder / STATE_FILE).write_text(json.dumps({**content, "checksum": checksum_of(content)}, indent=1))
    checksum(folder / STATE_FILE, flush=True)


def save(
    folder: Path,
    step: int,
    wrapped: peft.PeftModel,
    parts: Mapping[str, Stateful],
    *,
    base: str,
    license: str,
    images_per_step: int,
    about: Mapping[str, Any] | None = None,
) -> Path:
    """Write the checkpoint of `step` finished steps on the main process; return its folder.

    Args:
        folder: Folder of the run.
        parts: Parts of the training state, each written as `<name>.pt`.
        about: Additional content of the state file, as JSON values.

    Raises NotSaved if the disk is full or the folder cannot be written.
    """
    place = folder / "checkpoints" / f"step_{step:06d}"
    unfinished = place.with_name(f".{place.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        adapters.save(wrapped, unfinished / "adapter", base=base, license=license)
        for name, part in parts.items():
            torch.save(part.state_dict(), unfinished / f"{name}.pt")
        if (folder / CONFIG_FILE).exists():
            shutil.copyfile(folder / CONFIG_FILE, unfinished / CONFIG_FILE)
        seal(unfinished, {"step": step, "base": base, "images_per_step": images_per_step, **(about or {})})
        old = set_aside(place) if place.exists() else None  # the run resumed from an earlier step
        unfinished.rename(place)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if not isinstance(error, FILE_ERRORS):
            raise
        raise NotSaved(f"{place} could not be written ({error})") from error
    return place


def set_aside(place: Path) -> Path:
    """Rename a checkpoint before its deletion, so that a kill in between leaves none that looks complete."""
    to_delete = place.with_name(f".{place.name}.old")
    shutil.rmtree(to_delete, ignore_errors=True)  # left by an earlier kill
    return place.rename(to_delete)


def tidy(folder: Path) -> None:
    """Remove checkpoints that a killed run left partly written or partly deleted."""
    for path in folder.glob("checkpoints/.step_*"):
        shutil.rmtree(path, ignore_errors=True)


def load(checkpoint: Path, wrapped: peft.PeftModel, parts: Mapping[str, Stateful]) -> dict[str, Any]:
    """Restore the adapter, then each part in order; return the checkpoint's state.

    Raises ValueError, naming file or part, if a file is damaged, or `parts` do not match the saved ones.
    """
    found = check(checkpoint)
    have = {Path(name).stem for name in found["files"] if name.endswith(".pt") and "/" not in name}
    if have != parts.keys():
        missing = [f"it has no {name}.pt" for name in sorted(parts.keys() - have)]
        extra = [f"nothing here reads its {name}.pt" for name in sorted(have - parts.keys())]
        raise ValueError(f"{checkpoint} belongs to another kind of run: {'; '.join(missing + extra)}")
    try:
        adapters.restore(wrapped, checkpoint / "adapter")
    except FILE_ERRORS as error:
        raise ValueError(
            f"{checkpoint} cannot be read ({type(error).__name__}). {REMEDY.format(checkpoint)}"
        ) from error
    for name, part in parts.items():
        file = checkpoint / f"{name}.pt"
        try:
            part.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        except Exception as error:  # each part raises its own type if it does not fit
            raise ValueError(
                f"{file} does not fit this run's {name} ({error!r}). {REMEDY.format(checkpoint)}"
            ) from error
    return found
