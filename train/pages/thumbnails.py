"""Small JPEGs of a dataset's images, made as they are asked for, a few at a time, and kept in a bounded memory."""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from typing import Any

from data.cache.image_digests import stamp_of
from data.sources.images import Picture

SIDES = (320, 1600)  # pixels: of the grid, and to look closely
MOST_BYTES = 64 << 20
AT_ONCE = 2  # images that are decoded at the same time
QUALITY = 82


def stamp(picture: Picture) -> str:
    """Return what changes with the file of an image; empty if it is not in a file of its own, or that is gone."""
    place: tuple[str, str] | None = getattr(picture.open, "place", None)
    return "" if place is None else stamp_of(place[0])[0]


class Thumbnails:
    """Makes and keeps them."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most, self._bytes = most_bytes, 0
        self._kept: OrderedDict[tuple[Any, ...], bytes] = OrderedDict()
        self._lock, self._decoding = threading.Lock(), threading.Semaphore(AT_ONCE)

    def jpeg(self, picture: Picture, side: int) -> bytes:
        """Return an image of at most `side` pixels per side. Raises BadPicture if it cannot be read."""
        now = stamp(picture)
        key = (picture.name, picture.alpha, side, now)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        with self._decoding:
            small = picture.thumbnail(side)
        stream = io.BytesIO()
        small.save(stream, "JPEG", quality=QUALITY)
        content = stream.getvalue()
        if now:
            with self._lock:
                self._bytes += len(content) - len(self._kept.pop(key, b""))
                self._kept[key] = content
                while self._bytes > self._most:
                    self._bytes -= len(self._kept.popitem(last=False)[1])
        return content
