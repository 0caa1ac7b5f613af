"""Compose the command line that resumes a run, ready to be copied."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode

from flux2.utils.text import join_words, split_words
from train.distributed.launch import is_submitted, launch_command, submitted_command
from train.utils.redact import MASK, masked_settings
from train.utils.text import setting

SETTING = re.compile(r"\+?[A-Za-z][\w./@-]*=.*", re.DOTALL)  # no flag, and no deletion
NOT_REPEATED = ("resume", "output_dir", "allow_changed_data")  # set by the resumed run, or meant for one start only


def how_to_resume(folder: Path) -> str:
    """Return how to resume the run in `folder`: the command, or the setting if this process is not a command."""
    if not HydraConfig.initialized():
        return f"resume with {setting('resume', str(folder))}"
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
    shown = map(masked_settings, words)  # logs are read by others
    command = join_words([*start, script, *shown, setting("resume", str(folder))])
    return f"ACCELERATE_USE_CPU=true {command}" if on_cpu else command


def words_from_record(command: str, config_text: str) -> tuple[int, list[str]]:
    """Return the number of processes and the settings of the command that a run kept, which may come from someone else.

    A path below the home folder, which is kept as `~/...`, is written out where the run's `config_text` has it so.
    Raises ValueError for what is no command of a training, lacks a secret, or names what is called or interpolated.
    """
    try:
        words = split_words(command)
    except ValueError as error:
        raise ValueError(f"the command cannot be read ({error})") from error
    start, settings = [], words
    if "train/run.py" in words:
        at = words.index("train/run.py")
        start, settings = words[:at], words[at + 1 :]
    launched = re.fullmatch(r"accelerate launch --num_processes ([1-9]\d{0,3})", " ".join(start))
    if start != ["python"] and not launched:
        raise ValueError("it does not begin with: python train/run.py")
    home = os.path.expanduser("~")
    for word in settings:
        if not SETTING.fullmatch(word):
            raise ValueError(f"{word!r} is not a setting, key=value")
        if MASK in word:
            raise ValueError(f"{word!r} held a secret, which a run does not keep")
        if "_target_" in word or "${" in word or word.lstrip("+").startswith("hydra"):
            raise ValueError(f"{word!r} can call any function or read any variable")

    def whole(found: re.Match[str]) -> str:
        path = f"{home}{os.sep}{found[1]}"
        return path if path in config_text else found[0]

    settings = [word for word in settings if word.lstrip("+").partition("=")[0] not in NOT_REPEATED]
    return int(launched[1]) if launched else 1, [re.sub(r"~/([^,\]'\"]*)", whole, word) for word in settings]
