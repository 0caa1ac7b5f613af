"""Changes of captions in the files that hold them, atomic, and only if these are as they were read.

A caption is the text of a `.txt` file, or a column of a line of metadata.jsonl, whose other lines and columns, line
ends and byte order mark are kept.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from data.files import open_regular
from data.sources.base import CaptionPlace
from data.sources.listing import MOST_TEXT, decode_text, parse_json, read_text
from flux2.utils.files import atomic_write

LINE_ENDS = re.compile(r"(\r\n|\r|\n)")
_WRITING = threading.Lock()  # between reading a file again and replacing it


class Change(NamedTuple):
    """The captions that a place is to have: several only in metadata that has a list there."""

    place: CaptionPlace
    captions: tuple[str, ...]


def is_writable(place: CaptionPlace) -> bool:
    """Return whether captions can be changed there: in a text file or metadata.jsonl, not in a table or an archive."""
    return place.file is not None and place.file.suffix in (".txt", ".jsonl")


def state_of(place: CaptionPlace) -> str:
    """Return a digest of a place and what is written there."""
    content = [str(place.file), place.line, place.column, place.written, place.row]
    text = json.dumps(content, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def change_captions(changes: Sequence[Change], *, write: bool = True) -> None:
    """Write captions of one file, all of them or none; without `write`, only check that they could be written.

    Raises ValueError, naming the file, if it is not as its places say, and OSError if it cannot be written.
    """
    file = changes[0].place.file
    assert file is not None
    assert all(is_writable(change.place) and change.place.file == file for change in changes)
    with _WRITING:
        if changes[0].place.line is None:
            _write_text(file, *changes, write=write)
        else:
            _write_lines(file, changes, write=write)


def _write_text(file: Path, change: Change, *, write: bool) -> None:
    (caption,) = change.captions
    if not change.place.written:
        try:
            if not write:
                if os.path.lexists(file):
                    raise FileExistsError
                return
            with atomic_write(file, replace=False) as unfinished:
                unfinished.write_bytes(f"{caption}\n".encode())
        except FileExistsError as error:
            raise ValueError(f"{file} was written meanwhile, and is kept") from error
    elif read_text(file, MOST_TEXT) != change.place.written[0]:
        raise ValueError(f"{file} was changed meanwhile, and is kept")
    else:
        _replace(file, f"{caption}\n", write=write)


def _write_lines(file: Path, changes: Sequence[Change], *, write: bool) -> None:
    with open_regular(file) as stream:  # again each time: it may be edited meanwhile
        content = stream.read()
    try:
        parts = LINE_ENDS.split(decode_text(content))  # lines, and between them their ends
        for place, captions in changes:
            assert place.line is not None
            index = 2 * (place.line - 1)
            if index >= len(parts) or parse_json(parts[index]) != place.row:
                raise ValueError(f"line {place.line} was changed meanwhile, and is kept")
            value = list(captions) if isinstance(place.row.get(place.column), list) else captions[0]
            parts[index] = _json_line({**place.row, place.column: value})
    except ValueError as error:
        raise ValueError(f"{file} {error}") from error
    _replace(file, ("\ufeff" if content.startswith(codecs.BOM_UTF8) else "") + "".join(parts), write=write)


def _json_line(row: dict[str, object]) -> str:
    line = json.dumps(row, ensure_ascii=False)
    try:
        line.encode()
    except UnicodeEncodeError:  # another column has a lone surrogate, which is no character of UTF-8
        return json.dumps(row)
    return line


def _replace(file: Path, text: str, *, write: bool) -> None:
    """Replace the content of a file, or of the one that it is a link to, and keep its permissions."""
    file = Path(os.path.realpath(file))
    if not os.access(file, os.W_OK):
        raise ValueError(f"{file} is read-only, and is kept")
    if not write:
        return
    with atomic_write(file) as unfinished:
        unfinished.write_bytes(text.encode())
        unfinished.chmod(file.stat().st_mode)
