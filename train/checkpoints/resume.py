"""Where a run goes on, or starts: the rules of `resume`.

A run is resumed only with the configuration it was started with, but for keys that cannot change what is learned or
that say how far to go.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from flux2.adapters.files import PEFT_FILE
from train.checkpoints.checkpoint import CONFIG_FILE, STATE_FILE, check, checkpoints, number, state
from train.utils.lock import IN_USE, InUse, in_use

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
    "quantized_cache_dir",
    "device",
    "shard",
    "keep_last",
    "keep_best",
    "keep_every",
    "max_nonfinite_steps",
    "allow_changed_data",
    "sample",
    "tracker",
    "hub",
    "memory",
)
FREE_SETTINGS = tuple(
    f"text_encoder.{key}" for key in ("max_concurrent_requests", "timeout", "attempts", "wait")
)  # in a group
# where samples are may differ, on another machine: what they are is compared by content
# (train/checkpoints/data_manifest.py)
PLACES = re.compile(r"(dataset|preservation\.dataset)(\.sources\.[^=]+)?\.path|preservation\.folder")
COPIES = f"; each whole checkpoint has a copy of it, checkpoints/step_*/{CONFIG_FILE}"


@dataclass(frozen=True)
class RunLocation:
    """Where a run writes, and the checkpoint that it goes on from, if any."""

    folder: Path
    checkpoint: Path | None = None

    @property
    def origin(self) -> Path:
        """The run folder that it goes on from."""
        return self.folder if self.checkpoint is None else self.checkpoint.parent.parent

    @property
    def before(self) -> dict[str, Any]:
        """The configuration that it goes on with: the run's, or the checkpoint's own where that has no run here."""
        from_checkpoint = self.checkpoint if not (self.origin / CONFIG_FILE).exists() else None
        return configuration(from_checkpoint or self.origin)

    @property
    def step(self) -> int:
        """Finished steps."""
        return 0 if self.checkpoint is None else state(self.checkpoint)["step"]


def configuration(folder: Path) -> dict[str, Any]:
    """The configuration of a run. Raises ValueError, naming the file, if it cannot be read or is none."""
    file = folder / CONFIG_FILE
    try:
        found = OmegaConf.to_container(OmegaConf.load(file))
    except Exception as error:  # the file is not there, or one of the YAML reader's own
        raise ValueError(f"{file} cannot be read ({error}){COPIES}") from error
    if not isinstance(found, dict) or not isinstance(found.get("steps"), int):
        raise ValueError(f"{file} is not the configuration of a run{COPIES}")
    return found


def is_finished(folder: Path) -> bool:
    """Whether the run in `folder` has its adapter, and was not meant to go on from there."""
    if not (folder / "adapter" / PEFT_FILE).exists():
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


def conflicts(
    folder: Path, config: Mapping[str, Any], images: int, start: Path | None, *, moved: bool = False
) -> list[str]:
    """What forbids to go on in `folder` from `start` with `config` and `images` a step.

    With `moved` the samples may be at another place: for a run that was asked for, of which
    `TrainingData.check_unchanged` tells later whether they are the same. Which run is meant, their place helps to tell.

    Raises ValueError if the run's configuration or the checkpoint's state cannot be read.
    """
    there = configuration(folder)
    found = differences(
        {key: value for key, value in there.items() if key not in FREE_KEYS},
        {key: value for key, value in config.items() if key not in FREE_KEYS},
    )
    given = [(line.partition("=")[0], line) for line in found]
    found = [line for key, line in given if key not in FREE_SETTINGS and not (moved and PLACES.fullmatch(key))]
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
) -> RunLocation:
    """Decide where the run goes on, or starts.

    Args:
        resume: None, `auto`, a run folder or one of its checkpoints.
        fresh: the folder of a new run.
        config: the resolved configuration of this run.
        images: a step trains on.
        chosen: whether `fresh` was asked for, by `output_dir` or a sweep. Then `auto` looks there alone and not at the
            runs beside it, and a path branches off into it. Otherwise it is a name that need not be free.
        say: is told what was skipped, and why, and whether `auto` starts anew.

    Raises:
        InUse: another run writes into the folder that was asked for.
        ValueError: nothing whole to resume at a given path, a configuration that differs, nothing left to do, or a new
            run into a folder that holds one.
    """
    if chosen and in_use(fresh):
        raise InUse(IN_USE.format(fresh))
    occupied = chosen and any((fresh / name).exists() for name in (CONFIG_FILE, "checkpoints", "metrics.jsonl"))
    if resume is None:
        if occupied:
            raise ValueError(
                f"output_dir={str(fresh)!r} already holds a run: choose another folder, or go on with it: resume=auto"
            )
        return RunLocation(fresh)
    if resume == "auto":
        if occupied:
            return continue_in(fresh, config, images, say)
        if chosen:
            return start_new(fresh, say)
        return find_unfinished(fresh, config, images, say)
    return from_path(resume, fresh, config, images, occupied=occupied, chosen=chosen, say=say)


def from_path(
    resume: str,
    fresh: Path,
    config: Mapping[str, Any],
    images: int,
    *,
    occupied: bool,
    chosen: bool,
    say: Callable[[str], None],
) -> RunLocation:
    """`resume=PATH`: the newest checkpoint of a run that is whole, or the very one that is given."""
    given = Path(resume).expanduser().resolve()
    is_checkpoint = (given / STATE_FILE).exists()
    folder = given.parent.parent if is_checkpoint else given
    if is_checkpoint and not (folder / CONFIG_FILE).exists() and (given / CONFIG_FILE).exists():
        return from_checkpoint(given, fresh, config, images, occupied=occupied, chosen=chosen)
    if not (folder / CONFIG_FILE).exists():
        what = "is neither a run folder nor a complete checkpoint" if given.is_dir() else "is not a folder"
        raise ValueError(f"resume={resume!r} {what}; give a run folder, one of its checkpoints, or auto")
    found = checkpoints(folder)
    start = given if is_checkpoint else newest_whole(folder, say)
    if problems := conflicts(folder, config, images, start, moved=True):
        raise ValueError(
            f"resume={resume!r}: that run has another configuration, and going on would mix the two: "
            f"{'; '.join(problems)}. Start a new run, or set these keys as they were."
        )
    if start is None:
        what = "whose files are whole: they are named above" if found else f"(checkpoints/step_*/{STATE_FILE})"
        raise ValueError(f"resume={resume!r} holds no complete checkpoint {what}")
    done = check(start)["step"]
    if done > config["steps"] or (done == config["steps"] and is_finished(folder)):
        raise ValueError(
            f"resume={resume!r} has done {done} steps: to train it for longer, set steps={done + 1} or more"
        )
    if chosen and fresh.resolve() != folder:
        if occupied:
            raise ValueError(f"output_dir={str(fresh)!r} already holds a run: choose another folder for the branch")
        return RunLocation(fresh, start)
    if is_checkpoint and start != found[-1]:
        raise ValueError(
            f"resume={resume!r}: {found[-1].name} of that run would be overwritten. Give output_dir=... to branch off "
            "into another folder, or resume the run itself."
        )
    return RunLocation(folder, start)


def from_checkpoint(
    start: Path, fresh: Path, config: Mapping[str, Any], images: int, *, occupied: bool, chosen: bool
) -> RunLocation:
    """From a checkpoint that was moved here without its run, into the folder that was asked for."""
    if not chosen or occupied:
        raise ValueError(f"resume={str(start)!r} is a checkpoint without its run: give a new folder, output_dir=...")
    if problems := conflicts(start, config, images, start, moved=True):
        raise ValueError(f"resume={str(start)!r} is of another configuration: {'; '.join(problems)}")
    if check(start)["step"] > config["steps"]:
        raise ValueError(f"resume={str(start)!r} has done more than steps={config['steps']}")
    return RunLocation(fresh, start)


def start_new(fresh: Path, say: Callable[[str], None]) -> RunLocation:
    """`auto` with nothing to go on from."""
    say("resume=auto: nothing to resume, starting anew")
    return RunLocation(fresh)


def continue_in(run: Path, config: Mapping[str, Any], images: int, say: Callable[[str], None]) -> RunLocation:
    """`auto` in the folder of a run that was asked for: from its newest checkpoint, or from the start without any."""
    try:
        start = newest_whole(run, say)
        problems = conflicts(run, config, images, start, moved=True)
    except ValueError as error:
        raise ValueError(f"resume=auto: {error}: mend it, or choose another output_dir") from error
    if problems:
        raise ValueError(f"resume=auto: the run in {run} has another configuration: {'; '.join(problems)}")
    if start is None and checkpoints(run):
        raise ValueError(f"resume=auto: no checkpoint of {run} can be read: choose another output_dir")
    if start is None and not is_finished(run):
        return start_new(run, say)
    done = configuration(run)["steps"] if start is None else state(start)["step"]
    if start is None or done > config["steps"] or (done == config["steps"] and is_finished(run)):
        longer = "" if start is None else f", or train it for longer with steps={done + 1} or more"
        raise ValueError(f"resume=auto: the run in {run} has done its {done} steps: choose another output_dir{longer}")
    return RunLocation(run, start)


def find_unfinished(fresh: Path, config: Mapping[str, Any], images: int, say: Callable[[str], None]) -> RunLocation:
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
                return RunLocation(run, start)
        except ValueError as error:
            say(f"warning: skipping {run}: {error}")
    for text in passed[:1]:  # the newest is the one that was meant, if any
        say(text)
    return start_new(fresh, say)
