"""The command line that goes on with a run, whole, to be copied."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from train.distributed.launch import is_submitted, launch_command, submitted_command
from train.utils.redact import masked_settings

REPLACED = ("resume", "output_dir", "allow_changed_data")  # by what is resumed; the last was for that time


def go_on(folder: Path) -> str:
    """How to go on with the run in `folder`: the command, or the setting where this process is no command."""
    if not HydraConfig.initialized():
        return f"go on with resume={folder}"
    return f"go on with:\n  {command_line(folder)}"


def command_line(folder: Path) -> str:
    """This process's own command line, with its launcher's where there is one, resuming the run in `folder`.

    What is secret in it is `***`, to be filled in again. Of a sweep it is that of the job alone.
    """
    hydra = HydraConfig.get()
    sweep = hydra.mode == RunMode.MULTIRUN
    overrides = list(hydra.overrides.task) if sweep else sys.argv[1:]
    kept = [word for word in overrides if word.lstrip("+").partition("=")[0] not in REPLACED]
    start, script = (
        (submitted_command(), "train/run.py") if is_submitted() else (launch_command(sys.argv[0]), sys.argv[0])
    )
    on_cpu = len(start) > 1 and os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes")
    shown = [masked_settings(word) for word in kept]  # this is printed, and logs are read by others
    command = shlex.join([*start, script, *shown, f"resume={folder}"])
    return f"ACCELERATE_USE_CPU=true {command}" if on_cpu else command
