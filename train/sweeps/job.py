"""One job of a sweep: where it runs, what it may set, whether it is done, and what it gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from train.checkpoints import resume
from train.checkpoints.checkpoint import CONFIG_FILE
from train.config.run_config import RunConfig
from train.tracking.metrics import last_validation_loss
from train.utils.files import short_path


class SweepAborted(ValueError):  # noqa: N818
    """What is wrong with this job is wrong with all jobs of the sweep."""


def is_sweep() -> bool:
    """Whether this is a job of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def folder_of_job() -> Path:
    """As the folder of any other run is said: from the current one, if it lies within."""
    return short_path(Path(HydraConfig.get().runtime.output_dir))


def check(config: RunConfig) -> None:
    """Raises EndsSweep if a search has nothing to minimize, or the processes of a job do not train the same."""
    if not is_sweep():
        return
    measured = config.validation.held_out or config.validation.samples
    if "optuna" in HydraConfig.get().sweeper._target_ and not (config.settings.validate_every and measured):
        key = "validate_every=0" if not config.settings.validate_every else "validation.samples=0"
        raise SweepAborted(
            f"hydra/sweeper=optuna minimizes the validation loss, and with {key} there is none: give it a number above "
            "0; validation.held_out=8 measures it on samples set aside"
        )
    sweeper = HydraConfig.get().sweeper
    if "optuna" in sweeper._target_ and "maximize" in str(sweeper.get("direction")):
        raise SweepAborted(
            "hydra.sweeper.direction=maximize would look for the highest validation loss: leave it out, or minimize"
        )
    mine = list(HydraConfig.get().overrides.task)
    first: list[Any] = [mine]
    broadcast_object_list(first)
    if first[0] != mine:
        raise SweepAborted(
            f"process {config.accelerator.process_index} was given {' '.join(mine)}, and the first "
            f"{' '.join(first[0])}: a search over several processes needs a seed (hydra.sweeper.sampler.seed=0)"
        )


def is_done(config: RunConfig) -> bool:
    """Whether this job of a sweep that goes on (`resume=auto`) had finished before; says so."""
    done = [False]
    if is_sweep() and config.settings.resume == "auto" and config.accelerator.is_main_process:
        folder = folder_of_job()
        if (folder / CONFIG_FILE).exists() and resume.is_finished(folder):
            there = resume.configuration(folder)
            problems = resume.conflicts(folder, config.config, config.images_per_step, None)
            done[0] = there["steps"] == config.settings.steps and not problems
    broadcast_object_list(done)
    if done[0]:
        config.say(f"done before: {folder_of_job()}")
    return bool(done[0])


def result(config: RunConfig) -> float | None:
    """The last validation loss of a job of a sweep, the same in all processes; None if it has none."""
    if not is_sweep():
        return None
    found: list[Any] = [last_validation_loss(folder_of_job()) if config.accelerator.is_main_process else None]
    broadcast_object_list(found)
    return found[0]
