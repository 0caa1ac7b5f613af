"""Jobs that submitit runs, under Slurm or locally: what happens when their time is nearly up.

submitit asks Slurm for a signal (SIGUSR2) some time before the limit, and its own handler starts the job again at once,
in the middle of a step. Here a run that trains first finishes its step and saves, as on any request to stop
(train/utils/signals.py), and then submitit's handler does its part: `scontrol requeue`. Started again, the job goes on
from its checkpoint. A run that does not train yet has nothing to save, and is started again at once.

A job of several tasks (`tasks_per_node`, `nodes`) is one run of as many processes. Slurm, or submitit on this machine,
starts them; here they are told of each other as `accelerate launch` would tell them.
"""

from __future__ import annotations

import os
import signal
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
    """Raises ValueError if jobs cannot be submitted from this process, or a job's processes have not one GPU each."""
    if "submitit" not in str(launcher.get("_target_")):
        return
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "jobs are submitted by one process, and accelerate launch started several, each of which would submit "
            "them: start this with python train/run.py -m ..., and set hydra.launcher.tasks_per_node to the processes "
            "of a job"
        )
    tasks, gpus = launcher.get("tasks_per_node"), launcher.get("gpus_per_node")
    if gpus is not None and gpus != tasks:
        raise ValueError(
            f"hydra.launcher.gpus_per_node={gpus} with hydra.launcher.tasks_per_node={tasks}: each process trains on "
            "one GPU. Give tasks_per_node alone, or gpus_per_node=null on machines without GPUs"
        )


def join_tasks() -> None:
    """Tell a process that submitit started of the others of its job, by the variables that `accelerate launch` sets.

    Called before anything asks which process this is. Each takes the GPU of its number on its machine.
    """
    if not is_submitted():
        return
    from submitit import JobEnvironment  # an extra, which is there when it started this process
    from submitit.helpers import TorchDistributedEnvironment

    from train.distributed.processes import cores

    if JobEnvironment().num_tasks < 2:
        return
    group = TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    if "OMP_NUM_THREADS" not in os.environ:  # Accelerate would take one, and say so
        share = max(1, cores() // group.local_world_size)
        os.environ["OMP_NUM_THREADS"] = os.environ.get("SLURM_CPUS_PER_TASK", str(share))
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def was_started_before(folder: Path) -> bool:
    """Whether the job in `folder` is started again by its scheduler: after a time limit, or when its node failed."""
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    return records.record(folder).get("status") == records.REQUEUED or (restarts.isdecimal() and int(restarts) > 0)


@contextmanager
def within_time_limit(folder: Path) -> Iterator[None]:
    """Within this context submitit's warning makes a run save before it ends, and the scheduler start it again.

    Raises SystemExit, in place of `Stopped`, when the job will be started again. Of several processes the first does
    that, for all: what submitit's handler does in the others is nothing.
    """
    number = getattr(signal, "SIGUSR2", None)
    handler = signal.getsignal(number) if number is not None and is_submitted() else None
    if number is None or not callable(handler):
        yield
        return

    def again() -> None:
        if is_first_process():
            records.note(folder, status=records.REQUEUED, error="")
        handler(number, None)

    def warned(signum: int, frame: FrameType | None) -> None:
        if callable(signal.getsignal(signal.SIGUSR1)):  # the loop listens
            signal.raise_signal(signal.SIGUSR1)
        else:
            again()

    signal.signal(number, warned)
    try:
        yield
    except Stopped as stop:
        if stop.number == signal.SIGUSR1:
            again()
        raise
    finally:
        signal.signal(number, handler)
