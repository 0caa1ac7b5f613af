"""A lock on a run folder, so that one run at a time writes there.

It is an flock on `.run.lock` in the folder, which the operating system releases when the process ends, in whatever way,
so a stale lock cannot block the next run. Windows has another lock, on the first byte. Without such locks, as on some
network file systems, nothing is locked.
filelock does not replace it: it cannot ask for a lock without creating the file or with read access alone, and on file
systems without flock it falls back to a file that a killed process leaves behind.
"""

from __future__ import annotations

import errno
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO

from train.utils.files import reason

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

LOCK_FILE = ".run.lock"  # not the `.lock` of a cache, which may be in the same folder
IN_USE = "{} is in use: another run writes there now. Wait until it ends, or choose another folder"
TAKEN = (errno.EAGAIN, errno.EACCES)


class InUse(ValueError):  # noqa: N818
    """Another run is writing into this folder."""


class Lock:
    """Lock on a run folder until `release` or the process ends. Raises InUse, or ValueError if it is not writable."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / LOCK_FILE
        self._handle: IO[str] | None = None
        while True:
            try:
                handle = self.file.open("a", encoding="utf-8")
            except OSError as error:
                raise ValueError(f"{self.file} cannot be written ({reason(error)}). Set another output_dir") from error
            if _lock(handle) is False:
                handle.close()
                raise InUse(IN_USE.format(folder))
            with suppress(FileNotFoundError):
                if os.path.samefile(handle.fileno(), self.file):
                    self._handle = handle
                    return
            handle.close()  # the previous holder deleted the file meanwhile

    def release(self) -> None:
        """Release the lock, and delete the folder if the run wrote nothing. May be called again."""
        if self._handle is None:
            return
        if sys.platform == "win32":  # it deletes no open file
            self._handle.close()
        with suppress(PermissionError):  # there another run may have opened it by now
            self.file.unlink(missing_ok=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()
        self._handle.close()
        self._handle = None


def _lock(file: IO[str]) -> bool | None:
    """Return True if this process has the lock now, False if another has it, None if there are no locks here."""
    try:
        if sys.platform == "win32":
            file.seek(0)
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in TAKEN else None
    return True


def in_use(folder: Path) -> bool:
    """Return whether a run is writing into `folder`."""
    try:
        with (folder / LOCK_FILE).open(
            "a" if os.access(folder / LOCK_FILE, os.W_OK) else "r", encoding="utf-8"
        ) as file:
            return _lock(file) is False
    except OSError:  # there is no lock file, or another user's cannot be read
        return False
