"""Tar shards in the WebDataset convention: files that share a name up to the first dot are one sample.

    0001.jpg  0001.txt  0001.ref0.png  0001.ref1.png  0001.mask.png  0002.png  0002.json ...

A shard is read once, header by header, and pictures are then read where they lie in it: nothing is unpacked and nothing
copied. `datasets` reads local shards too, but into a second copy on disk, and asks that all samples have the same
files: no mixed formats, and no samples with different numbers of references. Shards on the Hub go through it
(`data.sources.tables.HuggingFace` with `image_column=jpg`, `caption_column=txt`).
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

from data.checks import checked_text
from data.sources.base import ALPHA, Bad, Sample, Source
from data.sources.captions import Captions
from data.sources.folders import is_foreign
from data.sources.images import SUFFIXES, Picture, shortened

REFERENCE = re.compile(r"ref(\d+)$")
MOST_TEXT = 1 << 20  # bytes of a caption's file


class WebDataset(Source):
    """Local tar shards.

    Args:
        path: a shard, a folder of shards, or a pattern such as "shards/train-*.tar"; read in the order of their names.
        caption_column: null for the sample's .txt; or a key of its .json that holds a text or a list of texts.
        prompt: one caption for all pictures, instead of others.
        mask: "alpha", or the name of the mask's file between the dots ("mask" for 0001.mask.png); a sample without it
            counts everywhere.
        captions, first_frame, max_bad: as in `Source`.

    A sample's picture to learn is the one without a name between the dots. Its references are ref0, ref1, ... in the
    order of their numbers. Raises ValueError for a path that has no shards, and BadData for samples that cannot be
    used and shards that cannot be read.
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
        super().__init__(checked_text("dataset.path", path), captions, mask, first_frame, max_bad)
        self._key = None if caption_column is None else checked_text("dataset.caption_column", caption_column)
        self._prompt = None if prompt is None else checked_text("dataset.prompt", prompt)
        self._take((found for shard in _shards(str(path)) for found in self._found(shard)), ": the shards are empty")
        if self._mask not in (None, ALPHA) and not any(sample.mask for sample in self):
            raise ValueError(f"dataset.mask={self._mask!r} names no file of any sample, such as NAME.{self._mask}.png")

    def _found(self, shard: str) -> Iterator[Sample | Bad]:
        seen = set()
        try:
            for entry in _entries(shard):
                name = f"{shard}/{entry.key}"
                if entry.key in seen:
                    yield Bad(name, "is there twice in its shard: give one of them another name")
                    continue
                seen.add(entry.key)
                try:
                    yield self._sample(entry, name)
                except ValueError as error:
                    yield Bad(name, str(error))
        except (tarfile.TarError, OSError, EOFError) as error:
            yield Bad(shard, f"cannot be read as an uncompressed tar file ({error}): unpack a .gz, or copy it again")

    def _sample(self, entry: "_Entry", name: str) -> Sample:
        """ValueError, which says only the reason, if it has no picture or caption, or several."""
        if entry.linked:
            links = ", ".join(f".{part}" for part in entry.linked)
            raise ValueError(f"has links in its shard ({links}): pack files (tar --hard-dereference)")
        pictures: dict[str, str] = {}  # what is between the dots -> the file
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
            raise ValueError(f"has no picture; its files are {', '.join('.' + file for file in entry.parts)}")
        references = [what for what in pictures if REFERENCE.match(what)]
        numbered = {int(found[1]): what for what in references if (found := REFERENCE.match(what))}
        if len(numbered) < len(references):
            raise ValueError(f"numbers two references alike: {', '.join('.' + what for what in references)}")
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
            has = ", ".join(row) if isinstance(row, dict) else shortened(repr(row))
            raise ValueError(f"has no {self._key!r} in its .json; that has: {has}")
        texts = row[self._key] if isinstance(row[self._key], list) else [row[self._key]]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"has the caption {shortened(repr(row[self._key]))}: text was expected")
        return texts


@dataclass
class _Entry:
    """The files of one sample, by what follows the first dot: offset and length in the shard."""

    shard: str
    key: str
    parts: dict[str, tuple[int, int]] = field(default_factory=dict)
    linked: list[str] = field(default_factory=list)  # parts that are links

    def picture(self, part: str, name: str) -> Picture:
        return Picture(f"{name}.{part}", _Opener(self.shard, *self.parts[part]))

    def text(self, part: str, otherwise: str = "") -> str:
        """ValueError, which says only the reason, if there is none or it is not UTF-8."""
        if part not in self.parts:
            raise ValueError(f"has no caption: no .{part}{otherwise}")
        if self.parts[part][1] > MOST_TEXT:
            raise ValueError(f"has a .{part} of {self.parts[part][1]} bytes: a caption was expected")
        with _Opener(self.shard, *self.parts[part])() as stream:
            try:
                return stream.read().decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise ValueError(f"has a .{part} that is not UTF-8 text ({error}): save it as UTF-8") from error


class _Opener:
    """Opens a part of a file as a file of its own."""

    __slots__ = ("length", "offset", "path")

    def __init__(self, path: str, offset: int, length: int) -> None:
        self.path, self.offset, self.length = path, offset, length

    @property
    def place(self) -> tuple[str, str]:
        """As `data.cache.image_digests` asks for it: the file, and which part of it."""
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
    """Sorted. Raises ValueError if there are none."""
    place = os.path.expanduser(path)
    if os.path.isdir(place):
        place = os.path.join(glob.escape(place), "*.tar")
    shards = sorted(file for file in ([place] if os.path.isfile(place) else glob.glob(place)) if os.path.isfile(file))
    if not shards:
        raise ValueError(
            f"dataset.path={path!r} has no tar shards: give a .tar file, a folder of such, or a pattern like "
            "'shards/train-*.tar'"
        )
    return shards


def _entries(shard: str) -> Iterator[_Entry]:
    """The samples of a shard: consecutive files of one key, as the convention has it."""
    entry = None
    with tarfile.open(shard, "r:") as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # or it keeps all that it has seen
            folder, name = os.path.split(member.name)
            key, dot, part = name.partition(".")
            if not (member.isreg() or member.islnk() or member.issym()) or not dot or not key:
                continue
            key = f"{folder}/{key}" if folder else key
            if entry is None or entry.key != key:
                if entry is not None:
                    yield entry
                entry = _Entry(shard, key)
            if not member.isreg():  # a link, as tar writes a file that it has already
                entry.linked.append(part)
                continue
            entry.parts[part] = member.offset_data, member.size
    if entry is not None:
        yield entry
