"""Sweeps: `python train/config.py -m +experiment=demo adapter.rank=2,4,8`, and one table of what came out.

Hydra makes the jobs and a launcher runs them, here or elsewhere. When they have ended, also by Ctrl-C, `end_all` reads
their folders and writes `sweep.html`, `sweep.json` and `sweep.csv` beside them. So does, at any time, also while jobs
run,

    python train/sweep.py outputs/demo/<time>
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # a script's own folder comes first in sys.path, and ours would hide libraries
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import csv
import io
import json
from collections.abc import Sequence
from typing import Any, ClassVar

from accelerate.utils import broadcast_object_list
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table as RichTable

from train import jobs, resume, sweep_page
from train.config.run_config import RunConfig
from train.folder import near, write_whole
from train.jobs import Job, best_job, read_jobs, split_overrides
from train.masking import masked, masked_settings
from train.recommend import closing_lines
from train.slurm import check_launcher
from train.utils.console import is_first_process, warn

PAGE, DATA, SHEET = "sweep.html", "sweep.json", "sweep.csv"
COMMAND_LINE = "multirun.yaml"  # of Hydra
NUMBERS = (  # attribute of a job, heading, format
    ("last", "validation loss", ".4f"),
    ("best", "best", ".4f"),
    ("best_step", "at step", "d"),
    ("training_loss", "training loss", ".4f"),
    ("images_per_second", "images/s", ".2f"),
)


class EndsSweep(ValueError):  # noqa: N818
    """What is wrong with this job is wrong with all jobs of the sweep."""


# ------------------------------------------------------------------ a job


def is_sweep() -> bool:
    """Whether this is a job of a sweep."""
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def folder_of_job() -> Path:
    """As the folder of any other run is said: from the current one, if it lies within."""
    return near(Path(HydraConfig.get().runtime.output_dir))


def check(config: RunConfig) -> None:
    """Raises EndsSweep if a search has nothing to minimise, or the processes of a job do not train the same."""
    if not is_sweep():
        return
    measured = config.validation.held_out or config.validation.samples
    if "optuna" in HydraConfig.get().sweeper._target_ and not (config.settings.validate_every and measured):
        key = "validate_every=0" if not config.settings.validate_every else "validation.samples=0"
        raise EndsSweep(
            f"hydra/sweeper=optuna minimises the validation loss, and with {key} there is none: give it a number above "
            "0; validation.held_out=8 measures it on samples set aside"
        )
    sweeper = HydraConfig.get().sweeper
    if "optuna" in sweeper._target_ and "maximize" in str(sweeper.get("direction")):
        raise EndsSweep(
            "hydra.sweeper.direction=maximize would look for the highest validation loss: leave it out, or minimize"
        )
    mine = list(HydraConfig.get().overrides.task)
    first: list[Any] = [mine]
    broadcast_object_list(first)
    if first[0] != mine:
        raise EndsSweep(
            f"process {config.accelerator.process_index} was given {' '.join(mine)}, and the first "
            f"{' '.join(first[0])}: a search over several processes needs a seed (hydra.sweeper.sampler.seed=0)"
        )


def is_done(config: RunConfig) -> bool:
    """Whether this job of a sweep that goes on (`resume=auto`) had finished before; says so."""
    done = [False]
    if is_sweep() and config.settings.resume == "auto" and config.accelerator.is_main_process:
        folder = folder_of_job()
        if (folder / resume.CONFIG_FILE).exists() and resume.is_finished(folder):
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
    found: list[Any] = [jobs.last_validation_loss(folder_of_job()) if config.accelerator.is_main_process else None]
    broadcast_object_list(found)
    return found[0]


# ------------------------------------------------------------------ the table


class Begun(Callback):
    """A callback of Hydra that remembers the folders of the sweeps of this process.

    Their tables are written by `end_all`, and not by this callback when Hydra says that a sweep has ended: of one that
    is interrupted it says nothing.
    """

    folders: ClassVar[list[Path]] = []

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        try:
            check_launcher(config.hydra.launcher)
        except ValueError as error:  # Hydra makes a warning of an exception here, and goes on
            if is_first_process():
                print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        self.folders.append(Path(config.hydra.sweep.dir).absolute())


def mask_command_line(sweep: Path) -> None:
    """Take the secrets out of Hydra's `multirun.yaml` in a sweep's folder, which has the whole command line.

    It is written before the first job, and nothing reads it. One that cannot be masked is removed.
    """
    file = sweep / COMMAND_LINE
    if not is_first_process() or not file.is_file():
        return
    try:
        there = OmegaConf.to_container(OmegaConf.load(file))
        shown = without_secrets(there)
        if shown != there:
            write_whole(file, OmegaConf.to_yaml(OmegaConf.create(shown)))
    except Exception as error:  # the disk, or one of the YAML reader's own
        try:
            file.unlink(missing_ok=True)
        except OSError:
            warn(f"{file} holds this command line, with its secrets if it has any, and cannot be changed ({error})")


def without_secrets(value: Any) -> Any:
    """`masked`, and of the overrides among texts too."""
    if isinstance(value, dict):
        return {key: without_secrets(item) for key, item in masked(value).items()}
    if isinstance(value, list):
        return [without_secrets(item) for item in value]
    return masked_settings(value) if isinstance(value, str) else value


def end_all() -> bool:
    """Write and print the tables of the sweeps of this process; whether all their jobs are done."""
    folders, Begun.folders[:] = list(Begun.folders), []
    done = True
    for sweep in folders if is_first_process() else []:
        mask_command_line(sweep)
        found = read_jobs(sweep) if sweep.is_dir() else []
        done = done and all(job.status == "done" for job in found)
        if any(job.steps or job.error for job in found):  # not of caches that were filled
            try:
                say(write(sweep, found), found)
            except (ValueError, OSError) as error:
                warn(f"the table of {sweep}: {error}")
    return done


def row(job: Job, keys: Sequence[str]) -> dict[str, Any]:
    """A job as plain values: for a file, and for scripts."""
    return {
        "job": job.number,
        "status": job.status,
        **{key: job.overrides.get(key) for key in keys},
        "steps": job.steps,
        "of": job.of,
        "validation_loss": job.last,
        "best_validation_loss": job.best,
        "best_step": job.best_step,
        "training_loss": job.training_loss,
        "images_per_second": job.images_per_second,
        "error": job.error or None,
        "folder": str(job.folder.name),
        "sheet": None if job.sheet is None else job.sheet.relative_to(job.folder.parent).as_posix(),
    }


def write(sweep: Path, found: Sequence[Job]) -> Path:
    """Write page, JSON and CSV of the jobs `found`; returns the page. Raises ValueError if that cannot be."""
    common, keys = split_overrides(found)
    best = best_job(found)
    rows = [row(job, []) | {"overrides": job.overrides} for job in found]
    about = {"sweep": sweep.name, "common": common, "best": None if best is None else best.number, "jobs": rows}
    write_whole(sweep / DATA, json.dumps(about, indent=1) + "\n")
    text = io.StringIO(newline="")
    table = csv.DictWriter(text, list(row(found[0], keys)), lineterminator="\n")
    table.writeheader()
    table.writerows(row(job, keys) for job in found)
    write_whole(sweep / SHEET, text.getvalue())
    write_whole(sweep / PAGE, sweep_page.page_of(sweep, found))
    return sweep / PAGE


def shown(job: Job, attribute: str, form: str) -> str:
    value = getattr(job, attribute)
    return "" if value is None else format(value, form)


def status(job: Job) -> str:
    """How a job ended, and after how many steps if not after all."""
    of = "" if job.status == "done" or not job.of else f" {job.steps}/{job.of}"
    return f"{job.status}{of}"


def say(page: Path, found: Sequence[Job]) -> None:
    """Print the table."""
    _, keys = split_overrides(found)
    best = best_job(found)
    numbers = [entry for entry in NUMBERS if any(getattr(job, entry[0]) is not None for job in found)]
    table = RichTable(box=None, pad_edge=False, header_style="bold")
    for heading in ("job", *keys, "status"):
        table.add_column(heading, overflow="fold")
    for _, heading, _ in numbers:
        table.add_column(heading, justify="right")
    for job in found:
        mark = " *" if best is job and len(found) > 1 else ""
        values = [job.overrides.get(key, "") for key in keys]
        cells = [f"{job.number}{mark}", *values, status(job), *(shown(job, key, form) for key, _, form in numbers)]
        table.add_row(*cells)
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False, markup=False, emoji=False)
    console.print()
    console.print(table)
    for job in found:
        if job.error:
            print(f"job {job.number}: {job.error}")
    if best is not None and len(found) > 1:
        changed = " ".join(f"{key}={best.overrides[key]}" for key in keys if key in best.overrides)
        print(f"* lowest validation loss: {changed}")
    if best is not None:
        print(f"of job {best.number}:", *closing_lines(near(best.folder)), sep="\n")
    print(f"table     {near(page)}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write and print the table of a sweep's folder."""
    parser = argparse.ArgumentParser(description="The table of a sweep: sweep.html, sweep.json and sweep.csv.")
    parser.add_argument("folder", type=Path, help="of the sweep, with its jobs in 0, 1 ...")
    sweep = parser.parse_args(arguments).folder
    found = read_jobs(sweep) if sweep.is_dir() else []
    try:
        if not found:
            raise ValueError(f"{sweep} is not the folder of a sweep: there are no jobs 0, 1 ... in it")
        say(write(sweep, found), found)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
