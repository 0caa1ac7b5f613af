"""Tar shards in the WebDataset convention: files with the same name up to the first dot are one sample.

    0001.jpg  0001.txt  0001.ref0.png  0001.ref1.png  0001.mask.png  0002.png  0002.json ...

The headers of a shard are read once, and images are then read at their offsets in it: nothing is unpacked or copied.
`datasets` reads local shards too, but makes a second copy on disk and requires the same files in all samples: no mixed
formats, and no samples with different numbers of references. Use it for shards on the Hub
(`data.sources.HuggingFace` with `image_column=jpg`, `caption_column=txt`).
"""

import glob
import io
import json
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from data.checks import check_text
from data.sources.base import ALPHA, Bad, Sample, Source
from data.sources.captions import Captions
from data.sources.folders import is_foreign
from data.sources.images import SUFFIXES, Picture, shorten

REFERENCE = re.compile(r"ref(\d+)$")
MOST_TEXT = 1 << 20  # maximum bytes of a caption file


class WebDataset(Source):
    """Local tar shards.

    Args:
        path: A shard, a folder of shards, or a pattern such as "shards/train-*.tar"; read in the order of their names.
        caption_column: Key of the sample's .json that holds a text or a list of texts; null for its .txt.
        prompt: One caption for all images, instead of others.
        mask: "alpha", or the part of the file name between the dots ("mask" for 0001.mask.png), which a sample may
            lack.
        captions, first_frame, max_bad: As in `Source`.

    The image to learn is the one without a name between the dots. The references are ref0, ref1, ... in the order of
    their numbers. Raises ValueError for a path without shards, and BadData for samples that cannot be used and shards
    that cannot be read.
    """

    def __init__(
        self,
        path: str | Path,
        caption_column: str | None = None,
        prompt: str | None = None,
        mask: str | None = None,
        captions: Captions | None = None,
        first_frame: bool = False,
        max_bad: int = 0,
    ) -> None:
        super().__init__(check_text("dataset.path", path), captions, mask, first_frame, max_bad)
        self._key = None if caption_column is None else check_text("dataset.caption_column", caption_column)
        self._prompt = None if prompt is None else check_text("dataset.prompt", prompt)
        self._take((found for shard in _shards(str(path)) for found in self._found(shard)), ": the shards are empty")
        if self._mask not in (None, ALPHA) and not any(sample.mask for sample in self):
            raise ValueError(f"dataset.mask={self._mask!r}: no sample has a file such as NAME.{self._mask}.png")

    def _found(self, shard: str) -> Iterator[Sample | Bad]:
        seen = set()
        try:
            for entry in _entries(shard):
                name = f"{shard}/{entry.key}"
                if entry.key in seen:
                    yield Bad(name, "is in its shard twice: rename one of them")
                    continue
                seen.add(entry.key)
                try:
                    yield self._sample(entry, name)
                except ValueError as error:
                    yield Bad(name, str(error))
        except (tarfile.TarError, OSError, EOFError) as error:
            yield Bad(shard, f"cannot be read as an uncompressed tar file ({error}): unpack a .gz, or copy it again")

    def _sample(self, entry: "_Entry", name: str) -> Sample:
        """Return the sample. Raise ValueError with the bare reason if it has no image or caption, or several."""
        if entry.linked:
            links = ", ".join(f".{part}" for part in entry.linked)
            raise ValueError(f"has links in its shard ({links}): pack files (tar --hard-dereference)")
        pictures: dict[str, str] = {}  # name between the dots -> file
        for file in entry.parts:
            stem, suffix = os.path.splitext(f"x.{file}")
            what = stem[2:]
            if is_foreign(f"x.{file}") and (not what or REFERENCE.match(what)):
                raise ValueError(f"has .{file}, a format that Pillow cannot read: convert it")
            if suffix.lower() in SUFFIXES:
                if what in pictures:
                    raise ValueError(f"has both .{pictures[what]} and .{file}: remove one of them")
                pictures[what] = file
        if "" not in pictures:
            raise ValueError(f"has no image; its files are {', '.join('.' + file for file in entry.parts)}")
        references = [what for what in pictures if REFERENCE.match(what)]
        numbered = {int(found[1]): what for what in references if (found := REFERENCE.match(what))}
        if len(numbered) < len(references):
            raise ValueError(f"has two references of the same number: {', '.join('.' + what for what in references)}")
        mask = pictures.get(self._mask) if self._mask not in (None, ALPHA) else None
        return Sample(
            entry.picture(pictures[""], name),
            tuple(self._texts(entry)),
            tuple(entry.picture(pictures[numbered[number]], name) for number in sorted(numbered)),
            mask=None if mask is None else entry.picture(mask, name),
        )

    def _texts(self, entry: "_Entry") -> list[str]:
        if self._prompt is not None:
            return [self._prompt]
        if self._key is None:
            return [entry.text("txt", " (or name a key of .json with dataset.caption_column)")]
        try:
            row = json.loads(entry.text("json"))
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"has a .json that is not JSON ({error})") from error
        if not isinstance(row, dict) or self._key not in row:
            has = ", ".join(row) if isinstance(row, dict) else shorten(repr(row))
            raise ValueError(f"has no {self._key!r} in its .json, which has: {has}")
        texts = row[self._key] if isinstance(row[self._key], list) else [row[self._key]]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"has the caption {shorten(repr(row[self._key]))}: it must be text")
        return texts


@dataclass
class _Entry:
    """Offset and length of the files of one sample in the shard, by the part of their names after the first dot."""

    shard: str
    key: str
    parts: dict[str, tuple[int, int]] = field(default_factory=dict)
    linked: list[str] = field(default_factory=list)  # parts that are links

    def picture(self, part: str, name: str) -> Picture:
        return Picture(f"{name}.{part}", _PartOpener(self.shard, *self.parts[part]))

    def text(self, part: str, otherwise: str = "") -> str:
        """Return the text of a file. Raise ValueError with the bare reason if it does not exist or is not UTF-8."""
        if part not in self.parts:
            raise ValueError(f"has no caption: no .{part}{otherwise}")
        if self.parts[part][1] > MOST_TEXT:
            raise ValueError(f"has a .{part} of {self.parts[part][1]} bytes, which is no caption")
        with _PartOpener(self.shard, *self.parts[part])() as stream:
            try:
                return stream.read().decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise ValueError(f"has a .{part} that is not UTF-8 text ({error}): save it as UTF-8") from error


class _PartOpener:
    """Function that opens a part of a file as a stream."""

    __slots__ = ("length", "offset", "path")

    def __init__(self, path: str, offset: int, length: int) -> None:
        self.path, self.offset, self.length = path, offset, length

    @property
    def place(self) -> tuple[str, str]:
        """The file and the part of it that is read, for `data.cache.image_digests`."""
        return self.path, f"{self.length} bytes from {self.offset}"

    def __call__(self) -> BinaryIO:
        return io.BufferedReader(_Part(self.path, self.offset, self.length))


class _Part(io.RawIOBase):
    def __init__(self, path: str, offset: int, length: int) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed by `close`
        self._offset, self._length, self._place = offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._place, os.SEEK_END: self._length}[whence]
        self._place = max(start + offset, 0)
        return self._place

    def readinto(self, buffer: "bytearray | memoryview") -> int:  # type: ignore[override]
        wanted = min(len(buffer), max(self._length - self._place, 0))
        self._file.seek(self._offset + self._place)
        read = self._file.readinto(memoryview(buffer)[:wanted]) or 0
        self._place += read
        return read

    def close(self) -> None:
        self._file.close()
        super().close()


def _shards(path: str) -> list[str]:
    """Return the sorted shards of a path or pattern. Raise ValueError if there are none."""
    place = os.path.expanduser(path)
    if os.path.isdir(place):
        place = os.path.join(glob.escape(place), "*.tar")
    shards = sorted(file for file in ([place] if os.path.isfile(place) else glob.glob(place)) if os.path.isfile(file))
    if not shards:
        raise ValueError(
            f"dataset.path={path!r} has no tar shards. Give a .tar file, a folder of them, or a pattern like "
            "'shards/train-*.tar'"
        )
    return shards


def _entries(shard: str) -> Iterator[_Entry]:
    """Yield the samples of a shard: consecutive files with the same key."""
    entry = None
    with tarfile.open(shard, "r:") as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # otherwise it keeps every header in memory
            folder, name = os.path.split(member.name)
            key, dot, part = name.partition(".")
            if not (member.isreg() or member.islnk() or member.issym()) or not dot or not key:
                continue
            key = f"{folder}/{key}" if folder else key
            if entry is None or entry.key != key:
                if entry is not None:
                    yield entry
                entry = _Entry(shard, key)
            if not member.isreg():  # tar stores a second hard link to a file as a link
                entry.linked.append(part)
                continue
            entry.parts[part] = member.offset_data, member.size
    if entry is not None:
        yield entry
