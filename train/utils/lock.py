"""A lock on a folder that one process holds until it ends."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import IO

from train.utils.files import reason

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"
IN_USE = "{} is in use: another run writes there now. Wait for its end, or choose another folder"
TAKEN = (errno.EAGAIN, errno.EACCES)


class InUse(ValueError):  # noqa: N818
    """Another run writes into this folder now."""


class Lock:
    """Holds a run folder until `release`, or the end of the process.

    Raises:
        InUse: another holds it.
        ValueError: the lock file cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.file = folder, folder / LOCK_FILE
        self._held: IO[str] | None = None
        while self._held is None:
            held = self._open()
            if _lock(held) is False:
                held.close()
                raise InUse(IN_USE.format(folder))
            try:
                same = os.path.samestat(os.fstat(held.fileno()), self.file.stat())
            except FileNotFoundError:
                same = False
            if same:
                self._held = held
            else:
                held.close()  # the one that held it removed it meanwhile

    def _open(self) -> IO[str]:
        try:
            return self.file.open("a")
        except OSError as error:
            raise ValueError(f"{self.file} cannot be written ({reason(error)}): give another output_dir") from error

    def release(self) -> None:
        """Let go; of a run that wrote nothing the folder is removed. May be called again."""
        if self._held is None:
            return
        self.file.unlink(missing_ok=True)
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()
        self._held.close()
        self._held = None


def _lock(file: IO[str]) -> bool | None:
    """True: it is ours now; False: it is another's; None: there are no locks here."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in TAKEN else None
    return True


def in_use(folder: Path) -> bool:
    """Whether a run writes into `folder` now."""
    try:
        with (folder / LOCK_FILE).open("a" if os.access(folder / LOCK_FILE, os.W_OK) else "r") as file:
            return _lock(file) is False
    except OSError:  # there is none, or it is another user's
        return False
