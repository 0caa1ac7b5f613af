"""What a process prints: which of several processes speaks, warnings, and errors of one process alone."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm


def is_first_process() -> bool:
    """Whether this is the one of several processes that speaks for all; the launcher sets RANK."""
    return os.environ.get("RANK", "0") == "0"


def warn(text: str) -> None:
    """One line on the error stream, above a progress bar."""
    tqdm.write(f"warning: {' '.join(text.split())}", file=sys.stderr)


@contextmanager
def own_errors(process: int) -> Iterator[None]:
    """Within this context an error may be of this process alone: it is shown though it is not the first."""
    try:
        yield
    except Exception as error:
        if process > 0:
            error.add_note(f"(process {process})")
        raise
