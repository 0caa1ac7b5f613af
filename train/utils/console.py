"""Terminal output: the process that prints for all, warnings, and errors of a single process."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm


def is_first_process() -> bool:
    """Return whether this process prints for all; the launcher sets RANK."""
    return os.environ.get("RANK", "0") == "0"


def warn(text: str) -> None:
    """Print one line to the error stream, above a progress bar."""
    tqdm.write(f"warning: {' '.join(text.split())}", file=sys.stderr)


@contextmanager
def name_process_in_errors(process: int) -> Iterator[None]:
    """Context manager that marks exceptions of processes other than the first, so that these are shown too."""
    try:
        yield
    except Exception as error:
        if process > 0:
            error.add_note(f"(process {process})")
        raise
