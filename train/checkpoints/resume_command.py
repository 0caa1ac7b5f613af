"""Compose the command line that resumes a run, ready to be copied."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from train.distributed.launch import is_submitted, launch_command, submitted_command
from train.utils.redact import masked_settings

NOT_REPEATED = ("resume", "output_dir", "allow_changed_data")  # set by the resumed run, or meant for one start only


def how_to_resume(folder: Path) -> str:
    """Return how to resume the run in `folder`: the command, or the setting if this process is not a command."""
    if not HydraConfig.initialized():
        return f"resume with resume={folder}"
    return f"resume with:\n  {command_line(folder)}"


def command_line(folder: Path) -> str:
    """Return this command line, or a sweep job's own, set to resume the run in `folder`, with secrets masked."""
    hydra = HydraConfig.get()
    sweep = hydra.mode == RunMode.MULTIRUN
    overrides = list(hydra.overrides.task) if sweep else sys.argv[1:]
    words = [word for word in overrides if word.lstrip("+").partition("=")[0] not in NOT_REPEATED]
    script = "train/run.py" if is_submitted() else sys.argv[0]
    start = submitted_command() if is_submitted() else launch_command(script)
    on_cpu = len(start) > 1 and os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("true", "1", "yes")
    command = shlex.join([*start, script, *map(masked_settings, words), f"resume={folder}"])  # logs are read by others
    return f"ACCELERATE_USE_CPU=true {command}" if on_cpu else command
