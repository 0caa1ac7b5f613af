"""Removing what a cache holds and nobody asks for, and keeping others from doing so while a run reads it.

A run holds a `Lease` on its cache's folder, a shared lock; `prune` needs the lock for itself. The system lets go of
locks when a process ends, however it ends, so nothing stale can be left that blocks either.
"""

import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import IO

from data.cache.store import MAX_HEADER, Cache

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"
ENTRY = re.compile(r"([0-9a-f]{64})\.safetensors")


class Lease:
    """Keeps a cache's entries from being pruned until `close`, or the end of the process.

    Waits for a `prune` that is under way. Where the folder cannot be written, or has no locks, it holds nothing; nobody
    can prune there either, as far as this program goes.
    """

    def __init__(self, cache: Cache) -> None:
        self._file: IO[str] | None = None
        if fcntl is None or not cache.shared or not cache.folder.is_dir():
            return
        try:
            self._file = (cache.folder / LOCK_FILE).open("a")
            fcntl.flock(self._file, fcntl.LOCK_SH)
        except OSError:
            self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __del__(self) -> None:
        self.close()


def prune(cache: Cache, used: Collection[str]) -> dict[str, tuple[int, int]]:
    """Removes every entry whose key is not in `used`; returns how many of each kind, and their bytes.

    Files that are no entries stay, whatever they are. Raises ValueError if a run reads or fills the cache now, or if it
    cannot be seen whether one does; OSError if a file cannot be removed.
    """
    if not cache.folder.is_dir():
        return {}
    with (cache.folder / LOCK_FILE).open("a") as lock:
        _lock_alone(lock, cache.folder)
        removed: dict[str, tuple[int, int]] = {}
        for path in sorted(cache.folder.glob("[0-9a-f][0-9a-f]/*.safetensors")):
            name = ENTRY.fullmatch(path.name)
            if name is None or name[1] in used or name[1][:2] != path.parent.name:
                continue
            kind, size = _kind(path), path.stat().st_size
            path.unlink()
            count, total = removed.get(kind, (0, 0))
            removed[kind] = count + 1, total + size
        return removed


def _lock_alone(lock: IO[str], folder: Path) -> None:
    instead = f"nothing was removed from {folder}"
    if fcntl is None:
        raise ValueError(f"{instead}: this system has no locks that tell whether a run uses it. Delete the folder")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"{instead}: a run uses it now. Wait for its end") from error
    except OSError as error:
        why = f"its file system has no locks that tell whether a run uses it ({error.strerror})"
        raise ValueError(f"{instead}: {why}. Delete the folder") from error


def _kind(path: Path) -> str:
    """The name of an entry's first tensor, which says what it is."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, MAX_HEADER)))
        names = [name for name in header if name != "__metadata__"]
        return min(names, default="nothing")
    except (OSError, ValueError, TypeError):
        return "damaged"
