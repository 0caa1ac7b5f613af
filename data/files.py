"""Paths that a user gives; files that are complete or absent, also after a crash.

These are written under a temporary name, flushed and renamed. Only regular files are read, because a pipe of the same
name would never end.
"""

import errno
import os
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # errors of a full disk, a quota, a limit on file sizes
MOVE_SECONDS = 3.0


def user_path(path: str | os.PathLike[str]) -> Path:
    """Return a path that a user gave, with `~` and `~name` expanded as a shell does; as in flux2.utils.files."""
    return Path(os.path.expanduser(path))  # Path.expanduser raises for an unknown name


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Context manager that yields a temporary path next to `path`, then flushes that file and renames it to `path`.

    After an exception `path` is as it was, and an error that names no file names `path`. Its folder must exist. A
    killed process leaves a `.*.tmp` file behind.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        with temporary.open("r+b" if os.name == "nt" else "rb") as file:  # Windows flushes what is open for writing
            os.fsync(file.fileno())
        move(temporary, path)
    except OSError as error:  # of a full disk, a quota or a limit on file sizes
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def move(source: Path, target: Path) -> None:
    """Rename a file, replacing `target`, or a folder where there is none; as in flux2.utils.files.

    Windows refuses that while any process has the file open, or one in the folder, such as a virus scanner: there it
    is tried for some seconds.
    """
    until = time.monotonic() + MOVE_SECONDS
    while True:
        try:
            os.replace(source, target)
            return
        except PermissionError:
            if os.name != "nt" or time.monotonic() > until:
                raise
            time.sleep(0.02)


def open_regular(path: str | Path) -> BufferedReader:
    """Open a file to read it. Raise OSError if it does not exist or is a pipe, a socket or a device."""
    no_wait = getattr(os, "O_NONBLOCK", 0)  # Windows has no pipes among its files
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | no_wait))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError("it is not a regular file")
    return file
