"""Files that are complete or absent, also after a crash: written under a temporary name, flushed and renamed.

And files that are read: regular ones alone, because a pipe of the same name would never end.
"""

import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Context manager that yields a temporary path next to `path`, then flushes that file and renames it to `path`.

    After an exception `path` is as it was. Its folder must exist. A killed process leaves a `.*.tmp` file behind.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def open_regular(path: str | Path) -> BufferedReader:
    """Open a file to read it. Raise OSError if it does not exist or is a pipe, a socket or a device."""
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError("it is not a regular file")
    return file
