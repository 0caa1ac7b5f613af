"""Paths that a user gives; files that are complete or absent, also after a crash.

These are written under a temporary name, flushed and renamed. Only regular files are read, because a pipe of the same
name would never end.
"""

import errno
import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # errors of a full disk, a quota, a limit on file sizes


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
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:  # of a full disk, a quota or a limit on file sizes
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def open_regular(path: str | Path) -> BufferedReader:
    """Open a file to read it. Raise OSError if it does not exist or is a pipe, a socket or a device."""
    file = open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))  # noqa: SIM115
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError("it is not a regular file")
    return file
