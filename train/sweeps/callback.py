"""Remember the sweeps of this process, write their tables, and mask their command lines."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, ClassVar

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from train.sweeps.records import read_jobs
from train.sweeps.slurm import check_launcher
from train.sweeps.table import print_table, write
from train.utils.console import is_first_process, warn
from train.utils.files import write_whole
from train.utils.redact import masked, masked_settings

COMMAND_LINE = "multirun.yaml"  # written by Hydra


class SweepCallback(Callback):
    """A callback of Hydra that remembers the folders of the sweeps of this process.

    `write_tables` writes their tables, not this callback, because Hydra does not call it when a sweep is interrupted.
    """

    folders: ClassVar[list[Path]] = []

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        try:
            check_launcher(config.hydra.launcher)
        except ValueError as error:  # Hydra would turn the exception into a warning and continue
            if is_first_process():
                print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        self.folders.append(Path(config.hydra.sweep.dir).absolute())


def mask_command_line(sweep: Path) -> None:
    """Mask secrets in Hydra's `multirun.yaml` in a sweep's folder, which holds the command line.

    Hydra writes the file before the first job, and nothing reads it. It is deleted if it cannot be masked.
    """
    file = sweep / COMMAND_LINE
    if not is_first_process() or not file.is_file():
        return
    try:
        content = OmegaConf.to_container(OmegaConf.load(file))
        if (safe := masked_overrides(masked(content))) != content:
            write_whole(file, OmegaConf.to_yaml(OmegaConf.create(safe)))
    except Exception as error:  # from the disk, or one of the YAML reader's own
        try:
            file.unlink(missing_ok=True)
        except OSError:
            warn(f"{file} holds this command line with any secrets in it, and cannot be changed ({error})")


def masked_overrides(value: Any) -> Any:
    """Return `value` with the secrets in overrides among its strings masked."""
    if isinstance(value, dict):
        return {key: masked_overrides(item) for key, item in value.items()}
    if isinstance(value, list):
        return [masked_overrides(item) for item in value]
    return masked_settings(value) if isinstance(value, str) else value


def write_tables() -> bool:
    """Write and print the tables of the sweeps of this process; return whether all their jobs are done."""
    folders, SweepCallback.folders[:] = list(SweepCallback.folders), []
    done = True
    for sweep in folders if is_first_process() else []:
        mask_command_line(sweep)
        found = read_jobs(sweep) if sweep.is_dir() else []
        done = done and all(job.status == "done" for job in found)
        if any(job.steps or job.error for job in found):  # not if the jobs only filled caches
            try:
                print_table(write(sweep, found), found)
            except (ValueError, OSError) as error:
                warn(f"the table of {sweep}: {error}")
    return done
