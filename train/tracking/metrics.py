"""Writing and reading of the metrics of a run, metrics.jsonl and validation.jsonl."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data.files import atomic_write
from flux2.utils.json_files import parse_json
from train.tracking.trackers import NoTracker
from train.utils.checks import is_count, is_number
from train.utils.console import warn, warn_unsaved
from train.utils.files import reason
from train.utils.redact import masked, masked_text
from train.utils.text import many

METRICS_FILE, VALIDATION_FILE = "metrics.jsonl", "validation.jsonl"
MOST_BYTES = 1 << 30  # a million steps take some 300 MB
MOST_VALUE = 3.5e38  # no float32 is larger; means and variances of larger ones overflow
NEWLINE = b"\n"
LAST_LOSSES = 10  # logged losses in the mean that is reported: a single one varies with the drawn timesteps


def read_line(line: str) -> dict[str, Any] | None:
    """Return a JSON line with a step; None for anything else, such as a line that a crash left incomplete."""
    try:
        values = parse_json(line)
    except ValueError:
        return None
    return values if isinstance(values, dict) and is_count(values.get("step")) else None


def read_json_lines(file: Path) -> list[dict[str, Any]]:
    """Return a file's JSON lines with a step, or none; skip lines that a crash or a full disk left incomplete.

    The file may come from someone else. Raises ValueError if it is larger than that of any run.
    """
    if file.exists() and file.stat().st_size > MOST_BYTES:
        raise ValueError(f"{file} has more than {MOST_BYTES:,} bytes, which no run writes. Move it away")
    lines = file.read_text(errors="replace", encoding="utf-8").split("\n") if file.is_file() else []
    return [values for line in lines if (values := read_line(line)) is not None]


def lines_to_keep(file: Path, last_step: int) -> tuple[list[dict[str, Any]], int]:
    """Return the lines up to `last_step` in the order of their steps, and the number of lines that are not usable.

    These are damaged, are not a run's own (metrics are numbers), or differ from an earlier line of the same step.
    """
    kept, bad = dict[int, list[dict[str, Any]]](), 0
    *lines, rest = file.read_text(errors="replace", encoding="utf-8").split("\n")
    for line in filter(str.strip, lines if read_line(rest) is None else [*lines, rest]):
        values = read_line(line)
        own = values is not None and (file.name != METRICS_FILE or all(map(is_metric, values.values())))
        if values is None or not own:
            bad += 1
        elif values["step"] <= last_step and values not in (same := kept.setdefault(values["step"], [])):
            if any(other.keys() & values.keys() > {"step"} for other in same):
                bad += 1
            else:  # a step can have one line of its skipped update and one of its validation
                same.append(values)
    return [values for step in sorted(kept) for values in kept[step]], bad


def is_metric(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl in a run folder; none if there is no such file."""
    return read_json_lines(folder / METRICS_FILE)


def series(lines: Sequence[Mapping[str, Any]], key: str) -> list[tuple[int, float]]:
    """Return (step, value) for every finite value of `key`."""
    return [(line["step"], float(line[key])) for line in lines if is_number(line.get(key), -MOST_VALUE, MOST_VALUE)]


def last_validation_loss(folder: Path) -> float | None:
    """Return the last validation loss of the run in `folder`; None if there is none or it is not finite."""
    values = [line["validation_loss"] for line in read_metrics(folder) if "validation_loss" in line]
    return float(values[-1]) if values and is_number(values[-1], -MOST_VALUE, MOST_VALUE) else None


class Metrics:
    """Writes `metrics.jsonl`, one JSON object per line, and passes metrics to the tracker; for the main process only.

    `validation.jsonl` has the same form, with the loss of each validation sample. When a run resumes, lines after its
    checkpoint are removed from the files, so that every step occurs once.
    """

    def __init__(self, folder: Path, tracker: NoTracker) -> None:
        self.folder, self.file, self.tracker = folder, folder / METRICS_FILE, tracker
        self.validation_file = folder / VALIDATION_FILE
        self._started = False
        self._failed_calls: set[str] = set()
        self._unwritten: dict[Path, bytes] = {}

    def start(self, name: str, config: dict[str, Any], step: int) -> None:
        """Prepare the files and start the tracker of a run whose lines up to `step` are kept; -1 keeps none.

        Raises ValueError if writing fails.
        """
        for file in (self.file, self.validation_file):
            try:
                if file == self.file:
                    file.touch()
                if file.exists() and file.stat().st_size:
                    self._keep_lines(file, step)
            except OSError as error:
                raise ValueError(
                    f"the metrics file {file} cannot be written ({reason(error)}). Make room, or remove what "
                    "is in its place"
                ) from error
        self.tracker.start(self.folder, name, masked(config))
        self._started = True

    def _keep_lines(self, file: Path, step: int) -> None:
        """Remove the lines after `step`, and those that are not usable; these stay in a copy of the file."""
        kept, bad = lines_to_keep(file, step)
        if bad and step >= 0:
            names = (file.with_name(f"{file.stem}.damaged{number or ''}.jsonl") for number in itertools.count())
            copy = next(name for name in names if not name.exists())
            shutil.copyfile(file, copy)
            warn(f"{file} has {many(bad, 'line')} that cannot be used and will be removed; a copy is {copy}")
        with atomic_write(file) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8", newline="\n")

    def close(self) -> None:
        """Write what is unwritten, and finish the tracker, also after a failed run; do nothing before `start`."""
        for file, lines in list(self._unwritten.items()):
            if (error := self._write(file, lines)) is not None:
                warn_unsaved(f"{many(lines.count(NEWLINE), 'line')} of {file} could not be written ({error})")
        if self._started:
            self._track("finish", self.tracker.finish)

    def log(self, step: int, **values: float) -> None:
        self._append(self.file, step, values)
        self._track("log", self.tracker.log, step, values)

    def validated(self, step: int, record: dict[str, Any]) -> None:
        """Append the loss of each sample to validation.jsonl; the tracker does not get it."""
        self._append(self.validation_file, step, record)

    def _append(self, to: Path, step: int, values: dict[str, Any]) -> None:
        waiting = self._unwritten.pop(to, b"")
        lines = waiting + (json.dumps({"step": step, **values}) + "\n").encode()
        error = self._write(to, lines)
        if error is not None and not waiting:  # one warning for consecutive failures
            warn(
                f"the metrics of step {step} could not be written to {to} ({error}); training continues, and they "
                "are written later if possible"
            )

    def _write(self, to: Path, lines: bytes) -> OSError | None:
        """Append `lines` to a file; if that fails, keep them in `_unwritten` and return the error."""
        try:
            with to.open("ab", buffering=0) as file:
                before = file.tell()
                if file.write(lines) != len(lines):
                    file.truncate(before)  # remove the incomplete line
                    raise OSError("no space for a complete line")
        except OSError as error:
            self._unwritten[to] = lines
            return error
        self._unwritten.pop(to, None)
        return None

    def picture(self, step: int, file: Path) -> None:
        self._track("picture", self.tracker.picture, step, file)

    def _track(self, what: str, call: Callable[..., None], *arguments: Any) -> None:
        """Call the tracker, and warn once for each kind of call that fails, for example because of the network."""
        try:
            call(*arguments)
        except Exception as error:  # libraries raise various types
            if what not in self._failed_calls:
                self._failed_calls.add(what)
                message = masked_text(f"{what}: {type(error).__name__}: {error}")
                warn(f"the tracker failed ({message}); training continues without it")
