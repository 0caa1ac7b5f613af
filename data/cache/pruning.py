"""Deletion of unused cache entries, and a lock that prevents it while a run reads the cache.

A run holds a `Lease` on its cache folder, a shared lock; `prune` needs an exclusive one. The operating system releases
locks when a process ends, in whatever way, so a stale lock cannot block either.
"""

import json
import logging
import re
from collections.abc import Collection
from contextlib import closing
from pathlib import Path
from typing import IO

import numpy as np

from data.cache.packs import MAX_HEADER, PackWriter, read_records
from data.cache.store import Cache, writing

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"
ENTRY = re.compile(r"([0-9a-f]{64})\.safetensors")
WELL_USED = 0.75  # share of a pack's bytes from which on it is not rewritten
log = logging.getLogger(__name__)
Removed = dict[str, tuple[int, int]]  # number and bytes of the entries of each kind


class Lease:
    """A shared lock that protects a cache's entries from `prune` until `close` or the end of the process.

    Waits for a running `prune`. If the folder cannot be written or does not support locks, nothing is locked; `prune`
    refuses to run there too.
    """

    def __init__(self, cache: Cache) -> None:
        self._file: IO[str] | None = None
        if fcntl is None or not cache.shared or not cache.folder.is_dir():
            return
        try:
            self._file = (cache.folder / LOCK_FILE).open("a", encoding="utf-8")
            fcntl.flock(self._file, fcntl.LOCK_SH)
        except OSError:
            self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __del__(self) -> None:
        self.close()


def prune(cache: Cache, used: Collection[str]) -> Removed:
    """Delete the entries whose keys are not in `used`; return the number and bytes of each kind of entry.

    Packs of which less than `WELL_USED` is used are rewritten; unused entries of all others stay and are logged. Files
    that are not entries are kept. Raises ValueError if a run is using the cache, or if that cannot be determined, or if
    a pack cannot be rewritten, and OSError if a file cannot be deleted.
    """
    if not cache.folder.is_dir():
        return {}
    with (cache.folder / LOCK_FILE).open("a", encoding="utf-8") as lock:
        _lock_alone(lock, cache.folder)
        removed: Removed = {}
        for path in sorted(cache.folder.glob("[0-9a-f][0-9a-f]/*.safetensors")):
            name = ENTRY.fullmatch(path.name)
            if name is None or name[1] in used or name[1][:2] != path.parent.name:
                continue
            kind, size = _kind(path), path.stat().st_size
            path.unlink()
            _count(removed, kind, size)
        _prune_packs(cache, used, removed)
        return removed


def _prune_packs(cache: Cache, used: Collection[str], removed: Removed) -> None:
    """Rewrite packs that hold few used entries, and delete those that hold none.

    The entries are in a new pack before the old one goes, so a killed prune loses none; the next one drops the copies.
    """
    cache.packs.refresh()
    halves, seen = {bytes.fromhex(key[:32]) for key in used}, set[bytes]()
    staying = 0
    for pack in sorted(cache.packs.folder.glob("*.pack"), reverse=True):  # of several copies the newest counts
        records, size = read_records(pack), pack.stat().st_size
        keys = [raw.tobytes() for raw in records["key"]]
        is_kept = np.zeros(len(records), bool)
        for row in reversed(range(len(keys))):
            is_kept[row] = keys[row] in halves and keys[row] not in seen
            seen.add(keys[row])
        kept, others = records[is_kept], records[~is_kept]
        if len(kept) and kept["size"].sum() >= WELL_USED * size:
            staying += len(others)
            continue
        for form, length in zip(others["form"].tolist(), others["size"].tolist(), strict=True):
            _count(removed, min(cache.packs.shapes(form), default="nothing"), length)
        with (
            writing(pack.parent),
            closing(PackWriter(pack.parent, flushes=False)) as writer,
            pack.open("rb") as file,
        ):
            for record in kept:
                file.seek(record["begin"])
                writer.append(record["key"].tobytes().hex(), int(record["form"]), file.read(record["size"]))
        pack.with_suffix(".index").unlink(missing_ok=True)
        pack.unlink()
    if staying:
        log.info("%d unused entries stay in packs of %s that are used otherwise", staying, cache.packs.folder)


def _count(removed: Removed, kind: str, size: int) -> None:
    count, total = removed.get(kind, (0, 0))
    removed[kind] = count + 1, total + size


def _lock_alone(lock: IO[str], folder: Path) -> None:
    instead = f"nothing was deleted from {folder}"
    if fcntl is None:
        raise ValueError(f"{instead}: this system has no locks that show whether a run uses it. Delete the folder")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(f"{instead}: a run is using it. Wait until it ends") from error
    except OSError as error:
        why = f"its file system has no locks that show whether a run uses it ({error.strerror})"
        raise ValueError(f"{instead}: {why}. Delete the folder") from error


def _kind(path: Path) -> str:
    """Return the name of an entry's first tensor, which is its kind."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, MAX_HEADER)))
        return min(set(header) - {"__metadata__"}, default="nothing")
    except (OSError, ValueError, TypeError):
        return "damaged"
