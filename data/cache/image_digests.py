"""What is known of picture files from an earlier start, so that a start need not read them all again.

The content of a picture decides which cache entry is its own, and reading 100,000 pictures to find their digests takes
minutes. So digest and size are remembered by path, length, times of change and inode. That only spares the reading: a
file that looks changed is read again, and if its content is the same, so is its entry.

The price: content that changes while length, both times and inode stay the same is not seen. The time of the inode's
change (ctime) is among them because programs can set back the other (`cp -p`, `touch -d`, `rsync -t`), but not that
one. A file that was changed within the last seconds is not remembered, since it might change again within the clock's
grain; git does the same with its index.
"""

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

from data.files import atomic_write
from data.sources.images import Picture

VERSION = 1
GRAIN = 2.0  # seconds; the times of some file systems are no finer
log = logging.getLogger(__name__)
Known = tuple[str, tuple[int, int]]  # digest and (width, height)


class Digests:
    """Digests and sizes of pictures; with a `file`, they are remembered there from start to start.

    A picture is remembered if its `open` has a `place`: the path of the file that it is read from, and which part of
    that it is. All others are read each time.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self._known: dict[str, list[Any]] = {} if file is None else _read(file)
        self._used: dict[str, list[Any]] = {}
        self._changed = False

    def look(self, picture: Picture) -> Known:
        """The digest of its encoded content, and its (width, height). BadPicture if it cannot be read."""
        found = _stamp(picture)
        if found is None:
            return picture.digest(), picture.size
        name, stamp, settled = found
        known = self._used.get(name) or self._known.get(name)
        if known is None or known[0] != stamp:
            known = [stamp, picture.digest(), *picture.size]
            if not settled or _stamp(picture) != found:  # or it changed while it was read
                return known[1], (known[2], known[3])
            self._changed = True
        self._used[name] = known
        return known[1], (known[2], known[3])

    def save(self) -> None:
        """Remembers what was read; what other processes have remembered meanwhile stays. OSError if it cannot be."""
        if self._file is not None and self._changed:
            _write(self._file, _read(self._file) | self._used)
            self._changed = False

    def forget_others(self) -> int:
        """Drops all that was not looked at; returns how many. OSError if the file cannot be written."""
        others = len(self._known.keys() - self._used.keys())
        if self._file is not None and others:
            _write(self._file, self._used)
        return others


def _stamp(picture: Picture) -> tuple[str, str, bool] | None:
    """A picture's name here, what changes when it does, and whether that would be seen if it changed now."""
    place: tuple[str, str] | None = getattr(picture.open, "place", None)
    if place is None:
        return None
    path, part = place
    try:
        status = os.stat(path)
    except OSError:
        return None  # reading it says what is wrong
    settled = time.time() - max(status.st_mtime, status.st_ctime) > GRAIN
    changes = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"
    return json.dumps([os.path.abspath(path), part, picture.alpha]), changes, settled


def _read(file: Path) -> dict[str, list[Any]]:
    try:
        content = json.loads(file.read_bytes())
        known = content["pictures"] if content["version"] == VERSION else {}
        return {name: entry for name, entry in known.items() if _is_entry(entry)}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        log.warning("%s cannot be read (%s): all pictures are read again", file, error)
        return {}


def _is_entry(entry: Any) -> bool:
    """Whether it is a stamp, a digest, width and height."""
    if not isinstance(entry, list) or len(entry) != 4:
        return False
    stamp, digest, *sides = entry
    whole = all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides)
    return isinstance(stamp, str) and isinstance(digest, str) and len(digest) == 64 and whole


def _write(file: Path, known: dict[str, list[Any]]) -> None:
    with atomic_write(file) as temporary:
        temporary.write_text(json.dumps({"version": VERSION, "pictures": known}, separators=(",", ":")))
