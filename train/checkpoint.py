"""Save a run every so often, and go on from where it stopped.

A checkpoint is a folder `checkpoints/step_000250/`: the adapter as it is used, the optimizer's state, and `state.json`
with the number of finished steps. It is written beside its place and renamed, so it is whole or absent. There is no
generator or sampler state to save: everything random is a function of the seed and the step (`data.loader`), and the
learning rate one of the step.

A run is resumed only with the configuration it was started with, but for keys that cannot change what is learned or
that say how far to go.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError, safe_open

from flux2 import adapters
from train.folder import IN_USE, InUse, in_use

CONFIG_FILE = "config.yaml"
STATE_FILE = "state.json"
OPTIMIZER_FILE = "optimizer.pt"
REMEDY = "delete {} to go on from the one before"
UNREADABLE = (OSError, RuntimeError, SafetensorError)
NOT_WRITTEN = (OSError, RuntimeError, SafetensorError)  # a full disk, as each of the libraries says it
# what may differ between a run and its continuation
FREE_KEYS = (
    "name",
    "steps",
    "batch_size",  # their product with the number of processes is compared instead
    "gradient_accumulation",
    "log_every",
    "checkpoint_every",
    "sample_every",
    "validate_every",
    "resume",
    "output_dir",
    "cache_dir",
    "quantised_dir",
    "device",
    "sample",
    "tracker",
    "memory",
)
FREE_SETTINGS = tuple(f"text_encoder.{key}" for key in ("in_flight", "timeout", "attempts", "wait"))  # in a group


class NotSaved(OSError):  # noqa: N818
    """A checkpoint could not be written; what was written of it is removed."""


@dataclass(frozen=True)
class Place:
    """Where a run writes, and the checkpoint that it goes on from, if any."""

    folder: Path
    checkpoint: Path | None = None

    @property
    def origin(self) -> Path:
        """The run folder that it goes on from."""
        return self.folder if self.checkpoint is None else self.checkpoint.parent.parent

    @property
    def step(self) -> int:
        """Finished steps."""
        return 0 if self.checkpoint is None else state(self.checkpoint)["step"]


def state(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says about itself: finished steps, base model, images a step.

    Raises ValueError, naming the file, if it cannot be read or is not such a file.
    """
    file = checkpoint / STATE_FILE
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} cannot be read ({error}): {REMEDY.format(checkpoint)}") from error
    counts = [found.get(key) for key in ("step", "images_per_step")] if isinstance(found, dict) else [None]
    if any(type(count) is not int or count < 0 for count in counts):
        raise ValueError(f"{file} does not say how many steps are done: {REMEDY.format(checkpoint)}")
    return found


def number(checkpoint: Path) -> int:
    """The finished steps in the name of a checkpoint's folder."""
    return int(checkpoint.name.removeprefix("step_"))


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first; whether they can be read `check` tells."""
    found = [path for path in folder.glob("checkpoints/step_*") if (path / STATE_FILE).exists()]
    return sorted((path for path in found if re.fullmatch(r"step_\d+", path.name, re.ASCII)), key=number)


def configuration(folder: Path) -> dict[str, Any]:
    """The configuration of a run. Raises ValueError, naming the file, if it cannot be read or is none."""
    file = folder / CONFIG_FILE
    try:
        found = OmegaConf.to_container(OmegaConf.load(file))
    except Exception as error:  # the file is not there, or one of the YAML reader's own
        raise ValueError(f"{file} cannot be read ({error})") from error
    if not isinstance(found, dict) or not isinstance(found.get("steps"), int):
        raise ValueError(f"{file} is not the configuration of a run")
    return found


def is_finished(folder: Path) -> bool:
    """Whether the run in `folder` has its adapter, and was not meant to go on from there."""
    if not (folder / "adapter" / adapters.PEFT_FILE).exists():
        return False
    return all(number(path) >= configuration(folder)["steps"] for path in checkpoints(folder)[-1:])


def differences(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Every key that is not equal, as `key=value there, value here`."""
    found = []
    for key in sorted({*one, *other}):
        a, b = one.get(key), other.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}={a!r} there, {b!r} here")
    return found


def conflicts(folder: Path, config: Mapping[str, Any], images: int, start: Path | None) -> list[str]:
    """What forbids to go on in `folder` from `start` with `config` and `images` a step.

    Raises ValueError if the run's configuration or the checkpoint's state cannot be read.
    """
    there = configuration(folder)
    found = differences(
        {key: value for key, value in there.items() if key not in FREE_KEYS},
        {key: value for key, value in config.items() if key not in FREE_KEYS},
    )
    found = [line for line in found if line.partition("=")[0] not in FREE_SETTINGS]
    before = images if start is None else state(start)["images_per_step"]
    if before != images:
        cut = "batch_size * gradient_accumulation * processes"
        found.append(f"{cut}={before} there, {images} here")
    return found


def newest_whole(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that can be read; `say` is told of those that are skipped."""
    for place in reversed(checkpoints(folder)):
        try:
            check(place)
        except ValueError as error:
            say(f"warning: skipping a damaged checkpoint: {error}")
        else:
            return place
    return None


def find(
    resume: str | None,
    fresh: Path,
    config: Mapping[str, Any],
    images: int,
    *,
    chosen: bool,
    say: Callable[[str], None] = print,
) -> Place:
    """Decide where the run goes on, or starts.

    Args:
        resume: None, `auto`, a run folder or one of its checkpoints.
        fresh: the folder of a new run.
        config: the resolved configuration of this run.
        images: a step trains on.
        chosen: whether `fresh` was asked for, by `output_dir` or a sweep. Then `auto` looks there alone and not at the
            runs beside it, and a path branches off into it. Otherwise it is a name that need not be free.
        say: is told what `auto` skipped, and why.

    Raises:
        InUse: another run writes into the folder that was asked for.
        ValueError: nothing to resume at a given path, a configuration that differs, nothing left to do, or a new run
            into a folder that holds one.
    """
    if chosen and in_use(fresh):
        raise InUse(IN_USE.format(fresh))
    occupied = chosen and any((fresh / name).exists() for name in (CONFIG_FILE, "checkpoints", "metrics.jsonl"))
    if resume is None:
        if occupied:
            raise ValueError(
                f"output_dir={str(fresh)!r} already holds a run: choose another folder, or go on with it: resume=auto"
            )
        return Place(fresh)
    if resume == "auto":
        if occupied:
            return again(fresh, config, images, say)
        return Place(fresh) if chosen else beside(fresh, config, images, say)
    given = Path(resume).expanduser().resolve()
    is_checkpoint = (given / STATE_FILE).exists()
    folder = given.parent.parent if is_checkpoint else given
    if not (folder / CONFIG_FILE).exists():
        what = "is neither a run folder nor a complete checkpoint" if given.is_dir() else "is not a folder"
        raise ValueError(f"resume={resume!r} {what}; give a run folder, one of its checkpoints, or auto")
    newest = next(reversed(checkpoints(folder)), None)
    start = given if is_checkpoint else newest
    if problems := conflicts(folder, config, images, start):
        raise ValueError(
            f"resume={resume!r}: that run has another configuration, and going on would mix the two: "
            f"{'; '.join(problems)}. Start a new run, or set these keys as they were."
        )
    if start is None or newest is None:
        raise ValueError(f"resume={resume!r} holds no complete checkpoint (checkpoints/step_*/{STATE_FILE})")
    done = state(start)["step"]
    if done > config["steps"] or (done == config["steps"] and is_finished(folder)):
        raise ValueError(
            f"resume={resume!r} has done {done} steps: to train it for longer, set steps={done + 1} or more"
        )
    if chosen and fresh.resolve() != folder:
        if occupied:
            raise ValueError(f"output_dir={str(fresh)!r} already holds a run: choose another folder for the branch")
        return Place(fresh, start)
    if start != newest:
        raise ValueError(
            f"resume={resume!r}: {newest.name} of that run would be overwritten. Give output_dir=... to branch off "
            "into another folder, or resume the run itself."
        )
    return Place(folder, start)


def again(run: Path, config: Mapping[str, Any], images: int, say: Callable[[str], None]) -> Place:
    """`auto` in the folder of a run that was asked for: from its newest checkpoint, or from the start without any."""
    try:
        start = newest_whole(run, say)
        problems = conflicts(run, config, images, start)
    except ValueError as error:
        raise ValueError(f"resume=auto: {error}: mend it, or choose another output_dir") from error
    if problems:
        raise ValueError(f"resume=auto: the run in {run} has another configuration: {'; '.join(problems)}")
    if start is None and checkpoints(run):
        raise ValueError(f"resume=auto: no checkpoint of {run} can be read: choose another output_dir")
    if start is None and not is_finished(run):
        return Place(run)
    done = configuration(run)["steps"] if start is None else state(start)["step"]
    if start is None or done > config["steps"] or (done == config["steps"] and is_finished(run)):
        longer = "" if start is None else f", or train it for longer with steps={done + 1} or more"
        raise ValueError(f"resume=auto: the run in {run} has done its {done} steps: choose another output_dir{longer}")
    return Place(run, start)


def beside(fresh: Path, config: Mapping[str, Any], images: int, say: Callable[[str], None]) -> Place:
    """`auto` without a folder: the newest unfinished run beside `fresh` that can go on, or a new one in `fresh`."""
    passed = []
    for run in sorted(fresh.parent.glob("*"), reverse=True):
        if not checkpoints(run) or in_use(run):
            continue
        try:
            if is_finished(run):
                continue
            if problems := conflicts(run, config, images, None):
                passed.append(f"not going on with {run}: {'; '.join(problems)}")
                continue
            start = newest_whole(run, say)
            if start is None:
                continue
            if problems := conflicts(run, config, images, start):
                passed.append(f"not going on with {run}: {'; '.join(problems)}")
            elif state(start)["step"] <= config["steps"]:
                return Place(run, start)
        except ValueError as error:
            say(f"warning: skipping {run}: {error}")
    for text in passed[:1]:  # the newest is the one that was meant, if any
        say(text)
    return Place(fresh)


def save(
    folder: Path,
    step: int,
    wrapped: peft.PeftModel,
    optimizer: torch.optim.Optimizer,
    *,
    base: str,
    licence: str,
    images_per_step: int,
) -> Path:
    """Write the checkpoint of `step` finished steps; returns its folder. Called by the main process alone.

    Raises NotSaved if the disk is full or the folder cannot be written.
    """
    place = folder / "checkpoints" / f"step_{step:06d}"
    unfinished = place.with_name(f".{place.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    about = {"step": step, "base": base, "images_per_step": images_per_step}
    try:
        unfinished.mkdir(parents=True)
        adapters.save(wrapped, unfinished / "adapter", base=base, licence=licence)
        torch.save(optimizer.state_dict(), unfinished / OPTIMIZER_FILE)
        (unfinished / STATE_FILE).write_text(json.dumps(about))
        shutil.rmtree(place, ignore_errors=True)  # of a run that went on from an earlier step
        unfinished.rename(place)
    except BaseException as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        if not isinstance(error, NOT_WRITTEN):
            raise
        raise NotSaved(f"{place} could not be written ({error})") from error
    return place


def optimizer_state(checkpoint: Path) -> dict[str, Any]:
    """What an optimizer saved there. Raises ValueError if it cannot be read or is something else."""
    file = checkpoint / OPTIMIZER_FILE
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of garbage the reader raises any kind
        raise ValueError(f"{file} cannot be read ({type(error).__name__}): {REMEDY.format(checkpoint)}") from error
    if not isinstance(found, dict) or not found.keys() >= {"state", "param_groups"}:
        raise ValueError(f"{file} cannot be read (no state of an optimizer): {REMEDY.format(checkpoint)}")
    return found


def check(checkpoint: Path) -> None:
    """Raises ValueError if a checkpoint cannot be read."""
    state(checkpoint)
    optimizer_state(checkpoint)
    file = checkpoint / "adapter" / adapters.PEFT_FILE
    try:
        with safe_open(file, "pt"):
            pass
    except UNREADABLE as error:
        raise ValueError(f"{file} cannot be read ({type(error).__name__}): {REMEDY.format(checkpoint)}") from error


def load(checkpoint: Path, wrapped: peft.PeftModel, optimizer: torch.optim.Optimizer) -> None:
    """Put adapter and optimizer back as they were saved. Raises ValueError if they cannot be read or do not fit."""
    values = optimizer_state(checkpoint)
    try:
        adapters.restore(wrapped, checkpoint / "adapter")
    except UNREADABLE as error:
        raise ValueError(
            f"{checkpoint} cannot be read ({type(error).__name__}): {REMEDY.format(checkpoint)}"
        ) from error
    try:
        optimizer.load_state_dict(values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{checkpoint / OPTIMIZER_FILE} does not fit the optimizer ({error!r}): {REMEDY.format(checkpoint)}"
        ) from error
