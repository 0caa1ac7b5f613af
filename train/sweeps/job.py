"""One job of a sweep: its folder, its checks, whether it is done, and its result."""

from __future__ import annotations

from pathlib import Path

from accelerate.utils import broadcast_object_list
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from train.checkpoints import resume
from train.checkpoints.checkpoint import CONFIG_FILE
from train.config.run_config import RunConfig
from train.tracking.metrics import last_validation_loss
from train.utils.files import short_path
from train.utils.redact import masked


class SweepAborted(ValueError):  # noqa: N818
    """An error that all jobs of the sweep share, so the sweep ends."""


def is_sweep() -> bool:
    """Return whether this is a job of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def folder_of_job() -> Path:
    """Return the folder of this job, relative to the current folder if it lies within it."""
    return short_path(Path(HydraConfig.get().runtime.output_dir))


def check_sweep_job(config: RunConfig) -> None:
    """Raise SweepAborted if a search has nothing to minimize, or the processes of a job train different settings."""
    if not is_sweep():
        return
    sweeper, measured = HydraConfig.get().sweeper, config.validation.held_out or config.validation.samples
    is_search = "optuna" in sweeper._target_
    if is_search and not (config.settings.validate_every and measured):
        key = "validation.samples=0" if config.settings.validate_every else "validate_every=0"
        raise SweepAborted(
            f"{key}: hydra/sweeper=optuna minimizes the validation loss, which needs a number above 0. "
            "Set one; validation.held_out=8 measures the loss on held-out samples"
        )
    if is_search and "maximize" in str(sweeper.get("direction")):
        raise SweepAborted(
            "hydra.sweeper.direction=maximize would search for the highest validation loss. Omit it, or set minimize"
        )
    mine = list(HydraConfig.get().overrides.task)
    first = broadcast_object_list([mine])[0]
    if first != mine:
        raise SweepAborted(
            f"process {config.accelerator.process_index} received {' '.join(mine)}, but the first process "
            f"{' '.join(first)}. For a search with several processes set hydra.sweeper.sampler.seed=0"
        )


def is_done(config: RunConfig) -> bool:
    """Return, and report, whether this job of a resumed sweep (`resume=auto`) had finished before."""
    done = False
    if is_sweep() and config.settings.resume == "auto" and config.accelerator.is_main_process:
        folder = folder_of_job()
        if (folder / CONFIG_FILE).exists() and resume.is_finished(folder):
            run = resume.NewRun(folder, masked(config.composed), config.images_per_step, chosen=True, say=config.say)
            is_same = not run.conflicts(folder, None, moved=False)
            done = is_same and resume.configuration(folder)["steps"] == config.settings.steps
    done = bool(broadcast_object_list([done])[0])
    if done:
        config.say(f"done before: {folder_of_job()}")
    return done


def sweep_result(config: RunConfig) -> float | None:
    """Return the last validation loss of a job of a sweep, in all processes; None if there is none."""
    if not is_sweep():
        return None
    loss = last_validation_loss(folder_of_job()) if config.accelerator.is_main_process else None
    return broadcast_object_list([loss])[0]
