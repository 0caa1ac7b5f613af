"""What the pages show of a run folder, which another machine may write and which may come from someone else.

A page asks every two seconds, so files are read again only where their time or size changed. What cannot be read is a
sentence among the problems of the run, and all else is shown.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from statistics import median
from typing import Any, Generic, TypeVar
from urllib.parse import urlencode

from flux2.adapters.files import PEFT_FILE, UNFINISHED_FILE
from flux2.utils.images import open_image
from flux2.utils.json_files import read_text
from train.checkpoints import resume
from train.checkpoints.checkpoint import CONFIG_FILE, checkpoints, read_state
from train.config.memory import choice_of
from train.reports.run_pictures import LinkedImage
from train.reports.run_report import COMMANDS, MOST_COMMAND, RunSummary
from train.tracking.metrics import METRICS_FILE, VALIDATION_FILE, read_metrics, series
from train.utils.checks import is_number
from train.utils.files import read_image, reason
from train.utils.lock import LOCK_FILE, in_use
from train.utils.redact import masked
from train.utils.text import duration
from train.validation.sample_grid import grid_boxes, split_grid

RUNNING, FINISHED, STOPPED = "running", "finished", "stopped"
LAST_SPEEDS = 10  # logged speeds whose median predicts the time that is left
RECENT = 120.0  # seconds: what writes files may still run, on a machine whose locks are not seen here
GONE = "{} is no run folder, or no longer: it has no {}"

SLOW = 1.0  # seconds of reading a run folder

T = TypeVar("T")
Version = tuple[int, int] | None

quoted_query = partial(urlencode, errors="surrogateescape")  # of names that are not UTF-8


def version(file: Path) -> Version:
    """Return what changes when a file is written; None if there is none."""
    try:
        found = file.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def versions(folder: Path) -> tuple[Version, ...]:
    """Return what changes when anything is written that the summary of a run is read from."""
    names = (CONFIG_FILE, METRICS_FILE, VALIDATION_FILE, COMMANDS, "checkpoints", f"adapter/{PEFT_FILE}")
    return tuple(version(folder / name) for name in (*names, UNFINISHED_FILE))


def check_run(folder: Path) -> Path:
    """Return `folder`. Raises ValueError if it is not a run's, for example because it disappeared."""
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(GONE.format(folder, CONFIG_FILE))
    return folder


class KeptReads(Generic[T]):
    """What `read` returned for `most` run folders: read again where files changed, if slow only a tenth of the time.

    A page asks every two seconds, and a run of many steps logs as often, next to a training that needs the CPU.
    """

    def __init__(self, read: Callable[[Path], T], most: int) -> None:
        self.read, self.most = read, most
        self._kept: dict[Path, tuple[object, T, float]] = {}
        self._lock = threading.Lock()

    def get(self, folder: Path, changed: object) -> T:
        began = time.monotonic()
        kept = self._kept.get(folder)
        if kept is not None and (kept[0] == changed or began < kept[2]):
            return kept[1]
        value = self.read(folder)
        took = time.monotonic() - began
        with self._lock:
            self._kept.pop(folder, None)
            self._kept[folder] = (changed, value, began + 10 * took if took > SLOW else 0.0)
            if len(self._kept) > self.most:
                del self._kept[next(iter(self._kept))]
        return value


@lru_cache(maxsize=512)
def _configuration(folder: Path, changed: Version) -> tuple[dict[str, Any], str]:
    try:
        return masked(resume.configuration(folder)), ""
    except ValueError as error:
        return {}, str(error)


def configuration(folder: Path) -> dict[str, Any]:
    """Return the configuration of a run without secrets; empty if it cannot be read. Not to be changed."""
    return _configuration(folder, version(folder / CONFIG_FILE))[0]


@lru_cache(maxsize=512)
def _is_finished(folder: Path, changed: tuple[Version, ...]) -> bool:
    try:
        return resume.is_finished(folder)
    except ValueError:  # its configuration cannot be read
        return False


def state_of(folder: Path) -> str:
    """Return whether a run is running, as far as its lock tells here, finished or stopped."""
    if in_use(folder):
        return RUNNING
    return FINISHED if _is_finished(folder, versions(folder)) else STOPPED


@dataclass(frozen=True)
class LoggedProgress:
    """The last numbers that a run logged."""

    done: int = 0
    loss: float | None = None
    validation: float | None = None
    problem: str = ""


def last_value(lines: Sequence[dict[str, Any]], key: str) -> float | None:
    found = series(lines, key)
    return found[-1][1] if found else None


def read_progress(folder: Path) -> LoggedProgress:
    """Return the last numbers that a run logged."""
    try:
        lines = read_metrics(folder)
    except (ValueError, OSError) as error:
        return LoggedProgress(problem=str(error))
    done = max((line["step"] for line in lines), default=0)
    return LoggedProgress(done, last_value(lines, "loss"), last_value(lines, "validation_loss"))


def read_summary(folder: Path) -> RunSummary:
    """Return what a report shows of a run; what could not be read is the only one of its problems."""
    try:
        return RunSummary.read(folder)
    except Exception as error:  # numbers that someone edited by hand raise various types
        problem = str(error) if isinstance(error, ValueError) else f"{folder}: {type(error).__name__}: {error}"
    try:
        lines = read_metrics(folder)
    except (ValueError, OSError):  # `problem` says so
        lines = []
    config = configuration(folder)
    return RunSummary(folder, label_of(folder, config), config, lines, None, [], [problem], command_of(folder))


PROGRESS, SUMMARIES = KeptReads(read_progress, 512), KeptReads(read_summary, 16)


def progress(folder: Path) -> LoggedProgress:
    """Return `read_progress` of a run, maybe from before."""
    return PROGRESS.get(folder, version(folder / METRICS_FILE))


def summary(folder: Path) -> RunSummary:
    """Return `read_summary` of a run, maybe from before."""
    return SUMMARIES.get(folder, versions(folder))


def label_of(folder: Path, config: dict[str, Any]) -> str:
    return f"{config.get('name', '')}/{folder.name}".strip("/")


def command_of(folder: Path) -> str:
    """Return the commands that started and resumed a run; empty if they were not kept."""
    try:
        return read_text(folder / COMMANDS, MOST_COMMAND).strip()
    except ValueError:
        return ""


def age(file: Path) -> float | None:
    """Return the seconds since a file was written; None if there is none."""
    found = version(file)
    return None if found is None else time.time() - found[0] / 1e9


@dataclass(frozen=True)
class RunLine:
    """A line of the table of runs."""

    folder: Path
    label: str
    state: str
    done: int
    steps: int | None
    loss: float | None
    validation: float | None
    age: str
    problem: str


def run_line(folder: Path) -> RunLine | None:
    """Return the line of a run; None if its folder disappeared."""
    started = age(folder / CONFIG_FILE)
    if started is None:
        return None
    config, problem = _configuration(folder, version(folder / CONFIG_FILE))
    found = progress(folder)
    numbers = (found.done, config.get("steps"), found.loss, found.validation)
    problem = problem or found.problem
    return RunLine(folder, label_of(folder, config), state_of(folder), *numbers, duration(started), problem)


def images_per_step(folder: Path, config: dict[str, Any], command: str) -> int | None:
    """Return how many images a step has: as the newest checkpoint says, else by the settings; None if unknown."""
    for place in checkpoints(folder)[-1:]:
        try:
            found = read_state(place)["images_per_step"]
            return found if is_number(found, 1, 1e9) else None
        except ValueError:
            pass
    launched = re.search(r"--num_processes (\d{1,4}) ", command.rpartition("\n")[2])
    images = int(launched[1]) if launched else 1
    for count in (config.get("batch_size"), config.get("gradient_accumulation")):
        if not isinstance(count, int) or not is_number(count, 1, 1e6):  # `auto`
            return None
        images *= count
    return images


def seconds_left(run: RunSummary, done: int) -> float | None:
    """Return the time that the steps left will take at the speed of the last ones; None if it is not known."""
    speeds = [speed for _, speed in run.series("images_per_second")][-LAST_SPEEDS:]
    images = images_per_step(run.folder, run.config, run.command)
    left = run.config.get("steps", 0) - done
    if images is None or left <= 0 or not speeds or not (speed := median(speeds)) > 0:
        return None
    return float(left) * images / speed


def memory_facts(run: RunSummary) -> list[tuple[str, str]]:
    """Return the peak memory of the last logged step, and what its settings were chosen for, if that was kept."""
    keys = dict.fromkeys(key for line in run.lines for key in line if key.startswith("peak_memory_gb"))
    peaks = [f"{values[-1][1]:.2f}" for key in keys if (values := run.series(key))]
    facts = [("peak memory", f"{' + '.join(peaks)} GB")] if peaks else []
    memory = run.config.get("memory")
    if isinstance(memory, dict):
        size = memory.get("gpu_memory_gb")
        if is_number(size, 0):
            facts.append(("memory was chosen for", f"{size:g} GB"))
        if text := str(choice_of(memory)):
            facts.append(("memory settings", text))
    return facts


def facts_of(folder: Path, state: str) -> list[tuple[str, str]]:
    """Return names and values of how far a run is."""
    run, found = summary(folder), progress(folder)
    speeds = [speed for _, speed in run.series("images_per_second")][-LAST_SPEEDS:]
    steps = run.config.get("steps")
    facts = [("steps", f"{found.done} of {'?' if steps is None else steps}")]
    if state == RUNNING and (left := seconds_left(run, found.done)) is not None:
        facts.append(("time left", f"about {duration(left)}, without validation and sample grids"))
    if speeds:
        facts.append(("speed", f"{median(speeds):.3g} images/s"))
    for name, value in (("loss", found.loss), ("validation loss", found.validation)):
        if value is not None:
            facts.append((name, f"{value:.4g}"))
    facts += memory_facts(run)
    for name, file in (("started", CONFIG_FILE), ("last logged", METRICS_FILE)):
        if (since := age(folder / file)) is not None:
            facts.append((name, f"{duration(since)} ago"))
    return facts


def runs_elsewhere(folder: Path, state: str) -> bool:
    """Return whether a run that holds no lock that is seen here may run: it has its lock file, and writes."""
    since = age(folder / METRICS_FILE)
    return state == STOPPED and (folder / LOCK_FILE).exists() and since is not None and since < RECENT


def can_sample(config: dict[str, Any]) -> bool:
    """Return whether a run draws sample grids, so that it draws one that is asked for."""
    sample = config.get("sample")
    draws = isinstance(sample, dict) and (sample.get("prompts") or sample.get("captions"))
    return bool(draws and config.get("sample_every"))


# Pictures


def linked_grid(folder: Path, step: int, file: Path) -> Sequence[tuple[str, LinkedImage]]:
    """Return the prompts of a sample grid, and its images as the page /runs/cell sends them; none if it is unreadable.

    Only the header of the file is read.
    """
    try:
        with open_image(file) as grid:
            boxes = grid_boxes(grid)
    except (OSError, ValueError, SyntaxError):
        return []
    changed = version(file)
    common = {"folder": str(folder), "step": step, "version": 0 if changed is None else changed[0]}
    return [
        (
            prompt,
            LinkedImage(f"/runs/cell?{urlencode({**common, 'place': i}, errors='surrogateescape')}", x1 - x0, y1 - y0),
        )
        for i, (prompt, (x0, y0, x1, y1)) in enumerate(boxes)
    ]


@lru_cache(maxsize=12)  # a page asks for the cells of one grid after the other
def _grid(file: Path, changed: Version) -> list[Any]:
    image = read_image(file)
    return [] if image is None else [cell for _, cell in split_grid(image)]


def grid_cell(file: Path, place: int) -> Any:
    """Return an image of a sample grid. Raises ValueError if it is not there."""
    cells = _grid(file, version(file))
    if not 0 <= place < len(cells):
        raise ValueError(f"{file} has no image {place}, or is incomplete")
    return cells[place]


def linked_file(file: Path) -> LinkedImage | None:
    """Return an image file as the page /image sends it; None if it cannot be read."""
    try:
        with open_image(file) as image:
            return LinkedImage(f"/image?{quoted_query({'path': str(file)})}", *image.size)
    except (OSError, ValueError, SyntaxError):
        return None


def write_empty(file: Path) -> None:
    """Create a file without content. Raises ValueError if that fails."""
    try:
        file.touch()
    except OSError as error:
        raise ValueError(f"{file} cannot be written ({reason(error)})") from error
