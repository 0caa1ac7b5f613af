"""The command line of the entry files: Hydra composes conf/, and what a user can mend is one message, no traceback.

A configuration is checked before anything large is loaded: `checked` and `made` turn a group into an object and refuse
keys that nothing reads, which Hydra lets through behind a `+`. HYDRA_FULL_ERROR=1 shows tracebacks all the same.
"""

from __future__ import annotations

import difflib
import functools
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra
import torch
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from data.sources.base import BadData
from train import jobs, slurm, sweep
from train.config.instantiate import SECRET, no_setting
from train.config.paths import CONFIG
from train.folder import near
from train.masking import masked_settings, masked_text
from train.shared import SHARED
from train.stopping import Stopped, stopped_at_once
from train.utils.console import is_first_process, warn

USER_ERRORS = (ValueError, OSError, OmegaConfBaseException, HydraException, torch.OutOfMemoryError)

if not OmegaConf.has_resolver("first"):
    OmegaConf.register_new_resolver("first", lambda *values: next(value for value in values if value is not None))

if not OmegaConf.has_resolver("within"):  # a place in a folder, if there is one
    OmegaConf.register_new_resolver("within", lambda folder, name: None if folder is None else f"{folder}/{name}")

# conf/hydra/sweeper/optuna.yaml: the plugin, if it is there, brings one of the same name, and Hydra refuses two
Plugins.instance()
ConfigStore.instance().repo.get("hydra", {}).get("sweeper", {}).pop("optuna.yaml", None)


# ------------------------------------------------------------------ errors


def flat(config: DictConfig, prefix: str = "") -> list[str]:
    """All keys of a configuration, groups among them."""
    found = []
    for key in config:
        found.append(f"{prefix}{key}")
        node = config._get_node(key)
        if isinstance(node, DictConfig) and not node._is_missing() and not node._is_none():
            found += flat(node, f"{prefix}{key}.")
    return found


def known_settings(overrides: Sequence[str], name: str = "train") -> list[str]:
    """The keys of conf/`name`.yaml that can be set, with the choices among `overrides` if they compose."""
    chosen = [text for text in overrides if (CONFIG / text.lstrip("+~").partition("=")[0]).is_dir()]
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONFIG), version_base="1.3"):
        try:
            return flat(hydra.compose(name, chosen))
        except (HydraException, OmegaConfBaseException):
            return flat(hydra.compose(name))


def explain(error: Exception, overrides: Sequence[str] = (), name: str = "train") -> str:
    """One line for what a user can mend, and one for each bad sample."""
    if isinstance(error, BadData):
        return str(error)
    text = " ".join(" ".join([str(error), *getattr(error, "__notes__", ())]).split())
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of GPU memory: try memory.checkpointing=full, then a smaller batch_size or resolution ({text})"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        options = [option for option in error.options if not option.startswith("_")]  # those are parts of others
        close = difflib.get_close_matches(choice, options, 1)
        return f"{group}={choice} is not a choice; " + (
            f"did you mean {close[0]}?" if close else f"choose one of {', '.join(options)}"
        )
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} must be given: add {error.full_key}=..."
    if isinstance(error, OverrideParseException):
        return f"{error.override!r} cannot be read: write key=value, and quote a value with special characters"
    if found := re.match(r"Could not override '(.+?)'", text):
        given = [item for item in overrides if item.lstrip("+~").partition("=")[0] == found[1]] or [found[1]]
        if (CONFIG / found[1]).is_dir():
            return f"{given[0]}: no {found[1]} is chosen yet that this could override; write +{given[0]}"
        return no_setting(given[0], known_settings(overrides, name))
    if text.startswith("Config group override must be"):
        return f"a group needs the name of a choice, as in model=tiny ({text})"
    if isinstance(error, OmegaConfBaseException | HydraException):
        return f"configuration: {text} (settings and choices are in conf/; --help lists them)"
    return text


# ------------------------------------------------------------------ commands

Report = Callable[[Exception, str], None]
NO_SWEEP = "-m sweeps over trainings: give this command one configuration, without it"
PLUGINS = {"hydra_optuna_sweeper": "optuna", "hydra_submitit_launcher": "slurm"}  # the extra that brings each


def no_plugin(error: Exception) -> ValueError | None:
    """What to say if an error is of a plugin of Hydra that is not installed."""
    extra = next((extra for plugin, extra in PLUGINS.items() if f"hydra_plugins.{plugin}" in str(error)), None)
    if extra is None or not isinstance(error, RuntimeError | ImportError):
        return None
    return ValueError(f"hydra/sweeper=optuna and hydra/launcher=slurm are extras: pip install 'flux2-lora[{extra}]'")


def lost_jobs(error: Exception) -> ValueError | None:
    """What to say if an error of submitit is that a job left no result: its node failed, or it was cancelled."""
    if not type(error).__module__.startswith("submitit."):
        return None
    return ValueError(
        f"a job ended without a result, and the others are no longer waited for ({str(error).splitlines()[0]}). They "
        "go on; python train/sweep.py FOLDER gives their table when they have ended"
    )


def job_of_sweep(task: Callable[[DictConfig], float | None], config: DictConfig, report: Report) -> float | None:
    """Run one job of a sweep, which notes in its folder how it ended; returns None if it failed."""
    slurm.join_tasks()
    this = HydraConfig.get()
    folder, given = Path(this.runtime.output_dir), [text.partition("=") for text in this.overrides.task]
    overrides = [f"{key}{sign}{'...' if SECRET.search(key) else masked_text(value)}" for key, sign, value in given]

    def note(**values: Any) -> None:
        if is_first_process():
            try:
                jobs.note(folder, **values)
            except ValueError as error:
                warn(str(error))

    if config.resume is None and slurm.was_started_before(folder):
        config.resume = "auto"
    if is_first_process():
        print(f"job {this.job.num}: {' '.join(overrides)}", flush=True)
    sweep.mask_command_line(Path(this.sweep.dir))
    before = jobs.record(folder)
    note(overrides=overrides, steps=config.steps, status=jobs.RUNNING, error="")
    try:
        with slurm.within_time_limit(folder):
            result = task(config)
    except KeyboardInterrupt as stop:
        note(status="stopped", error=masked_settings(str(stop)))
        if not slurm.is_submitted():
            raise
        print(masked_settings(str(stop)), file=sys.stderr)
        return None  # whoever submitted this waits for a result
    except Exception as error:
        if before.get("status") == "done" and config.resume is None:
            note(**before)  # a new run is refused there, and what the folder holds is as it was
        else:
            note(status="failed", error=masked_settings(explain(error, sys.argv[1:])))
        report(error, f"job {this.job.num} ({','.join(sorted(overrides))}): ")
        if isinstance(error, sweep.EndsSweep):
            sys.exit(2)
        return None
    note(status="done")
    return result


def command(task: Callable[[DictConfig], Any], name: str = "train") -> None:
    """Run `task` under Hydra with conf/`name`.yaml; what a user can mend is one message and exit code 2, a stop request
    128 + its signal.

    A job of a sweep that fails says so at once, and the others go on. Of several processes the first speaks, but for
    what went wrong in another alone (`own_errors`).
    """
    before = os.environ.get("HYDRA_FULL_ERROR", "0")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # or Hydra prints cut tracebacks itself
    failed = []

    def report(error: Exception, where: str = "") -> None:
        if before == "1":
            raise error
        failed.append(where)  # not the error, whose traceback would hold the models of a failed job
        if not isinstance(error, USER_ERRORS):
            traceback.print_exception(error)
        if is_first_process() or getattr(error, "__notes__", None):  # a mistake in the settings is the same in all
            print(f"error: {masked_settings(where + explain(error, sys.argv[1:], name))}", file=sys.stderr)

    @functools.wraps(task)
    def job(config: DictConfig) -> Any:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            if name != "train":
                return report(ValueError(NO_SWEEP))
            return job_of_sweep(task, config, report)
        try:
            return task(config)
        except USER_ERRORS as error:
            return report(error)

    try:
        if name != "train" and {"-m", "--multirun"} & set(sys.argv[1:]):  # before Hydra makes a folder for them
            raise ValueError(NO_SWEEP)
        with stopped_at_once():
            hydra.main(version_base="1.3", config_path=str(CONFIG), config_name=name)(job)()
    except KeyboardInterrupt as stop:
        if is_first_process():
            print(masked_settings(str(stop)) or Stopped(), file=sys.stderr, flush=True)
            for place in sweep.Begun.folders:
                print(
                    f"go on with the sweep: the same command with output_dir={near(place)} resume=auto", file=sys.stderr
                )
        sys.exit(getattr(stop, "code", Stopped().code))
    except Exception as error:
        known = error if isinstance(error, USER_ERRORS) else no_plugin(error) or lost_jobs(error)
        if known is None:
            raise
        report(known)
    finally:
        os.environ["HYDRA_FULL_ERROR"] = before
        SHARED.free()
        if not sweep.end_all():
            failed.append("")
    if failed:
        sys.exit(2)
