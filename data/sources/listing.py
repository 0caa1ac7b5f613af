"""Folders of a dataset: their images and captions by name, paths inside them, and texts that are read from them.

Names are compared in the Unicode form NFC, because macOS and some archives write "é" as two characters. A link to a
folder that contains it is skipped: its files are found without it.
"""

import csv
import json
import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

from data.checks import check_text
from data.files import open_regular, user_path
from data.sources.images import SUFFIXES, UNREADABLE, shorten
from data.sources.pixels import is_image

METADATA = ("metadata.jsonl", "metadata.csv")
MOST_TEXT = 1 << 20  # maximum bytes of a caption file
NAMED_AS_IMAGES = SUFFIXES | UNREADABLE
UNREAD = (".caption", ".json", ".jsonl", ".csv", ".tsv", ".parquet")  # may hold captions under names that are not read
# what is added to the name of an image for what belongs to it: cat.png and cat.control.png, OneTrainer's cat-masklabel
PARTNER = re.compile(
    r"(.+)([._-])(ref(erence)?\d*|control|cond(itioning|ition|label)?|source|src|before|input|orig(inal)?|hint|"
    "mask(label)?|depth(map)?|normal(map|s)?|pose|canny|edges?)",
    re.IGNORECASE,
)
PLAIN = re.compile(r"[\w-][\w .-]*(/[\w-][\w .-]*)*", re.ASCII)  # a name that means the same after os.path.normpath
# of thumbnails, deleted files and the like, which NAS systems, macOS and Windows put into any folder
SYSTEM_FOLDERS = frozenset(
    "@eaDir/@__thumb/@Recycle/#recycle/__MACOSX/$RECYCLE.BIN/System Volume Information/lost+found".split("/")
)


class OutsideFolder(ValueError):  # noqa: N818
    """A dataset names a file that is not in its folder."""


class RepeatedKey(ValueError):  # noqa: N818
    """An object or a table has a name twice, of which readers use the last without a word."""


@dataclass
class Listing:
    """The files of a folder that matter here, as paths, by their names relative to it without the extension (NFC)."""

    pictures: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    texts: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    metadata: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)  # files that may hold captions, and are not read
    folders: list[str] = field(default_factory=list)  # names of subfolders

    @property
    def lone_texts(self) -> list[str]:
        """The captions without an image of their name."""
        return [file for stem, files in self.texts.items() if stem not in self.pictures for file in files]

    def partner_of(self, stem: str, is_certain: bool = False) -> str | None:
        """Return the image that a name such as cat.control belongs to, by its looks; None if there is none.

        With `is_certain`, a word that a name may have anyway, such as cat_source, does not count.
        """
        found = PARTNER.fullmatch(stem)
        if not found or found[1] not in self.pictures:
            return None
        if is_certain and found[2] != "." and not found[3].lower().endswith("label"):
            return None
        return self.pictures[found[1]][0]


def list_files(folder: Path, recursive: bool = False) -> Listing:
    """Return the files in a folder in the order of their names, subfolders after files.

    Hidden files and folders, and folders of an operating system, are left out.
    """
    found = Listing()
    _collect(folder, "", found, (os.path.realpath(folder),) if recursive else None)
    return found


def _collect(folder: Path, prefix: str, found: Listing, above: tuple[str, ...] | None) -> None:
    with os.scandir(folder) as entries:
        shown = sorted((entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith("."))
    beginning = os.path.join(folder, "")
    for name in (name for name, is_dir in shown if not is_dir):
        stem, dot, ending = name.rpartition(".")  # of a million names, faster than os.path.splitext
        stem, suffix = (stem, f".{ending}".lower()) if dot else (name, "")
        path, key = beginning + name, unicodedata.normalize("NFC", prefix + stem)
        if suffix in NAMED_AS_IMAGES or (not suffix and _is_image_file(path)):
            found.pictures[key].append(path)
        elif suffix == ".txt":
            found.texts[key].append(path)
        elif name in METADATA:
            found.metadata.append(path)
        elif suffix in UNREAD:
            found.unread.append(path)
    for name in (name for name, is_dir in shown if is_dir):
        if name in SYSTEM_FOLDERS:
            continue
        if above is None:
            found.folders.append(name)
        elif (real := os.path.realpath(folder / name)) not in above:
            _collect(folder / name, f"{prefix}{name}/", found, (*above, real))


def _is_image_file(path: str) -> bool:
    try:
        with open_regular(path) as stream:
            return is_image(stream)
    except OSError:  # a pipe, or a broken link
        return False


def existing_folder(key: str, path: object) -> Path:
    """Return the folder that a setting names. Raise ValueError if there is none."""
    folder = user_path(check_text(f"dataset.{key}", path))
    if not folder.is_dir():
        problem = "is not a folder" if folder.exists() else "does not exist"
        is_table = folder.suffix.lower() in (".parquet", ".arrow", ".json", ".jsonl", ".csv")
        remedy = ", or set dataset=table for a table" if is_table and key == "path" else ""
        raise ValueError(f"dataset.{key}={str(path)!r} {problem}. Give a folder of images{remedy}")
    return folder


def path_inside(folder: Path, name: str) -> str:
    """Return the path of a file that a dataset names, in the Unicode form in which it exists.

    Raise OutsideFolder if it is not inside the folder.
    """
    if PLAIN.fullmatch(name):  # of a million names, nearly all
        return f"{folder}/{name}" if str(folder) != "/" else f"/{name}"
    root = os.path.abspath(folder)
    path = os.path.normpath(os.path.join(root, name))
    if not path.startswith(root.rstrip(os.sep) + os.sep):
        raise OutsideFolder(f"names {shorten(name)!r}, which is not in {folder}: files must be inside the folder")
    relative = os.path.relpath(path, root)
    if not relative.isascii():
        relative = _existing_form(root, relative)
    return os.path.join(folder, relative)


def _existing_form(root: str, relative: str) -> str:
    place = root
    for part in relative.split(os.sep):
        forms = [part, *(unicodedata.normalize(form, part) for form in ("NFC", "NFD"))]
        place = next((path for form in forms if os.path.exists(path := os.path.join(place, form))), f"{place}/{part}")
    return os.path.relpath(place, root)


def is_image_name(name: str) -> bool:
    """Return whether a text ends as the names of images do."""
    return os.path.splitext(name)[1].lower() in SUFFIXES


def is_foreign(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in UNREADABLE


def different(names: Sequence[str], *others: str) -> str:
    """Return names of files for a message, with escapes if they, or `others`, look the same and are not."""
    seen = [unicodedata.normalize("NFC", name) for name in (*names, *others)]
    return " and ".join(map(ascii, names) if len(set(seen)) < len(seen) else names)


def decode_text(content: bytes) -> str:
    """Return a text. Raise ValueError with the bare reason if it is not UTF-8."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 text ({error}). Save it as UTF-8") from error
    if "\0" in text:
        raise ValueError("is not UTF-8 text (it has NUL characters, as UTF-16 has). Save it as UTF-8")
    return text


def parse_json(text: str) -> Any:
    """Return the value of a JSON text. Raise ValueError with the bare reason for bad JSON and for a key given twice."""
    try:
        return DECODER.decode(text)
    except RepeatedKey:
        raise
    except (ValueError, RecursionError) as error:  # also for an integer of thousands of digits
        raise ValueError(f"is not JSON ({error}): write one object") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        check_unique("key", [key for key, _ in pairs])
    return found


DECODER = json.JSONDecoder(object_pairs_hook=_unique)  # `json.loads` makes one for every line


def check_unique(what: str, names: Sequence[str]) -> None:
    """Raise RepeatedKey with the bare reason if one of the names is there twice."""
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise RepeatedKey(f"has the {what} {shorten(repr(twice))} twice: remove or rename one of them")


def read_text(path: str | Path, most: int | None = None) -> str:
    """Return the text of a file of at most `most` bytes, with \\n at the ends of its lines.

    Raise ValueError, naming the file, if it cannot be read, is not UTF-8, or is too long.
    """
    try:
        with open_regular(path) as file:
            content = file.read() if most is None else file.read(most + 1)
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror or error})") from error
    if most is not None and len(content) > most:
        raise ValueError(f"{path} has more than {most} bytes, which is no caption. Shorten it")
    try:
        return decode_text(content).replace("\r\n", "\n").replace("\r", "\n")
    except ValueError as error:
        raise ValueError(f"{path} {error}") from error


def read_jsonl(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, row). Raise ValueError for a line that is not a JSON object."""
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            raise ValueError(f"{file} line {number} {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{file} line {number} is {line.strip()[:80]!r}. Each line must be one JSON object")
        yield number, row


def read_csv(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, row), with None for missing cells. Raise ValueError for a line with too many cells."""
    reader = csv.DictReader(StringIO(read_text(file), newline=""), restkey="more", strict=True)
    try:
        check_unique("column", [name for name in reader.fieldnames or () if name])
        for row in reader:
            if isinstance(row.get("more"), list):
                raise ValueError(f"{file} line {reader.line_num} has more cells than columns. Quote texts with commas")
            yield reader.line_num, dict(row)
    except csv.Error as error:
        raise ValueError(f"{file} line {reader.line_num} is not CSV ({error})") from error
    except RepeatedKey as error:
        raise ValueError(f"{file} line {reader.line_num} {error}") from error
