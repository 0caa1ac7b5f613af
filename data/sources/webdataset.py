"""Tar shards in the WebDataset convention: files with the same name up to the first dot are one sample.

    0001.jpg  0001.txt  0001.ref0.png  0001.ref1.png  0001.mask.png  0002.png  0002.json ...

The headers of a shard are read once, and images are then read at their offsets in it: nothing is unpacked or copied.
`datasets` reads local shards too, but makes a second copy on disk and requires the same files in all samples: no mixed
formats, and no samples with different numbers of references. Use it for shards on the Hub
(`data.sources.HuggingFace` with `image_column=jpg`, `caption_column=txt`).
"""

import glob
import os
import re
import tarfile
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.checks import check_text
from data.files import user_path
from data.sources.base import REPLACED, Bad, Sample, Source, caption_texts
from data.sources.captions import Captions
from data.sources.images import SUFFIXES, FileOpener, Picture, shorten
from data.sources.listing import MOST_TEXT, SYSTEM_FOLDERS, decode_text, is_foreign, parse_json

REFERENCE = re.compile(r"ref(\d+)$")


class WebDataset(Source):
    """Local tar shards.

    Args:
        path: A shard, a folder of shards, or a pattern such as "shards/train-*.tar"; read in the order of their names.
        caption_column: Key of the sample's .json that holds a text or a list of texts; null for its .txt.
        mask: "alpha", or the part of the file name between the dots ("mask" for 0001.mask.png), which a sample may
            lack.
        prompt, captions, first_frame, max_bad, loss_weight: As in `Source`.

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
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__(check_text("dataset.path", path), captions, mask, first_frame, max_bad, prompt, loss_weight)
        self._key = None if caption_column is None else check_text("dataset.caption_column", caption_column)
        self._take((found for shard in _shards(str(path)) for found in self._found(shard)), ": the shards are empty")
        if self._mask_name is not None and not any(sample.mask for sample in self):
            raise ValueError(f"dataset.mask={mask!r}: no sample has a file such as NAME.{mask}.png")

    def _found(self, shard: str) -> Iterator[Sample | Bad]:
        entries, damage = self._entries_of(shard)
        read = "txt" if self._key is None else "json"
        endings = dict.fromkeys(part for entry in entries for part in entry.parts)
        others = [end for end in endings if end != read and os.path.splitext(f"x.{end}")[1].lower() not in SUFFIXES]
        kind = f"further files of samples (captions are .{read}, or with dataset.caption_column a key of .json)"
        self._note_unused(kind, *(f"{shard}/*.{end}" for end in others))
        for entry in entries:
            name = f"{shard}/{entry.key}"
            try:
                yield self._sample(entry, name)
            except ValueError as error:
                yield Bad(name, str(error))
        if damage is not None:
            yield Bad(shard, f"cannot be read as an uncompressed tar file ({damage}): unpack a .gz, or copy it again")

    def _entries_of(self, shard: str) -> "tuple[list[_Entry], Exception | None]":
        """Return what `_entries` does; what earlier starts know of a shard that is whole is not read from it again."""

        def read() -> list[Any]:
            entries, damage = _entries(shard)
            if damage is not None:
                raise _DamagedShard(entries, damage)
            return [(entry.key, entry.parts, entry.linked, entry.twice) for entry in entries]

        try:
            found = read() if self._known is None else self._known.listing(shard, read)
            return [
                _Entry(shard, key, {part: (begin, length) for part, (begin, length) in parts.items()}, linked, twice)
                for key, parts, linked, twice in found
            ], None
        except _DamagedShard as error:
            return error.entries, error.damage

    def _sample(self, entry: "_Entry", name: str) -> Sample:
        """Return the sample. Raise ValueError with the bare reason if it has no image or caption, or several."""
        if entry.linked:
            links = ", ".join(f".{part}" for part in entry.linked)
            raise ValueError(f"has links in its shard ({links}): pack files (tar --hard-dereference)")
        if entry.twice:
            raise ValueError(f"has .{entry.twice[0]} in its shard twice: rename one of them")
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
        if "" not in pictures and set(entry.parts) == {"txt"}:
            raise ValueError("is a caption without an image of its name in its shard")
        if "" not in pictures:
            raise ValueError(f"has no image; its files are {', '.join('.' + file for file in entry.parts)}")
        numbered = [(int(found[1]), what) for what in pictures if (found := REFERENCE.match(what))]
        if len(dict(numbered)) < len(numbered):
            raise ValueError(f"has two references of the same number: {', '.join(f'.{what}' for _, what in numbered)}")
        mask = None if self._mask_name is None else pictures.get(self._mask_name)
        used = {"", self._mask_name, *(what for _, what in numbered)}
        others = [f"{name}.{file}" for what, file in pictures.items() if what not in used]
        self._note_unused("further images of samples (references are called ref0, ref1; see dataset.mask)", *others)
        return Sample(
            entry.picture(pictures[""], name),
            tuple(self._texts(entry)),
            tuple(entry.picture(pictures[what], name) for _, what in sorted(numbered)),
            mask=None if mask is None else entry.picture(mask, name),
        )

    def _texts(self, entry: "_Entry") -> list[str]:
        if self._prompt is not None:
            if (part := "txt" if self._key is None else "json") in entry.parts:
                self._note_unused(REPLACED, f"{entry.shard}/{entry.key}.{part}")
            return [self._prompt]
        if self._key is None:
            return [entry.text("txt", " (or name a key of .json with dataset.caption_column)")]
        text = entry.text("json")
        try:
            row = parse_json(text)
        except ValueError as error:
            raise ValueError(f"has a .json that {error}") from error
        if not isinstance(row, dict) or self._key not in row:
            has = ", ".join(row) if isinstance(row, dict) else shorten(repr(row))
            raise ValueError(f"has no {self._key!r} in its .json, which has: {has}")
        return caption_texts(row[self._key], self.allow_empty)


class _DamagedShard(Exception):  # noqa: N818
    def __init__(self, entries: "list[_Entry]", damage: Exception) -> None:
        super().__init__(str(damage))
        self.entries, self.damage = entries, damage


@dataclass
class _Entry:
    """Offset and length of the files of one sample in the shard, by the part of their names after the first dot."""

    shard: str
    key: str
    parts: dict[str, tuple[int, int]] = field(default_factory=dict)
    linked: list[str] = field(default_factory=list)  # parts that are links
    twice: list[str] = field(default_factory=list)  # parts that the shard has twice

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
                return decode_text(stream.read())
            except ValueError as error:
                raise ValueError(f"has a .{part} that {error}") from error


def _shards(path: str) -> list[str]:
    """Return the sorted shards of a path or pattern. Raise ValueError if there are none."""
    place = str(user_path(path))
    if os.path.isdir(place):
        place = os.path.join(glob.escape(place), "*.tar")
    shards = sorted(file for file in ([place] if os.path.isfile(place) else glob.glob(place)) if os.path.isfile(file))
    if not shards:
        raise ValueError(
            f"dataset.path={path!r} has no tar shards. Give a .tar file, a folder of them, or a pattern like "
            "'shards/train-*.tar'"
        )
    return shards


def _entries(shard: str) -> tuple[list[_Entry], Exception | None]:
    """Return the samples of a shard, in the order of the first file of each, and the error at which it ends, if any.

    Files of a sample need not follow each other. The sample of the last file before an error is left out.
    """
    entries: dict[str, _Entry] = {}
    key = ""
    try:
        with tarfile.open(shard, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # otherwise it keeps every header in memory
                folder, name = os.path.split(member.name)
                stem, dot, part = name.partition(".")
                if not (member.isreg() or member.islnk() or member.issym()) or not dot or not stem:
                    continue
                if not SYSTEM_FOLDERS.isdisjoint(folder.split("/")):
                    continue
                part = part.lower() if part.lower() in ("txt", "json") else part
                key = unicodedata.normalize("NFC", f"{folder}/{stem}" if folder else stem)
                entry = entries.setdefault(key, _Entry(shard, key))
                if part in entry.parts:
                    entry.twice.append(part)
                if not member.isreg():  # tar stores a second hard link to a file as a link
                    entry.linked.append(part)
                    continue
                entry.parts[part] = member.offset_data, member.size
    except (tarfile.TarError, OSError, EOFError) as error:
        entries.pop(key, None)
        return list(entries.values()), error
    return list(entries.values()), None
