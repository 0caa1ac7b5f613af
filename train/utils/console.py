"""Terminal output: the process that prints for all, warnings, and errors of a single process."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from flux2.utils.text import printable

UNSAVED: list[str] = []  # what this process could not save; the command repeats it last and ends with an error


def is_first_process() -> bool:
    """Return whether this process prints for all; the launcher sets RANK."""
    return os.environ.get("RANK", "0") == "0"


def say(*texts: object, to_errors: bool = False) -> None:
    """Print each text as a line or lines, without the control characters that a name in it may have."""
    for text in texts:
        print(printable(str(text)), file=sys.stderr if to_errors else sys.stdout, flush=True)


def warn(text: str) -> None:
    """Print one line to the error stream, above a progress bar."""
    tqdm.write(f"warning: {printable(' '.join(text.split()))}", file=sys.stderr)


class PrintableRecord(logging.LogRecord):
    """A log record whose message has no control characters."""

    def getMessage(self) -> str:  # noqa: N802 - a name of `logging`
        return printable(super().getMessage())


def warn_unsaved(text: str) -> None:
    """Warn, without ending the run, about something of it that is not saved."""
    warn(text)
    UNSAVED.append(" ".join(text.split()))


@contextmanager
def name_process_in_errors(process: int) -> Iterator[None]:
    """Context manager that marks exceptions of processes other than the first, so that these are shown too."""
    try:
        yield
    except Exception as error:
        if process > 0:
            error.add_note(f"(process {process})")
        raise
