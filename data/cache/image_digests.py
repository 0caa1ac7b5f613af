"""Digests and sizes of image files, stored so that the next start need not read all files again.

The content of an image determines its cache entry, and reading 100,000 images for their digests takes minutes. So
digest and size are stored by path, length, modification times and inode. This only saves reading: a file that looks
changed is read again, and if its content is the same, so is its entry.

The price: a change of content that keeps length, both times and inode is not noticed. The ctime is included because
programs can reset the mtime (`cp -p`, `touch -d`, `rsync -t`), but not the ctime. A file that was changed within the
last seconds is not stored, since it might change again within the resolution of the clock; git does the same with its
index.
"""

import json
import logging
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

from data.files import atomic_write
from data.sources.images import Picture

VERSION = 3  # without it: all images are read again, and if their content is the same, so are their entries
GRAIN = 2.0  # seconds; the resolution of the times of some file systems
log = logging.getLogger(__name__)


class ImageDigest(NamedTuple):
    """What is stored about an image."""

    content: str  # digest of the encoded file
    size: tuple[int, int]  # (width, height) in pixels
    pixels: str  # digest that copies share whose files differ only in metadata


class Digests:
    """Digests and sizes of images, stored in `file` if there is one.

    An image is stored if its `open` has an attribute `place`: the path of its file, and the part of that file. All
    others are read each time.
    """

    def __init__(self, file: Path | None = None) -> None:
        self._file = file
        self._known: dict[str, list[Any]] = {} if file is None else _read(file)
        self._used: dict[str, list[Any]] = {}
        self._changed = False

    def look(self, picture: Picture) -> ImageDigest:
        """Return digests of the encoded content and (width, height). Raise BadPicture if it cannot be read."""
        before = _stamp(picture)
        if before is None:
            return _read_image(picture)
        name, stamp, settled = before
        known = self._used.get(name) or self._known.get(name)
        if known is None or known[0] != stamp:
            read = _read_image(picture)
            if not settled or _stamp(picture) != before:  # it may have changed while it was read
                return read
            known = [stamp, read.content, read.pixels, *read.size]
            self._changed = True
        self._used[name] = known
        return ImageDigest(known[1], (known[3], known[4]), known[2])

    def save(self) -> None:
        """Add new digests to the file, keeping those of other processes. Raise OSError if it cannot be written."""
        if self._file is not None and self._changed:
            _write(self._file, _read(self._file) | self._used)
            self._changed = False

    def forget_others(self) -> int:
        """Drop all digests that `look` did not use; return their number. Raise OSError if writing fails."""
        others = len(self._known.keys() - self._used.keys())
        if self._file is not None and others:
            _write(self._file, self._used)
        return others


def _read_image(picture: Picture) -> ImageDigest:
    content = picture.digest()
    return ImageDigest(content, picture.size, picture.pixel_digest(content))


def _stamp(picture: Picture) -> tuple[str, str, bool] | None:
    """Return an image's name here, values that change with it, and whether a change now would be noticed."""
    place: tuple[str, str] | None = getattr(picture.open, "place", None)
    if place is None:
        return None
    path, part = place
    try:
        status = os.stat(path)
    except OSError:
        return None  # reading it gives the error message
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
        log.warning("%s cannot be read (%s): all images are read again", file, error)
        return {}


def _is_entry(entry: Any) -> bool:
    """Return whether `entry` is a list of stamp, both digests, width and height."""
    if not isinstance(entry, list) or len(entry) != 5:
        return False
    stamp, *digests, width, height = entry
    sides = width, height
    whole = all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides)
    return isinstance(stamp, str) and all(isinstance(one, str) and len(one) == 64 for one in digests) and whole


def _write(file: Path, known: dict[str, list[Any]]) -> None:
    with atomic_write(file) as temporary:
        temporary.write_text(json.dumps({"version": VERSION, "pictures": known}, separators=(",", ":")))
