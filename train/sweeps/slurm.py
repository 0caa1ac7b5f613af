"""Run jobs that submitit starts, under Slurm or locally: join their processes, and save before a time limit.

submitit asks Slurm for a signal (SIGUSR2) some time before the limit, and its own handler requeues the job at once, in
the middle of a step. Here a run that trains first finishes its step and saves, as on any stop request
(train/utils/signals.py); then submitit's handler calls `scontrol requeue`. The restarted job resumes from its
checkpoint. A run that does not train yet has nothing to save and is requeued at once.

A job of several tasks (`tasks_per_node`, `nodes`) is one run with as many processes. Slurm, or submitit on this
machine, starts them; `join_tasks` sets the variables that `accelerate launch` would set.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from omegaconf import DictConfig

from train.distributed.launch import is_submitted
from train.sweeps import records
from train.utils.console import is_first_process
from train.utils.signals import Stopped


def check_launcher(launcher: DictConfig) -> None:
    """Raise ValueError if this process cannot submit jobs, or a job does not have one GPU per process."""
    if "submitit" not in str(launcher.get("_target_")):
        return
    if sys.platform == "win32":
        raise ValueError("hydra/launcher=slurm needs signals that Windows does not have. Submit from Linux, or WSL 2")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "accelerate launch started several processes, and each would submit the jobs. Start python train/run.py "
            "-m ..., and set hydra.launcher.tasks_per_node to the number of processes per job"
        )
    tasks, gpus = launcher.get("tasks_per_node"), launcher.get("gpus_per_node")
    if gpus is not None and gpus != tasks:
        raise ValueError(
            f"hydra.launcher.gpus_per_node={gpus} with hydra.launcher.tasks_per_node={tasks}: each process trains on "
            "one GPU. Set tasks_per_node alone, or gpus_per_node=null on machines without GPUs"
        )


def join_tasks() -> None:
    """Set the variables of `accelerate launch` in a process that submitit started, so that it joins its job.

    Must be called before anything reads the rank. Each process uses the GPU of its local rank.
    """
    if not is_submitted():
        return
    from submitit import JobEnvironment  # an extra, installed if it started this process
    from submitit.helpers import TorchDistributedEnvironment

    from train.distributed.processes import cores

    if JobEnvironment().num_tasks < 2:
        return
    group = TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    if "OMP_NUM_THREADS" not in os.environ:  # Accelerate would set one thread, with a warning
        share = max(1, cores() // group.local_world_size)
        os.environ["OMP_NUM_THREADS"] = os.environ.get("SLURM_CPUS_PER_TASK", str(share))
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def was_started_before(folder: Path) -> bool:
    """Return whether the scheduler restarted the job in `folder`: after a time limit or a node failure."""
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    return records.record(folder).get("status") == records.REQUEUED or (restarts.isdecimal() and int(restarts) > 0)


@contextmanager
def within_time_limit(folder: Path) -> Iterator[None]:
    """Context manager in which submitit's warning makes a run save, end and be requeued.

    Raises SystemExit, not `Stopped`, when the first process requeues the job; submitit's handler ignores the others.
    """
    number = getattr(signal, "SIGUSR2", None)
    handler = signal.getsignal(number) if number is not None and is_submitted() else None
    if number is None or not callable(handler):
        yield
        return

    def requeue() -> None:
        if is_first_process():
            records.note(folder, status=records.REQUEUED, error="")
        handler(number, None)

    def warned(signum: int, frame: FrameType | None) -> None:
        if callable(signal.getsignal(signal.SIGUSR1)):  # the training loop handles it
            signal.raise_signal(signal.SIGUSR1)
        else:
            requeue()

    signal.signal(number, warned)
    try:
        yield
    except Stopped as stop:
        if stop.number == signal.SIGUSR1:
            requeue()
        raise
    finally:
        signal.signal(number, handler)
