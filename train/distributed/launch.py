"""Detection of the launcher of this process: none, accelerate, or Slurm."""

from __future__ import annotations

import os
from collections.abc import Sequence

import psutil


def submitted_command() -> Sequence[str]:
    """Return the words before the script that start as many processes without submitit as submitit started."""
    processes = os.environ.get("WORLD_SIZE", "1")
    return ["accelerate", "launch", "--multi_gpu", "--num_processes", processes] if processes != "1" else ["python"]


def launch_command(script: str) -> Sequence[str]:
    """Return the words before `script` on the command line that started it: `python`, or `accelerate launch ...`."""
    try:
        parent = psutil.Process().parent()
        words = parent.cmdline() if parent is not None else []
    except psutil.Error:
        words = []
    if script in words and any("accelerate" in word or "torchrun" in word for word in words[:4]):
        return words[: words.index(script)]
    return ["python"]


def is_submitted() -> bool:
    """Return whether submitit started this process."""
    return "SUBMITIT_EXECUTOR" in os.environ and "SUBMITIT_FOLDER" in os.environ
