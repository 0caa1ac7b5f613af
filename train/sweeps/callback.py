"""Hydra's callback of a sweep: noted when it begins, and its command line without secrets."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, ClassVar

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from train.sweeps.records import read_jobs
from train.sweeps.slurm import check_launcher
from train.sweeps.table import say, write
from train.utils.console import is_first_process, warn
from train.utils.files import write_whole
from train.utils.redact import masked, masked_settings

COMMAND_LINE = "multirun.yaml"  # of Hydra


class SweepCallback(Callback):
    """A callback of Hydra that remembers the folders of the sweeps of this process.

    Their tables are written by `end_all`, and not by this callback when Hydra says that a sweep has ended: of one that
    is interrupted it says nothing.
    """

    folders: ClassVar[list[Path]] = []

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        try:
            check_launcher(config.hydra.launcher)
        except ValueError as error:  # Hydra makes a warning of an exception here, and goes on
            if is_first_process():
                print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        self.folders.append(Path(config.hydra.sweep.dir).absolute())


def mask_command_line(sweep: Path) -> None:
    """Take the secrets out of Hydra's `multirun.yaml` in a sweep's folder, which has the whole command line.

    It is written before the first job, and nothing reads it. One that cannot be masked is removed.
    """
    file = sweep / COMMAND_LINE
    if not is_first_process() or not file.is_file():
        return
    try:
        there = OmegaConf.to_container(OmegaConf.load(file))
        shown = without_secrets(there)
        if shown != there:
            write_whole(file, OmegaConf.to_yaml(OmegaConf.create(shown)))
    except Exception as error:  # the disk, or one of the YAML reader's own
        try:
            file.unlink(missing_ok=True)
        except OSError:
            warn(f"{file} holds this command line, with its secrets if it has any, and cannot be changed ({error})")


def without_secrets(value: Any) -> Any:
    """`masked`, and of the overrides among texts too."""
    if isinstance(value, dict):
        return {key: without_secrets(item) for key, item in masked(value).items()}
    if isinstance(value, list):
        return [without_secrets(item) for item in value]
    return masked_settings(value) if isinstance(value, str) else value


def end_all() -> bool:
    """Write and print the tables of the sweeps of this process; whether all their jobs are done."""
    folders, SweepCallback.folders[:] = list(SweepCallback.folders), []
    done = True
    for sweep in folders if is_first_process() else []:
        mask_command_line(sweep)
        found = read_jobs(sweep) if sweep.is_dir() else []
        done = done and all(job.status == "done" for job in found)
        if any(job.steps or job.error for job in found):  # not of caches that were filled
            try:
                say(write(sweep, found), found)
            except (ValueError, OSError) as error:
                warn(f"the table of {sweep}: {error}")
    return done
