"""Decide whether a run starts fresh or resumes, and from which checkpoint.

A run resumes only with the configuration it was started with, except for keys that cannot change what is learned and
the number of steps.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.files import user_path
from flux2.adapters.files import PEFT_FILE, UNFINISHED_FILE
from flux2.utils.text import listed
from train.checkpoints.checkpoint import (
    CONFIG_FILE,
    STATE_FILE,
    check,
    checkpoints,
    read_state,
    step_of,
)
from train.checkpoints.data_manifest import DATA_FILE
from train.tracking.metrics import METRICS_FILE, VALIDATION_FILE
from train.utils.files import read_yaml
from train.utils.lock import IN_USE, InUse, in_use

# groups, keys and settings that may differ when a run resumes; the product of batch_size, gradient_accumulation and the
# number of processes is compared instead
FREE_KEYS = set(
    "name steps batch_size gradient_accumulation log_every checkpoint_every sample_every validate_every resume "
    "output_dir cache_dir quantized_cache_dir device shard keep_last keep_best keep_every max_nonfinite_steps "
    "allow_changed_data sample tracker hub memory text_encoder.max_concurrent_requests text_encoder.timeout "
    "text_encoder.attempts text_encoder.wait text_encoder.device".split()
)
# samples may be in another place on another machine; train/checkpoints/data_manifest.py compares their content
PLACES = re.compile(r"(dataset|preservation\.dataset)(\.sources\.[^=]+)?\.path|preservation\.folder")
# keys that older runs do not have, with the value that they had the effect of
ADDED = {"adapter.init_mode": "continue", "adapter.dtype": "fp32", "batch_by": "images"}
# what only a run writes into its folder, any of which tells that there is one, also if the rest was deleted
OF_A_RUN = (CONFIG_FILE, METRICS_FILE, VALIDATION_FILE, DATA_FILE, "checkpoints", "adapter", "samples", "report.html")
COPIES = f". Restore it from the copy in a complete checkpoint, checkpoints/step_*/{CONFIG_FILE}"


@dataclass(frozen=True)
class RunLocation:
    """The folder that a run writes to, and the checkpoint that it resumes from, if any."""

    folder: Path
    checkpoint: Path | None = None

    @property
    def origin(self) -> Path:
        """The folder of the run that is resumed."""
        return self.folder if self.checkpoint is None else self.checkpoint.parent.parent

    @property
    def resumed_config(self) -> dict[str, Any]:
        """The configuration of the resumed run, or the checkpoint's own if its run is not here."""
        from_checkpoint = self.checkpoint if not (self.origin / CONFIG_FILE).exists() else None
        return configuration(from_checkpoint or self.origin)

    @property
    def step(self) -> int:
        """The number of finished steps."""
        return 0 if self.checkpoint is None else read_state(self.checkpoint)["step"]


def configuration(folder: Path) -> dict[str, Any]:
    """Return the configuration of a run as plain values. Raises ValueError, naming the file, if it is invalid."""
    file = folder / CONFIG_FILE
    try:
        found = read_yaml(file)
    except ValueError as error:
        raise ValueError(f"{error}{COPIES}") from error
    if not isinstance(found, dict) or not isinstance(found.get("steps"), int):
        raise ValueError(f"{file} is not the configuration of a run{COPIES}")
    return found


def is_finished(folder: Path) -> bool:
    """Return whether the run in `folder` has its adapter and all that its end writes, and needs no more steps."""
    if not (folder / "adapter" / PEFT_FILE).exists() or (folder / UNFINISHED_FILE).exists():
        return False
    return all(step_of(path) >= configuration(folder)["steps"] for path in checkpoints(folder)[-1:])


def differences(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return a text for every key that differs: `key=value there, value here`; `one` may be from an older version."""
    found: dict[str, str] = {}
    for key in sorted({*one, *other}, key=str):
        a, b = one.get(key, ADDED.get(f"{prefix}{key}")), other.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found |= differences(a, b, f"{prefix}{key}.")
        elif a != b:
            was, now = ("null" if value is None else repr(value) for value in (a, b))  # as one types it
            found[f"{prefix}{key}"] = f"{prefix}{key}={was} there, {now} here"
    return found


def newest_complete(folder: Path, say: Callable[[str], None]) -> Path | None:
    """Return the newest checkpoint that can be read; `say` receives a warning for each that is skipped."""
    for place in reversed(checkpoints(folder)):
        try:
            check(place)
            return place
        except ValueError as error:
            say(f"warning: skipping a damaged checkpoint: {error}")
    return None


@dataclass(frozen=True)
class NewRun:
    """A run that is about to start or resume.

    Its folder is `chosen` if `output_dir` or a sweep set it. Then `auto` considers only this folder and not the runs
    next to it, and a path branches off into it. Otherwise the folder is a default that may be occupied.
    """

    folder: Path  # of a new run
    config: Mapping[str, Any]  # resolved
    images: int  # per step
    chosen: bool
    say: Callable[[str], None]  # receives what was skipped, and why, and whether `auto` starts a new run

    @property
    def occupied(self) -> str:
        """What the chosen folder already holds of a run, which this run would replace; empty if nothing."""
        places = [self.folder / name for name in OF_A_RUN] if self.chosen else []
        return listed([place.name for place in places if place.is_file() or (place.is_dir() and any(place.iterdir()))])

    @property
    def can_continue(self) -> bool:
        return (self.folder / CONFIG_FILE).exists() or bool(checkpoints(self.folder))

    def conflicts(self, folder: Path, start: Path | None, *, moved: bool = True) -> str:
        """Return the differences that prevent resuming the run in `folder` from `start`; empty if there are none.

        What is `auto` in the group `text_encoder` becomes what that run has (train/stages/memory.py).

        With `moved` the samples may be in another place, because `TrainingData.check_unchanged` later compares their
        content. Without it, their place tells whether the run is the intended one. Raises ValueError if the run's
        configuration or the checkpoint's state cannot be read.
        """
        own = self.config.get("text_encoder")
        chosen = {f"text_encoder.{key}" for key, value in own.items() if value == "auto"} if own else set()
        found = [
            text
            for key, text in differences(configuration(folder), self.config).items()
            if not {key, key.partition(".")[0]} & (FREE_KEYS | chosen) and not (moved and PLACES.fullmatch(key))
        ]
        before = self.images if start is None else read_state(start)["images_per_step"]
        if before != self.images:
            found.append(f"batch_size * gradient_accumulation * processes={before} there, {self.images} here")
        return "; ".join(found)

    def start_new(self) -> RunLocation:
        self.say("resume=auto: nothing to resume, starting a new run")
        return RunLocation(self.folder)


def find(resume: str | None, new: NewRun) -> RunLocation:
    """Decide where a run starts or resumes. `resume` is None, `auto`, a run folder or one of its checkpoints.

    Raises InUse if another run writes into the folder; ValueError for no complete checkpoint at a given path, a
    configuration that differs, nothing left to do, or a new run into a folder that already holds one.
    """
    if new.chosen and in_use(new.folder):
        raise InUse(IN_USE.format(new.folder))
    if resume is None:
        if new.occupied:
            or_resume = ", or resume with resume=auto" if new.can_continue else ""
            raise ValueError(
                f"output_dir={str(new.folder)!r} already holds a run ({new.occupied}). Choose another folder{or_resume}"
            )
        return RunLocation(new.folder)
    if resume != "auto":
        return from_path(resume, new)
    if new.occupied and not new.can_continue:
        raise ValueError(
            f"output_dir={str(new.folder)!r} holds parts of a run that cannot be resumed ({new.occupied}) and would be "
            "overwritten. Move them, or choose another folder"
        )
    if new.occupied:
        return continue_in_folder(new)
    return new.start_new() if new.chosen else find_unfinished(new)


def from_path(resume: str, new: NewRun) -> RunLocation:
    """Resume `resume=PATH`: the newest complete checkpoint of a run, or the given checkpoint."""
    path = user_path(resume).resolve()
    is_checkpoint = (path / STATE_FILE).exists()
    folder = path.parent.parent if is_checkpoint else path
    if is_checkpoint and not (folder / CONFIG_FILE).exists() and (path / CONFIG_FILE).exists():
        return from_checkpoint(path, new)
    if not (folder / CONFIG_FILE).exists():
        what = "is neither a run folder nor a complete checkpoint" if path.is_dir() else "is not a folder"
        raise ValueError(f"resume={resume!r} {what}. Give a run folder, one of its checkpoints, or auto")
    found = checkpoints(folder)
    start = path if is_checkpoint else newest_complete(folder, new.say)
    if problems := new.conflicts(folder, start):
        raise ValueError(
            f"resume={resume!r}: that run has another configuration: {problems}. Set these keys as they were, or start "
            "a new run"
        )
    if start is None:
        what = "that can be read; the damaged ones are named above" if found else f"(checkpoints/step_*/{STATE_FILE})"
        raise ValueError(f"resume={resume!r} holds no complete checkpoint {what}")
    done, steps = check(start)["step"], new.config["steps"]
    if done > steps or (done == steps and is_finished(folder)):
        raise ValueError(f"resume={resume!r} has done {done} steps. To train longer, set steps={done + 1} or more")
    if new.chosen and new.folder.resolve() != folder:
        if new.occupied:
            raise ValueError(
                f"output_dir={str(new.folder)!r} already holds a run. Choose another folder for the branch"
            )
        return RunLocation(new.folder, start)
    if is_checkpoint and start != found[-1]:
        raise ValueError(
            f"resume={resume!r}: {found[-1].name} of that run would be overwritten. Set output_dir=... to branch off "
            "into another folder, or resume the run itself"
        )
    return RunLocation(folder, start)


def from_checkpoint(start: Path, new: NewRun) -> RunLocation:
    """Resume a checkpoint that was moved here without its run, in the folder that was chosen."""
    if not new.chosen or new.occupied:
        raise ValueError(f"resume={str(start)!r} is a checkpoint without its run. Set a new folder, output_dir=...")
    if problems := new.conflicts(start, start):
        raise ValueError(f"resume={str(start)!r} has another configuration: {problems}")
    if (done := check(start)["step"]) > new.config["steps"]:
        raise ValueError(f"resume={str(start)!r} has done {done} steps, more than steps={new.config['steps']}")
    return RunLocation(new.folder, start)


def continue_in_folder(new: NewRun) -> RunLocation:
    """Resume `auto` in a chosen folder that holds a run: from its newest checkpoint, or from the start without one."""
    run, steps = new.folder, new.config["steps"]
    try:
        start = newest_complete(run, new.say)
        problems = new.conflicts(run, start)
    except ValueError as error:
        raise ValueError(f"resume=auto: {error}. Fix it, or choose another output_dir") from error
    if problems:
        raise ValueError(f"resume=auto: the run in {run} has another configuration: {problems}")
    if start is None and checkpoints(run):
        raise ValueError(f"resume=auto: no checkpoint of {run} can be read. Choose another output_dir")
    if start is None and not is_finished(run):
        return new.start_new()
    done = configuration(run)["steps"] if start is None else read_state(start)["step"]
    if start is None or done > steps or (done == steps and is_finished(run)):
        longer = "" if start is None else f", or train longer with steps={done + 1} or more"
        raise ValueError(f"resume=auto: the run in {run} has done its {done} steps. Choose another output_dir{longer}")
    return RunLocation(run, start)


def find_unfinished(new: NewRun) -> RunLocation:
    """Resume `auto` without a chosen folder: the newest unfinished run that matches, or a new one."""
    passed = []
    for run in sorted(new.folder.parent.glob("*"), reverse=True):
        if not checkpoints(run) or in_use(run):
            continue
        try:
            if is_finished(run):
                continue
            start = None
            problems = new.conflicts(run, None, moved=False)
            if not problems and (start := newest_complete(run, new.say)) is not None:
                problems = new.conflicts(run, start, moved=False)
            if problems:
                passed.append(f"not resuming {run}: {problems}")
            elif start is not None and read_state(start)["step"] <= new.config["steps"]:
                return RunLocation(run, start)
        except ValueError as error:
            new.say(f"warning: skipping {run}: {error}")
    for text in passed[:1]:  # the newest is the intended one, if any
        new.say(text)
    return new.start_new()
