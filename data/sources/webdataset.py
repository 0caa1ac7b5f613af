"""Tar shards in the WebDataset convention: files with the same name up to the first dot are one sample.

    0001.jpg  0001.txt  0001.ref0.png  0001.ref1.png  0001.mask.png  0002.png  0002.json ...

The headers of a shard are read once, and images are then read at their offsets in it: nothing is unpacked or copied.
`datasets` reads local shards too, but makes a second copy on disk and requires the same files in all samples: no mixed
formats, and no samples with different numbers of references. Use it for shards on the Hub
(`data.sources.HuggingFace` with `image_column=jpg`, `caption_column=txt`).
"""

import glob
import json
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from data.checks import check_text
from data.sources.base import Bad, Sample, Source, caption_texts
from data.sources.captions import Captions
from data.sources.folders import is_foreign
from data.sources.images import SUFFIXES, FileOpener, Picture, shorten

REFERENCE = re.compile(r"ref(\d+)$")
MOST_TEXT = 1 << 20  # maximum bytes of a caption file


class WebDataset(Source):
    """Local tar shards.

    Args:
        path: A shard, a folder of shards, or a pattern such as "shards/train-*.tar"; read in the order of their names.
        caption_column: Key of the sample's .json that holds a text or a list of texts; null for its .txt.
        mask: "alpha", or the part of the file name between the dots ("mask" for 0001.mask.png), which a sample may
            lack.
        prompt, captions, first_frame, max_bad: As in `Source`.

    The image to learn has no name between the dots; the references are ref0, ref1, ... in the order of their numbers.
    Raises ValueError for a path without shards, and BadData for unusable samples and unreadable shards.
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
        super().__init__(check_text("dataset.path", path), captions, mask, first_frame, max_bad, prompt)
        self._key = None if caption_column is None else check_text("dataset.caption_column", caption_column)
        self._take((found for shard in _shards(str(path)) for found in self._found(shard)), ": the shards are empty")
        if self._mask_name is not None and not any(sample.mask for sample in self):
            raise ValueError(f"dataset.mask={mask!r}: no sample has a file such as NAME.{mask}.png")

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
        numbered = [(int(found[1]), what) for what in pictures if (found := REFERENCE.match(what))]
        if len(dict(numbered)) < len(numbered):
            raise ValueError(f"has two references of the same number: {', '.join(f'.{what}' for _, what in numbered)}")
        mask = None if self._mask_name is None else pictures.get(self._mask_name)
        return Sample(
            entry.picture(pictures[""], name),
            tuple(self._texts(entry)),
            tuple(entry.picture(pictures[what], name) for _, what in sorted(numbered)),
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
        return caption_texts(row[self._key])


@dataclass
class _Entry:
    """Offset and length of the files of one sample in the shard, by the part of their names after the first dot."""

    shard: str
    key: str
    parts: dict[str, tuple[int, int]] = field(default_factory=dict)
    linked: list[str] = field(default_factory=list)  # parts that are links

    def picture(self, part: str, name: str) -> Picture:
        return Picture(f"{name}.{part}", FileOpener(self.shard, *self.parts[part]))

    def text(self, part: str, otherwise: str = "") -> str:
        """Return the text of a file. Raise ValueError with the bare reason if it does not exist or is not UTF-8."""
        if part not in self.parts:
            raise ValueError(f"has no caption: no .{part}{otherwise}")
        if self.parts[part][1] > MOST_TEXT:
            raise ValueError(f"has a .{part} of {self.parts[part][1]} bytes, which is no caption")
        with FileOpener(self.shard, *self.parts[part])() as stream:
            try:
                return stream.read().decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise ValueError(f"has a .{part} that is not UTF-8 text ({error}): save it as UTF-8") from error


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
