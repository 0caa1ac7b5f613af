"""Save a run every so often, and read what was saved.

A checkpoint is a folder `checkpoints/step_000250/`: the adapter as it is used, a `<name>.pt` for each part of the
training state (the optimizer is one), and `state.json` with the number of finished steps and the size and checksum of
every file. It is written beside its place, flushed to the disk and renamed, so it is whole or absent, and what a disk
damages later is found and named. There is no generator or sampler state to save: everything random is a function of
the seed and the step (`data.loader`), and the learning rate one of the step.
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

CONFIG_FILE = "config.yaml"  # of the run, a copy of which is in each of its checkpoints
STATE_FILE = "state.json"
NAME = r"step_\d+"  # of a checkpoint's folder
REMEDY = "delete {} to go on from the one before"
UNREADABLE = (OSError, RuntimeError, SafetensorError)
NOT_WRITTEN = (OSError, RuntimeError, SafetensorError)  # a full disk, as each of the libraries says it
CHUNK = 1 << 24  # bytes


class NotSaved(OSError):  # noqa: N818
    """A checkpoint could not be written; what was written of it is removed."""


class Stateful(Protocol):
    """A part of the training state: an optimizer, a moving average."""

    def state_dict(self) -> Mapping[str, Any]:
        """Tensors, numbers, texts, lists and dictionaries of them: what `torch.load` reads with `weights_only`."""

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Take over what `state_dict` gave, from tensors on the CPU. Raises if it does not fit."""


# ------------------------------------------------------------------ what is there


def number(checkpoint: Path) -> int:
    """The finished steps in the name of a checkpoint's folder."""
    return int(checkpoint.name.removeprefix("step_"))


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first; whether they can be read `check` tells."""
    found = [path for path in folder.glob("checkpoints/step_*") if (path / STATE_FILE).exists()]
    return sorted((path for path in found if re.fullmatch(NAME, path.name, re.ASCII)), key=number)


def state(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says about itself: finished steps, base model, images a step, its files.

    Raises ValueError, naming the file, if it cannot be read or is not such a file.
    """
    file = checkpoint / STATE_FILE
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file} cannot be read ({error}): {REMEDY.format(checkpoint)}") from error
    counts = [found.get(key) for key in ("step", "images_per_step")] if isinstance(found, dict) else [None]
    if any(type(count) is not int or count < 0 for count in counts):
        raise ValueError(f"{file} does not say how many steps are done: {REMEDY.format(checkpoint)}")
    if "files" not in found:
        raise ValueError(
            f"{file} has no checksums: {checkpoint} was written by an older version. Its adapter can be used, but a "
            "run cannot go on from it; start a new one"
        )
    if found.pop("checksum", None) != checksum_of(found):
        raise ValueError(f"{file} is damaged (its checksum differs): {REMEDY.format(checkpoint)}")
    if not is_listing(found["files"]):
        raise ValueError(f"{file} does not list size and checksum of each file: {REMEDY.format(checkpoint)}")
    if re.fullmatch(NAME, checkpoint.name, re.ASCII) and number(checkpoint) != found["step"]:
        right = checkpoint.with_name(f"step_{found['step']:06d}")
        raise ValueError(
            f"{checkpoint} is that of step {found['step']}, by {STATE_FILE}: name it {right.name}, or "
            f"{REMEDY.format(checkpoint)}"
        )
    return found


def is_listing(files: object) -> bool:
    """Whether these are the files of a checkpoint, as `seal` lists them."""
    return isinstance(files, dict) and all(
        isinstance(about, dict) and {"size", "xxh3_128"} <= about.keys() for about in files.values()
    )


def check(checkpoint: Path, within: str = "") -> dict[str, Any]:
    """The state of a checkpoint whose files are all as they were written, or those in its folder `within`.

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
            raise ValueError(f"{file} cannot be read ({error}): {REMEDY.format(checkpoint)}") from error
        if not same:
            what = "its checksum differs" if size == about["size"] else f"{size} bytes, not {about['size']}"
            raise ValueError(f"{file} is damaged ({what}): {REMEDY.format(checkpoint)}")
    return found


def checksum(file: Path, *, flush: bool = False) -> str:
    """Of a file's content; with `flush` it is on the disk afterwards."""
    digest = xxhash.xxh3_128()
    with file.open("rb") as opened:
        while chunk := opened.read(CHUNK):
            digest.update(chunk)
        if flush:
            os.fsync(opened.fileno())
    return digest.hexdigest()


def checksum_of(about: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(about, sort_keys=True).encode())


# ------------------------------------------------------------------ writing


def seal(folder: Path, about: Mapping[str, Any]) -> None:
    """Write the state file of a checkpoint: `about`, and size and checksum of every other file in `folder`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != STATE_FILE)
    listed = {
        file.relative_to(folder).as_posix(): {"size": file.stat().st_size, "xxh3_128": checksum(file, flush=True)}
        for file in files
    }
    whole = {**about, "files": listed}
    (folder / STATE_FILE).write_text(json.dumps({**whole, "checksum": checksum_of(whole)}, indent=1))
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
    """Write the checkpoint of `step` finished steps; returns its folder. Called by the main process alone.

    Args:
        folder: of the run.
        parts: each is written as `<name>.pt`.
        about: what else is to be in the state file, as JSON has it.

    Raises NotSaved if the disk is full or the folder cannot be written.
    """
    place = folder / "checkpoints" / f"step_{step:06d}"
    unfinished = place.with_name(f".{place.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        adapters.save(wrapped, unfinished / "adapter", base=base, license=license)
        for name, part in parts.items():
            torch.save(part.state_dict(), part_file(unfinished, name))
        if (folder / CONFIG_FILE).exists():
            shutil.copyfile(folder / CONFIG_FILE, unfinished / CONFIG_FILE)
        seal(unfinished, {"step": step, "base": base, "images_per_step": images_per_step, **(about or {})})
        old = set_aside(place) if place.exists() else None  # of a run that went on from an earlier step
        unfinished.rename(place)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if not isinstance(error, NOT_WRITTEN):
            raise
        raise NotSaved(f"{place} could not be written ({error})") from error
    return place


def part_file(checkpoint: Path, name: str) -> Path:
    return checkpoint / f"{name}.pt"


def set_aside(place: Path) -> Path:
    """Rename a checkpoint that is to be deleted, so that a kill in the middle leaves none that looks whole."""
    doomed = place.with_name(f".{place.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)  # of an earlier kill
    return place.rename(doomed)


# ------------------------------------------------------------------ rotation


def tidy(folder: Path) -> None:
    """Remove what a killed run left half written or half deleted."""
    for path in folder.glob("checkpoints/.step_*"):
        shutil.rmtree(path, ignore_errors=True)


# ------------------------------------------------------------------ reading


def load(checkpoint: Path, wrapped: peft.PeftModel, parts: Mapping[str, Stateful]) -> dict[str, Any]:
    """Put the adapter back as it was saved, then each part in its order; returns what `state` gives.

    Raises ValueError, naming file or part, if a file is damaged, if `parts` are not those that were saved, or if one
    does not fit.
    """
    found = check(checkpoint)
    have = {Path(name).stem for name in found["files"] if name.endswith(".pt") and "/" not in name}
    if have != parts.keys():
        missing = [f"it has no {part_file(Path(), name)}" for name in sorted(parts.keys() - have)]
        extra = [f"nothing here reads its {part_file(Path(), name)}" for name in sorted(have - parts.keys())]
        raise ValueError(f"{checkpoint} is of another kind of run: {'; '.join(missing + extra)}")
    try:
        adapters.restore(wrapped, checkpoint / "adapter")
    except UNREADABLE as error:
        raise ValueError(
            f"{checkpoint} cannot be read ({type(error).__name__}): {REMEDY.format(checkpoint)}"
        ) from error
    for name, part in parts.items():
        file = part_file(checkpoint, name)
        try:
            part.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        except Exception as error:  # of what does not fit, each part raises what it likes
            raise ValueError(
                f"{file} does not fit this run's {name} ({error!r}): {REMEDY.format(checkpoint)}"
            ) from error
    return found
