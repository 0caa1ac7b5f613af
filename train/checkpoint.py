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
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from omegaconf import OmegaConf

from flux2 import adapters

CONFIG_FILE = "config.yaml"
STATE_FILE = "state.json"
# what may differ between a run and its continuation
FREE_KEYS = (
    "name",
    "steps",
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
        return 0 if self.checkpoint is None else int(json.loads((self.checkpoint / STATE_FILE).read_text())["step"])


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    found = [path for path in folder.glob("checkpoints/step_*") if (path / STATE_FILE).exists()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


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


def conflicts(folder: Path, config: Mapping[str, Any]) -> list[str]:
    """What forbids to go on in `folder` with `config`."""
    file = folder / CONFIG_FILE
    if not file.exists():
        return [f"{file} is missing"]
    there = OmegaConf.to_container(OmegaConf.load(file))
    assert isinstance(there, dict)
    return differences(
        {key: value for key, value in there.items() if key not in FREE_KEYS},
        {key: value for key, value in config.items() if key not in FREE_KEYS},
    )


def find(resume: str | None, fresh: Path, config: Mapping[str, Any]) -> Place:
    """Decide where the run goes on, or starts.

    Args:
        resume: None, `auto`, a run folder or one of its checkpoints.
        fresh: the folder of a new run; with `auto`, runs beside it are looked at. A path with an `output_dir` of its own
            branches off into that.
        config: the resolved configuration of this run.

    Raises:
        ValueError: nothing to resume at a given path, a configuration that differs, or a new run into a folder that
            holds one.
    """
    if resume is None:
        if (fresh / CONFIG_FILE).exists():
            raise ValueError(
                f"output_dir={str(fresh)!r} already holds a run: choose another folder, or go on with it: resume=auto"
            )
        return Place(fresh)
    if resume == "auto":
        runs = [fresh, *sorted((path for path in fresh.parent.glob("*") if path != fresh), reverse=True)]
        for run in runs:
            finished = (run / "adapter" / adapters.PEFT_FILE).exists()
            if (run / CONFIG_FILE).exists() and not finished and checkpoints(run) and not conflicts(run, config):
                return Place(run, checkpoints(run)[-1])
        if (fresh / CONFIG_FILE).exists() and (problems := conflicts(fresh, config)):
            raise ValueError(f"resume=auto: the run in {fresh} has another configuration: {'; '.join(problems)}")
        return Place(fresh)
    given = Path(resume).expanduser()
    if not given.is_dir():
        raise ValueError(f"resume={resume!r} is not a folder; give a run folder, one of its checkpoints, or auto")
    given = given.resolve()
    is_checkpoint = (given / STATE_FILE).exists()
    folder = given.parent.parent if is_checkpoint else given
    if problems := conflicts(folder, config):
        raise ValueError(
            f"resume={resume!r}: that run has another configuration, and going on would mix the two: "
            f"{'; '.join(problems)}. Start a new run, or set these keys as they were."
        )
    if not checkpoints(folder):
        raise ValueError(f"resume={resume!r} holds no complete checkpoint (checkpoints/step_*/{STATE_FILE})")
    chosen, newest = given if is_checkpoint else checkpoints(folder)[-1], checkpoints(folder)[-1]
    if config.get("output_dir") and fresh.resolve() != folder:
        if (fresh / CONFIG_FILE).exists():
            raise ValueError(f"output_dir={str(fresh)!r} already holds a run: choose another folder for the branch")
        return Place(fresh, chosen)
    if chosen != newest:
        raise ValueError(
            f"resume={resume!r}: {newest.name} of that run would be overwritten. Give output_dir=... to branch off into "
            "another folder, or resume the run itself."
        )
    return Place(folder, chosen)


def save(
    folder: Path, step: int, wrapped: peft.PeftModel, optimizer: torch.optim.Optimizer, *, base: str, licence: str
) -> Path:
    """Write the checkpoint of `step` finished steps; returns its folder. Called by the main process alone."""
    place = folder / "checkpoints" / f"step_{step:06d}"
    unfinished = place.with_name(f".{place.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    adapters.save(wrapped, unfinished / "adapter", base=base, licence=licence)
    torch.save(optimizer.state_dict(), unfinished / "optimizer.pt")
    (unfinished / STATE_FILE).write_text(json.dumps({"step": step, "base": base}))
    shutil.rmtree(place, ignore_errors=True)  # of a run that went on from an earlier step
    unfinished.rename(place)
    return place


def load(checkpoint: Path, wrapped: peft.PeftModel, optimizer: torch.optim.Optimizer) -> None:
    """Put adapter and optimizer back as they were saved."""
    adapters.restore(wrapped, checkpoint / "adapter")
    file = checkpoint / "optimizer.pt"
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError) as error:
        raise ValueError(f"{file} cannot be read ({error}): resume from an earlier checkpoint") from error
    optimizer.load_state_dict(state)
