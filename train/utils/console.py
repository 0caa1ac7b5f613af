"""Terminal output: the process that prints for all, warnings, and errors of a single process."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

from tqdm import tqdm

from flux2.utils.terminal import show, show_title
from flux2.utils.text import printable

PACKAGES = [Path(__file__).parents[2] / name for name in ("flux2", "data", "train")]
PHASES: dict[str, float] = {}  # seconds of each phase of the current run, in their order
UNSAVED: list[str] = []  # what this process could not save; the command repeats it last and ends with an error


def is_first_process() -> bool:
    """Return whether this process prints for all; the launcher sets RANK."""
    return os.environ.get("RANK", "0") == "0"


def say(*texts: object, to_errors: bool = False) -> None:
    """Print each text as a line or lines, without the control characters that a name in it may have."""
    for text in texts:
        show(text, sys.stderr if to_errors else sys.stdout)


def warn(text: str) -> None:
    """Print one line to the error stream, above a progress bar."""
    with tqdm.external_write_mode(file=sys.stderr):
        show(f"warning: {' '.join(text.split())}", sys.stderr)


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: object = None,
    line: object = None,
) -> None:
    """Print a warning of Python as `warn` does; one that is not ours with its place in the code."""
    ours = category is UserWarning and any(Path(filename).is_relative_to(package) for package in PACKAGES)
    warn(f"{message}" if ours else f"{message} ({category.__name__} at {filename}:{lineno})")


class PrintableRecord(logging.LogRecord):
    """A log record whose message has no control characters."""

    def getMessage(self) -> str:  # noqa: N802 - a name of `logging`
        return printable(super().getMessage())


def warn_unsaved(text: str) -> None:
    """Warn, without ending the run, about something of it that is not saved."""
    warn(text)
    UNSAVED.append(" ".join(text.split()))


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Context manager or decorator for a phase of a run: a title on a terminal, and its time for `PHASES`."""
    if is_first_process():
        show_title(name)
    began = perf_counter()
    try:
        yield
    finally:
        PHASES[name] = PHASES.get(name, 0.0) + perf_counter() - began


@contextmanager
def name_process_in_errors(process: int) -> Iterator[None]:
    """Context manager that marks exceptions of processes other than the first, so that these are shown too."""
    try:
        yield
    except Exception as error:
        if process > 0:
            error.add_note(f"(process {process})")
        raise
