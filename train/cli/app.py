"""Run a command under Hydra, which composes conf/; user errors are reported as one line, without a traceback.

HYDRA_FULL_ERROR=1 shows tracebacks.
"""

from __future__ import annotations

import functools
import gc
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from train.cli.errors import USER_ERRORS, check_no_switches, format_error, lost_jobs, no_choice, no_plugin
from train.cli.settings_file import with_settings_file
from train.cli.start import prepare_hydra
from train.config.paths import CONFIG
from train.distributed.launch import is_submitted
from train.sweeps import callback, records, slurm
from train.sweeps.job import SweepAborted
from train.sweeps.reuse import SHARED
from train.utils.console import UNSAVED, PrintableRecord, is_first_process, say, show_warning, warn
from train.utils.files import short_path
from train.utils.redact import masked_settings, masked_text, may_be_secret
from train.utils.signals import Stopped, stopped_at_once

prepare_hydra()
logging.setLogRecordFactory(PrintableRecord)

Report = Callable[[Exception, str], None]
NO_SWEEP = "-m: only training can be swept. Run this command without it, with one configuration"


def job_of_sweep(task: Callable[[DictConfig], float | None], config: DictConfig, report: Report) -> float | None:
    """Run one job of a sweep and record its status in its folder; return its result, None if it failed."""
    slurm.join_tasks()
    this = HydraConfig.get()
    folder, words = Path(this.runtime.output_dir), [text.partition("=") for text in this.overrides.task]
    overrides = [f"{key}{sign}{'...' if may_be_secret(key) else masked_text(value)}" for key, sign, value in words]

    def note(**values: Any) -> None:
        if is_first_process():
            try:
                records.note(folder, **values)
            except ValueError as error:
                warn(str(error))

    if config.resume is None and slurm.was_started_before(folder):
        config.resume = "auto"
    if is_first_process():
        say(f"job {this.job.num}: {' '.join(overrides)}")
    callback.mask_command_line(Path(this.sweep.dir))
    before = records.record(folder)
    note(overrides=overrides, steps=config.steps, status=records.RUNNING, error="")
    try:
        with slurm.within_time_limit(folder):
            result = task(config)
    except KeyboardInterrupt as stop:
        note(status="stopped", error=masked_settings(str(stop)))
        if not is_submitted():
            raise
        print(masked_settings(str(stop)), file=sys.stderr)
        return None  # the process that submitted the job waits for a result
    except Exception as error:
        if before.get("status") == "done" and config.resume is None:
            note(**before)  # a new run was refused and the folder is unchanged
        else:
            note(status="failed", error=masked_settings(format_error(error, sys.argv[1:])))
        report(error, f"job {this.job.num} ({','.join(sorted(overrides))}): ")
        if isinstance(error, SweepAborted):
            sys.exit(2)
        return None
    note(status="done")
    return result


def report_unsaved(most: int = 8) -> None:
    """Print what the command could not save, as its last lines."""
    for text in UNSAVED[:most]:
        say(f"error: not saved: {masked_settings(text)}", to_errors=True)
    if len(UNSAVED) > most:
        say(f"error: not saved: {len(UNSAVED) - most} more, in the warnings above", to_errors=True)


def command(task: Callable[[DictConfig], Any], name: str = "train") -> None:
    """Run `task` under Hydra with conf/`name`.yaml.

    A user error is one message and exit code 2; a stop request exits with 128 + its signal. A failed job of a sweep is
    reported at once, and the others continue. Only the first process reports, except errors that occur in another
    process alone (`name_process_in_errors`). The exit code is 2 as well if a run ended but could not save everything.
    """
    if not gc.isenabled():  # `start_command` disabled it
        gc.freeze()
        gc.enable()
    before = os.environ.get("HYDRA_FULL_ERROR", "0")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # otherwise Hydra prints shortened tracebacks itself
    failed = []
    UNSAVED.clear()
    warnings.showwarning = show_warning

    def report(error: Exception, where: str = "") -> None:
        if before == "1":
            raise error
        failed.append(where)  # not the error: its traceback would keep the models in memory
        if not isinstance(error, USER_ERRORS):
            traceback.print_exception(error)
        if is_first_process() or getattr(error, "__notes__", None):  # a bad setting fails in all
            say(f"error: {masked_settings(where + format_error(error, sys.argv[1:], name))}", to_errors=True)

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
        if name != "train" and {"-m", "--multirun"} & set(sys.argv[1:]):  # before Hydra creates folders
            raise ValueError(NO_SWEEP)
        sys.argv[1:] = with_settings_file(sys.argv[1:])
        check_no_switches(sys.argv[1:], name)
        with stopped_at_once():
            hydra.main(version_base="1.3", config_path=str(CONFIG), config_name=name)(job)()
    except KeyboardInterrupt as stop:
        if is_first_process():
            print(masked_settings(str(stop)) or Stopped(), file=sys.stderr, flush=True)
            for folder in map(short_path, callback.SweepCallback.folders):
                print(f"resume the sweep: the same command with output_dir={folder} resume=auto", file=sys.stderr)
        sys.exit(getattr(stop, "code", Stopped().code))
    except Exception as error:
        known = error if isinstance(error, USER_ERRORS) else no_plugin(error) or lost_jobs(error)
        known = known or no_choice(error, sys.argv[1:])
        if known is None:
            raise
        report(known)
    finally:
        os.environ["HYDRA_FULL_ERROR"] = before
        SHARED.free()
        if not callback.write_tables():
            failed.append("")
        report_unsaved()
    if failed or UNSAVED:
        sys.exit(2)
