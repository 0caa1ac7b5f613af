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
import pickle
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError

from flux2 import adapters

CONFIG_FILE = "config.yaml"
STATE_FILE = "state.json"
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
    "device",
    "sample",
    "tracker",
    "memory",
)


@dataclass(frozen=True)
class Place:
    """Where a run writes, and the checkpoint that it goes on from, if any."""

    folder: Path
    checkpoint: Path | None = None

    @property
    def step(self) -> int:
        """Finished steps."""
        return 0 if self.checkpoint is None else state(self.checkpoint)["step"]


def state(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says about itself: finished steps, base model, images a step."""
    return json.loads((checkpoint / STATE_FILE).read_text())


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [path for path in folder.glob("checkpoints/step_*") if (path / STATE_FILE).exists()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def configuration(folder: Path) -> dict[str, Any]:
    """The configuration of a run. Raises ValueError if it cannot be read."""
    file = folder / CONFIG_FILE
    try:
        return OmegaConf.to_container(OmegaConf.load(file))
    except Exception as error:  # the file is not there, or one of the YAML reader's own
        raise ValueError(f"{file} cannot be read ({error})") from error


def is_finished(folder: Path) -> bool:
    """Whether the run in `folder` has its adapter, and was not meant to go on from there."""
    if not (folder / "adapter" / adapters.PEFT_FILE).exists():
        return False
    return all(state(path)["step"] >= configuration(folder)["steps"] for path in checkpoints(folder)[-1:])


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


def conflicts(folder: Path, config: Mapping[str, Any], images: int) -> list[str]:
    """What forbids to go on in `folder` with `config` and `images` a step."""
    try:
        there = configuration(folder)
    except ValueError as error:
        return [str(error)]
    found = differences(
        {key: value for key, value in there.items() if key not in FREE_KEYS},
        {key: value for key, value in config.items() if key not in FREE_KEYS},
    )
    before = [state(path)["images_per_step"] for path in checkpoints(folder)[-1:]]
    if before and before != [images]:
        cut = "batch_size * gradient_accumulation * processes"
        found.append(f"{cut}={before[0]} there, {images} here")
    return found


def find(resume: str | None, fresh: Path, config: Mapping[str, Any], images: int, *, chosen: bool) -> Place:
    """Decide where the run goes on, or starts.

    Args:
        resume: None, `auto`, a run folder or one of its checkpoints.
        fresh: the folder of a new run.
        config: the resolved configuration of this run.
        images: a step trains on.
        chosen: whether `fresh` was asked for, by `output_dir` or a sweep. Then `auto` looks there alone and not at the
            runs beside it, and a path branches off into it.

    Raises:
        ValueError: nothing to resume at a given path, a configuration that differs, nothing left to do, or a new run
            into a folder that holds one.
    """
    occupied = (fresh / CONFIG_FILE).exists()
    if resume is None:
        if occupied:
            raise ValueError(
                f"output_dir={str(fresh)!r} already holds a run: choose another folder, or go on with it: resume=auto"
            )
        return Place(fresh)
    if resume == "auto":
        beside = [] if chosen else sorted((path for path in fresh.parent.glob("*") if path != fresh), reverse=True)
        for run in (fresh, *beside):
            if checkpoints(run) and not conflicts(run, config, images) and not is_finished(run):
                newest = checkpoints(run)[-1]
                if state(newest)["step"] <= config["steps"]:
                    return Place(run, newest)
        if occupied and (problems := conflicts(fresh, config, images)):
            raise ValueError(f"resume=auto: the run in {fresh} has another configuration: {'; '.join(problems)}")
        if occupied and checkpoints(fresh):
            raise ValueError(
                f"resume=auto: the run in {fresh} has done its steps: choose another output_dir, or train it for "
                f"longer with resume={fresh} and more steps than steps={config['steps']}"
            )
        return Place(fresh)
    given = Path(resume).expanduser().resolve()
    is_checkpoint = (given / STATE_FILE).exists()
    folder = given.parent.parent if is_checkpoint else given
    if not (folder / CONFIG_FILE).exists():
        what = "is neither a run folder nor a complete checkpoint" if given.is_dir() else "is not a folder"
        raise ValueError(f"resume={resume!r} {what}; give a run folder, one of its checkpoints, or auto")
    if problems := conflicts(folder, config, images):
        raise ValueError(
            f"resume={resume!r}: that run has another configuration, and going on would mix the two: "
            f"{'; '.join(problems)}. Start a new run, or set these keys as they were."
        )
    if not checkpoints(folder):
        raise ValueError(f"resume={resume!r} holds no complete checkpoint (checkpoints/step_*/{STATE_FILE})")
    newest = checkpoints(folder)[-1]
    start = given if is_checkpoint else newest
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
    """Write the checkpoint of `step` finished steps; returns its folder. Called by the main process alone."""
    place = folder / "checkpoints" / f"step_{step:06d}"
    unfinished = place.with_name(f".{place.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    adapters.save(wrapped, unfinished / "adapter", base=base, licence=licence)
    torch.save(optimizer.state_dict(), unfinished / "optimizer.pt")
    (unfinished / STATE_FILE).write_text(json.dumps({"step": step, "base": base, "images_per_step": images_per_step}))
    shutil.rmtree(place, ignore_errors=True)  # of a run that went on from an earlier step
    unfinished.rename(place)
    return place


def load(checkpoint: Path, wrapped: peft.PeftModel, optimizer: torch.optim.Optimizer) -> None:
    """Put adapter and optimizer back as they were saved."""
    try:
        adapters.restore(wrapped, checkpoint / "adapter")
        values = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{checkpoint} cannot be read ({type(error).__name__}): delete it to go on from the one before"
        ) from error
    optimizer.load_state_dict(values)
