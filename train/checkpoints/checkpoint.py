"""Save and load the checkpoints of a run.

A checkpoint is a folder `checkpoints/step_000250/`: the adapter that is evaluated, a `<name>.pt` for each part of the
training state (such as the optimizer), and `state.json` with the number of finished steps and the size and checksum of
every file. It is written under a temporary name, flushed to the disk and renamed, so it is complete or absent, and
files that are damaged later are detected. There is no generator or sampler state to save: all random numbers depend on
the seed and the step alone (`data.loader`), and the learning rate on the step.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import peft
import torch
import xxhash
from safetensors import SafetensorError

from flux2 import adapters
from flux2.adapters.checksums import STATE_FILE
from flux2.adapters.files import CHECKPOINT
from flux2.utils.files import NotWritten, checksum, move, name_write_errors, write_text

CONFIG_FILE = "config.yaml"  # the run's configuration; each checkpoint has a copy
# names under which files are written before they are complete: `atomic_write`, `adapters.save`, `make_writable`
LEFTOVER = re.compile(r"\..+\.([0-9a-f]{32}\.tmp|[0-9a-f]{4}-\d+-[0-9a-f]{4}\.part)|\.saving-\w+|\.probe-\d+", re.ASCII)
WRITTEN = (".", "adapter", "samples", "tensorboard")  # folders in the run folder that only its run writes to
FILE_ERRORS = (OSError, RuntimeError, SafetensorError)  # what the libraries raise for a full disk or an unreadable file


class NotSaved(OSError):  # noqa: N818
    """A checkpoint could not be written; its incomplete files are removed."""


class Stateful(Protocol):
    """A part of the training state: an optimizer, a moving average."""

    def state_dict(self) -> Mapping[str, Any]:
        """Return what `torch.load` can read with `weights_only`: tensors, numbers, strings, lists, dictionaries."""

    def load_state_dict(self, state_dict: Any, /) -> Any:
        """Restore what `state_dict` returned, from tensors on the CPU. Raises if it does not fit."""


def unusable(checkpoint: Path, problem: str) -> ValueError:
    return ValueError(f"{problem}. Delete {checkpoint} to resume from the checkpoint before it")


def step_of(checkpoint: Path) -> int:
    """Return the finished steps in the name of a checkpoint's folder."""
    return int(checkpoint.name.removeprefix("step_"))


def checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first; `check` verifies that one can be read."""
    found = [path.parent for path in folder.glob(f"checkpoints/step_*/{STATE_FILE}")]
    return sorted((path for path in found if CHECKPOINT.fullmatch(path.name)), key=step_of)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return the content of a checkpoint's state file. Raises ValueError, naming the file, if it is invalid."""
    file = checkpoint / STATE_FILE
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise unusable(checkpoint, f"{file} cannot be read ({error})") from error
    counts = [found.get(key) for key in ("step", "images_per_step")] if isinstance(found, dict) else [None]
    if any(type(count) is not int or count < 0 for count in counts):
        raise unusable(checkpoint, f"{file} has no number of finished steps")
    if "files" not in found:
        raise ValueError(
            f"{file} has no checksums: {checkpoint} was written by an older version. Its adapter can be used, but a "
            "run cannot resume from it: start a new one"
        )
    if found.pop("checksum", None) != checksum_of(found):
        raise unusable(checkpoint, f"{file} is damaged (its checksum differs)")
    entries = found["files"].values() if isinstance(found["files"], dict) else [None]
    if not all(isinstance(entry, dict) and {"size", "xxh3_128"} <= entry.keys() for entry in entries):
        raise unusable(checkpoint, f"{file} does not list size and checksum of each file")
    if CHECKPOINT.fullmatch(checkpoint.name) and step_of(checkpoint) != found["step"]:
        raise ValueError(
            f"{checkpoint} is the checkpoint of step {found['step']}, according to {STATE_FILE}. Rename it to "
            f"step_{found['step']:06d}, or delete it"
        )
    return found


def check(checkpoint: Path, within: str = "") -> dict[str, Any]:
    """Return a checkpoint's state after verifying its files (in `within`). Raise ValueError, naming a damaged one."""
    found = read_state(checkpoint)
    for name, entry in found["files"].items():
        file = checkpoint / name
        if not file.is_relative_to(checkpoint / within):
            continue
        try:
            if (size := file.stat().st_size) != entry["size"]:
                raise unusable(checkpoint, f"{file} is damaged ({size} bytes, not {entry['size']})")
            if checksum(file) != entry["xxh3_128"]:
                raise unusable(checkpoint, f"{file} is damaged (its checksum differs)")
        except OSError as error:
            raise unusable(checkpoint, f"{file} cannot be read ({error})") from error
    return found


def checksum_of(about: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(about, sort_keys=True).encode())


def seal(folder: Path, about: Mapping[str, Any]) -> None:
    """Write the state file of a checkpoint: `about`, and size and checksum of every other file in `folder`."""
    files = {
        file.relative_to(folder).as_posix(): {"size": file.stat().st_size, "xxh3_128": checksum(file, flush=True)}
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != STATE_FILE
    }
    content = {**about, "files": files}
    write_text(folder / STATE_FILE, json.dumps({**content, "checksum": checksum_of(content)}, indent=1))
    checksum(folder / STATE_FILE, flush=True)


def write_content(
    folder: Path, wrapped: peft.PeftModel, parts: Mapping[str, Stateful], base: str, license: str
) -> None:
    """Write the adapter and the training state; an error names the file."""
    adapters.save(wrapped, folder / "adapter", base=base, license=license)
    for name, part in parts.items():
        file = folder / f"{name}.pt"
        with name_write_errors(file), file.open("wb") as opened:  # for a path, the error would have no reason
            torch.save(part.state_dict(), opened)


def save(
    run: Path, step: int, wrapped: peft.PeftModel, parts: Mapping[str, Stateful], base: str, license: str, **about: Any
) -> Path:
    """Write the checkpoint of `step` finished steps of the run in the folder `run`; return the checkpoint's folder.

    Each of `parts` is written as `<name>.pt`; `about` is further content of the state file, such as `images_per_step`.
    Raises NotSaved if the disk is full or the folder cannot be written.
    """
    place = run / "checkpoints" / f"step_{step:06d}"
    unfinished = place.with_name(f".{place.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        with name_write_errors(place, unfinished):
            write_content(unfinished, wrapped, parts, base, license)
            if (run / CONFIG_FILE).exists():
                shutil.copyfile(run / CONFIG_FILE, unfinished / CONFIG_FILE)
            seal(unfinished, {"step": step, "base": base, **about})
        old = set_aside(place) if place.exists() else None  # the run resumed from an earlier step
        move(unfinished, place)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
    except NotWritten as error:
        raise NotSaved(f"{place} could not be saved: {error}") from error
    except FILE_ERRORS as error:
        raise NotSaved(f"{place} could not be written ({error})") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return place


def set_aside(place: Path) -> Path:
    """Rename a checkpoint before its deletion, so that a kill in between leaves none that looks complete."""
    to_delete = place.with_name(f".{place.name}.old")
    shutil.rmtree(to_delete, ignore_errors=True)  # left by an earlier kill
    move(place, to_delete)
    return to_delete


def remove_incomplete(folder: Path) -> None:
    """Remove what a killed run left partly written or partly deleted. The caller holds the lock of the run folder."""
    left = [path for name in WRITTEN for path in (folder / name).glob(".*") if LEFTOVER.fullmatch(path.name)]
    for path in [*folder.glob("checkpoints/.step_*"), *left]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):  # it takes some space and nothing else
                path.unlink()


def load(checkpoint: Path, wrapped: peft.PeftModel, parts: Mapping[str, Stateful]) -> dict[str, Any]:
    """Restore the adapter, then each part; return the state. Raise ValueError for a damaged file or other parts."""
    found = check(checkpoint)
    have = {Path(name).stem for name in found["files"] if name.endswith(".pt") and "/" not in name}
    if have != parts.keys():
        missing = [f"it has no {name}.pt" for name in sorted(parts.keys() - have)]
        extra = [f"nothing here reads its {name}.pt" for name in sorted(have - parts.keys())]
        raise ValueError(f"{checkpoint} belongs to another kind of run: {'; '.join(missing + extra)}")
    try:
        adapters.restore(wrapped, checkpoint / "adapter")
    except FILE_ERRORS as error:
        raise unusable(checkpoint, f"{checkpoint} cannot be read ({type(error).__name__})") from error
    for name, part in parts.items():
        file = checkpoint / f"{name}.pt"
        try:
            part.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        except Exception as error:  # each part raises its own type if it does not fit
            raise unusable(checkpoint, f"{file} does not fit this run's {name} ({error!r})") from error
    return found
