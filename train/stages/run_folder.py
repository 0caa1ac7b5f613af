"""Choose the run folder by the rules of `resume`, create it, and hold its lock until the run ends."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from data.files import user_path
from flux2.adapters.files import UNFINISHED_FILE
from train.checkpoints.checkpoint import CONFIG_FILE
from train.checkpoints.data_manifest import TrainedData
from train.checkpoints.resume import NewRun, RunLocation, find
from train.config.run_config import RunConfig
from train.reports import run_report
from train.reports.batch_sheet import FIRST_BATCH
from train.sweeps.job import folder_of_job, is_sweep
from train.tracking.metrics import METRICS_FILE
from train.utils.console import PHASES, say
from train.utils.files import make_new, make_writable, write_whole
from train.utils.lock import InUse, Lock
from train.utils.redact import masked

START_FILE = "adapter_start.json"  # the saved adapter that a run started from


@contextmanager
def claim_run_folder(config: RunConfig) -> Iterator[RunLocation]:
    """Context manager that returns the run folder and the checkpoint to resume, and holds the folder's lock.

    The main process decides for all. Raises ValueError if the folder is in use, holds another run, or is not writable.
    """
    lock: Lock | None = None
    PHASES.clear()
    shared: list[Any] = [None]
    if config.accelerator.is_main_process:
        try:
            shared[0], lock = find_and_lock(config)
        except ValueError as error:
            shared[0] = error
        except OSError as error:
            shared[0] = ValueError(f"the run folder: {error}")
    try:
        broadcast_object_list(shared)
        if isinstance(shared[0], ValueError):
            raise shared[0]
        yield shared[0]
    except KeyboardInterrupt:
        if config.accelerator.is_main_process and isinstance(shared[0], RunLocation):
            report_unfinished(shared[0].folder)
        raise
    finally:
        if lock is not None:
            forget_start(lock.folder)
            lock.release()


def forget_start(folder: Path) -> None:
    """Remove the sheet of a run that ended before it trained, so that its folder goes too; a failure keeps it."""
    if not (folder / CONFIG_FILE).is_file():
        with suppress(OSError):
            (folder / FIRST_BATCH).unlink(missing_ok=True)


def report_unfinished(folder: Path) -> None:
    """Write the report of a run that was stopped, if it has trained."""
    if (folder / METRICS_FILE).is_file() and (folder / CONFIG_FILE).is_file():
        run_report.write_or_warn(folder)


def find_and_lock(config: RunConfig) -> tuple[RunLocation, Lock]:
    """Check tracker and upload, then choose the run folder, create it and lock it."""
    config.tracker.check()
    config.hub.check()
    output = str(folder_of_job()) if is_sweep() else config.settings.output_dir
    new = user_path(output or f"outputs/{config.settings.name}/{time.strftime('%Y-%m-%d_%H-%M-%S')}")
    given, chosen = config.settings.resume, output is not None
    run = NewRun(new, masked(config.composed), config.images_per_step, chosen, say=say)
    while True:
        location = find(given, run)
        if location == RunLocation(new) and not chosen:
            location = RunLocation(make_new(new))
        try:
            make_writable(location.folder, "output_dir" if chosen else "the run folder")
            return location, Lock(location.folder)
        except InUse:
            if chosen or given != "auto":
                raise
            # another run has just taken it: look for a free one


def record_start(config: RunConfig, location: RunLocation, data: TrainedData, started: Mapping[str, Any]) -> None:
    """Write configuration, data manifest and command to the run folder, after the checkpoint has been read.

    `started` is what the run records of the adapter that it started from; empty without one.
    """
    if location.checkpoint is not None:
        config.say(f"resuming from {location.checkpoint}")
    write_whole(location.folder / UNFINISHED_FILE, "resume=auto finishes this run\n")
    text = OmegaConf.to_yaml(OmegaConf.create(masked(config.composed)))
    write_whole(location.folder / CONFIG_FILE, text)
    data.write(location.folder)
    if started:
        write_whole(location.folder / START_FILE, json.dumps(started, indent=1))
    if HydraConfig.initialized():
        words, processes = HydraConfig.get().overrides.task, config.accelerator.num_processes
        run_report.note_command(location.folder, words, processes, resumed=location.checkpoint is not None)
