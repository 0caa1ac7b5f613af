"""Images in folders: with caption files, with a metadata file, or as pairs of before and after.

A folder is listed once, and images are opened by their paths. Files that metadata names must lie in the folder, so that
a downloaded dataset cannot read other files of this machine. Symbolic links are followed: their creator could read the
files that they point to.
"""

import csv
import json
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

from data.checks import check_flag, check_text, check_texts
from data.sources.base import Bad, Sample, Source, caption_texts
from data.sources.captions import Captions
from data.sources.images import SUFFIXES, UNREADABLE, Picture, file_picture, shorten

METADATA = ("metadata.jsonl", "metadata.csv")
REFERENCES = "references"


class OutsideFolder(ValueError):  # noqa: N818
    """A dataset names a file that is not in its folder."""


class Folder(Source):
    """A folder of images with `metadata.jsonl` or `metadata.csv`, or with a `.txt` file of the same stem for each.

    Args:
        caption_column: Column of the metadata; in jsonl it may hold a list of captions.
        image_column: Column of the metadata with a file name, relative to the folder of the metadata.
        reference_columns: Columns of the metadata that hold a file name, a list of file names (in csv as JSON), or
            nothing (null, in csv an empty cell). By default the column `references`, if there is one.
        recursive: Include subfolders. A metadata file describes everything below its folder.
        mask: "alpha", or a column of the metadata (null: no mask), or without metadata a folder in `path` that has an
            image of the same name for each.
        prompt, captions, first_frame, max_bad: As in `Source`.

    Samples are in the order of the metadata, or else of the file names, subfolders after files. Raises ValueError for a
    folder or column that does not exist or metadata that cannot be read, and BadData for samples that cannot be used.
    """

    def __init__(
        self,
        path: str | Path,
        caption_column: str = "text",
        image_column: str = "file_name",
        reference_columns: Sequence[str] | None = None,
        prompt: str | None = None,
        recursive: bool = False,
        mask: str | None = None,
        captions: Captions | None = None,
        first_frame: bool = False,
        max_bad: int = 0,
    ) -> None:
        self.path = existing_folder("path", path)
        super().__init__(str(self.path), captions, mask, first_frame, max_bad, prompt)
        self._mask_folder = None if self._mask_name is None else self.path / self._mask_name
        self._caption = check_text("dataset.caption_column", caption_column)
        self._image = check_text("dataset.image_column", image_column)
        given = None if reference_columns is None else check_texts("dataset.reference_columns", reference_columns)
        self._references = given
        check_flag("dataset.recursive", recursive)
        self._recursive = recursive
        self._has_metadata = False
        self._pictures: dict[str, Picture] = {}  # by path, so that samples share the object of a common reference
        endings = ", ".join(sorted(SUFFIXES))
        beneath = "" if recursive else "; set dataset.recursive=true to include subfolders"
        self._take(self._found(self.path), f": it contains no images ({endings}){beneath}")
        columns: dict[str, tuple[object, object]] = {
            "caption_column": (self._caption, "text"),
            "image_column": (self._image, "file_name"),
            "reference_columns": (list(given or ()), []),
        }
        changed = [f"dataset.{key}={value!r}" for key, (value, usual) in columns.items() if value != usual]
        if changed and not self._has_metadata:
            raise ValueError(
                f"{', '.join(changed)}: {self.path / METADATA[0]} does not exist. Write that file (or {METADATA[1]}), "
                "or remove the setting"
            )

    def _found(self, folder: Path) -> Iterator[Sample | Bad]:
        """Yield the samples of a folder, with `recursive` also those of its subfolders."""
        metadata = [folder / name for name in METADATA if (folder / name).exists()]
        if len(metadata) == 2:
            raise ValueError(f"{folder} has both {' and '.join(METADATA)}. Remove one of them")
        if metadata:
            self._has_metadata = True
            yield from self._from_metadata(metadata[0])
            return
        names, folders = list_folder(folder)
        yield from self._from_sidecars(folder, names)
        if self._recursive:
            for name in folders:
                if folder / name != self._mask_folder:
                    yield from self._found(folder / name)

    def _from_sidecars(self, folder: Path, names: Sequence[str]) -> Iterator[Sample | Bad]:
        masks: dict[str, list[str]] = {}
        if self._mask_folder is not None:
            there = self._mask_folder / folder.relative_to(self.path)
            if folder == self.path:
                existing_folder("mask", there)
            masks = pictures_by_stem(there) if there.is_dir() else {}
        texts = {name for name in names if name.endswith(".txt")}
        for stem, files in by_stem(names).items():
            mask = masks.get(stem, [])
            for name in files:
                path = str(folder / name)
                if len(files) > 1 and (self._prompt is None or masks):
                    others = ", ".join(other for other in files if other != name)
                    yield Bad(path, f"shares its name, and so its caption, with {others}: rename one of them")
                elif len(mask) > 1:
                    yield Bad(path, f"has several masks, {' and '.join(mask)}: remove all but one")
                elif is_foreign(name):
                    yield Bad(path, "has a format that Pillow cannot read: convert it")
                elif self._mask_folder is not None and not mask:
                    yield Bad(path, f"has no mask in {self._mask_folder}")
                elif self._prompt is None and f"{stem}.txt" not in texts:
                    yield Bad(path, f"has no caption: write {stem}.txt or metadata.jsonl, or set dataset.prompt")
                else:
                    sample = Sample(file_picture(path), (), mask=file_picture(mask[0]) if mask else None)
                    yield _with_caption(sample, self._prompt, folder / f"{stem}.txt")

    def _from_metadata(self, file: Path) -> Iterator[Sample | Bad]:
        rows = list(_jsonl(file) if file.suffix == ".jsonl" else _csv(file))
        if not rows:
            raise ValueError(f"{file} is empty. Write one line for each image")
        references = self._references
        if references is None:
            references = (REFERENCES,) * any(REFERENCES in row for _, row in rows)
        caption_column = self._caption if self._prompt is None else None
        wanted = (self._image, *(self._references or ()), caption_column, self._mask_name)
        needed = [column for column in wanted if column is not None]
        for column in needed:
            if not any(column in row for _, row in rows):
                raise ValueError(f"{file} has no column {column!r}; it has: {', '.join(rows[0][1])}")
        for number, row in rows:
            try:
                if missing := [column for column in needed if column not in row]:
                    raise ValueError(f"has no column {missing[0]!r}; it has: {', '.join(row)}")
                target = self._picture(file, row, self._image)
                others = [self._inside(file, name) for column in references for name in _names(row.get(column), column)]
                mask = self._picture(file, row, self._mask_name) if self._mask_name and row[self._mask_name] else None
                texts = [self._prompt] if self._prompt is not None else caption_texts(row[self._caption])
                yield Sample(target, tuple(texts), tuple(others), mask=mask)
            except ValueError as error:
                yield Bad(f"{file} line {number}", str(error))

    def _picture(self, file: Path, row: dict[str, Any], column: str) -> Picture:
        names = _names(row.get(column), column)
        if len(names) != 1:
            raise ValueError(f"has {column}={row.get(column)!r}: it must be one file name")
        return self._inside(file, names[0])

    def _inside(self, file: Path, name: str) -> Picture:
        """Return the image that `file` names. Raise ValueError if it is not in the folder of `file`."""
        path = path_inside(file.parent, name)
        return self._pictures.setdefault(path, file_picture(path))


class Pairs(Source):
    """Images before and after an edit: `source/x.png`, `target/x.png`, and the instruction in `target/x.txt`.

    Args:
        target_folder: Folder of the images to learn, including subfolders.
        reference_folders: One folder for each reference, with images of the same names in any format.
        prompt: One instruction for all images, instead of the `.txt` files.
        incomplete: Accept images that a reference folder lacks, without that reference; otherwise they count as bad.
        mask: "alpha", or a folder of images with the same names.
        captions, first_frame, max_bad: As in `Source`.

    Samples are in the order of the targets' names. Raises ValueError for a folder that does not exist, and BadData for
    samples that cannot be used, including references without a target.
    """

    def __init__(
        self,
        path: str | Path,
        target_folder: str = "target",
        reference_folders: Sequence[str] = ("source",),
        prompt: str | None = None,
        incomplete: bool = False,
        mask: str | None = None,
        captions: Captions | None = None,
        first_frame: bool = False,
        max_bad: int = 0,
    ) -> None:
        self.path = existing_folder("path", path)
        super().__init__(str(self.path), captions, mask, first_frame, max_bad, prompt)
        references = check_texts("dataset.reference_folders", reference_folders)
        if not references:
            raise ValueError("dataset.reference_folders is empty. Name a folder, or use dataset=folder")
        target = existing_folder("target_folder", self.path / check_text("dataset.target_folder", target_folder))
        sources = [existing_folder("reference_folders", self.path / name) for name in references]
        masks = None if self._mask_name is None else existing_folder("mask", self.path / self._mask_name)
        check_flag("dataset.incomplete", incomplete)
        self._take(self._found(target, sources, masks, incomplete), f": {target} contains no images")

    def _found(
        self, target: Path, sources: Sequence[Path], masks: Path | None, incomplete: bool
    ) -> Iterator[Sample | Bad]:
        targets = pictures_by_stem(target)
        references_by_stem = [pictures_by_stem(folder) for folder in sources]
        masked = pictures_by_stem(masks) if masks is not None else {}
        for stem, (name, *same) in targets.items():
            partners = [files.get(stem, []) for files in references_by_stem]
            twice = [files for files in ([name, *same], *partners, masked.get(stem, [])) if len(files) > 1]
            lacking = [folder for folder, files in zip(sources, partners, strict=True) if not files]
            text = target / f"{stem}.txt"
            if twice:
                yield Bad(name, f"has several possible pairs, {' and '.join(twice[0])}: remove all but one")
            elif foreign := [file for files in ([name], *partners) for file in files if is_foreign(file)]:
                yield Bad(foreign[0], "has a format that Pillow cannot read: convert it")
            elif lacking and not incomplete:
                yield Bad(name, f"has no image of its name in {lacking[0]} (dataset.incomplete=true allows that)")
            elif masks is not None and stem not in masked:
                yield Bad(name, f"has no mask in {masks}")
            elif self._prompt is None and not text.is_file():
                yield Bad(name, f"has no caption: write {text.name} next to it, or set dataset.prompt for all")
            else:
                mask = file_picture(masked[stem][0]) if masks is not None else None
                references = tuple(file_picture(file) for files in partners for file in files)
                yield _with_caption(Sample(file_picture(name), (), references, mask=mask), self._prompt, text)
        for files in references_by_stem:
            for stem in sorted(files.keys() - targets.keys()):
                yield Bad(files[stem][0], f"has no target of its name in {target}")


def existing_folder(key: str, path: object) -> Path:
    """Return the folder that a setting names. Raise ValueError if there is none."""
    folder = Path(check_text(f"dataset.{key}", path)).expanduser()
    if not folder.is_dir():
        problem = "is not a folder" if folder.exists() else "does not exist"
        raise ValueError(f"dataset.{key}={str(path)!r} {problem}. Give a folder of images")
    return folder


def path_inside(folder: Path, name: str) -> str:
    """Return the path of a file that a dataset names. Raise OutsideFolder if it is not inside the folder."""
    root = os.path.abspath(folder)
    path = os.path.normpath(os.path.join(root, name))
    if not path.startswith(root.rstrip(os.sep) + os.sep):
        raise OutsideFolder(f"names {shorten(name)!r}, which is not in {folder}: files must be inside the folder")
    return os.path.join(folder, os.path.relpath(path, root))


def list_folder(folder: Path) -> tuple[list[str], list[str]]:
    """Return the sorted names of the files (and broken links) and of the subfolders, without hidden ones."""
    with os.scandir(folder) as entries:
        shown = sorted((entry.name, entry.is_dir()) for entry in entries if not entry.name.startswith("."))
    return [name for name, is_dir in shown if not is_dir], [name for name, is_dir in shown if is_dir]


def is_foreign(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in UNREADABLE


def by_stem(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the image files among `names`, by their names without the extension."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        stem, suffix = os.path.splitext(name)
        if suffix.lower() in SUFFIXES | UNREADABLE:
            found[stem].append(name)
    return found


def pictures_by_stem(folder: Path) -> dict[str, list[str]]:
    """Return the paths of the images in a folder and its subfolders, by relative path without the extension."""
    files, folders = list_folder(folder)
    found = {stem: [str(folder / name) for name in names] for stem, names in by_stem(files).items()}
    for name in folders:
        found |= {f"{name}/{stem}": files for stem, files in pictures_by_stem(folder / name).items()}
    return found


def read_text(path: Path) -> str:
    """Return the text of a file. Raise ValueError, naming the file, if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}). Save it as UTF-8") from error


def _with_caption(sample: Sample, prompt: str | None, file: Path) -> Sample | Bad:
    """Return the sample with `prompt`, or else the text of `file`, as its caption; Bad if that cannot be read."""
    try:
        return replace(sample, captions=(read_text(file) if prompt is None else prompt,))
    except (OSError, ValueError) as error:
        return Bad(sample.name, f"has a caption that cannot be read: {error}")


def _jsonl(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, row). Raise ValueError for a line that is not a JSON object."""
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise ValueError(f"{file} line {number} is not JSON ({error}). Each line must be one object") from error
        if not isinstance(row, dict):
            raise ValueError(f"{file} line {number} is {line.strip()[:80]!r}. Each line must be one JSON object")
        yield number, row


def _csv(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, row), with None for missing cells. Raise ValueError for a line with too many cells."""
    reader = csv.DictReader(StringIO(read_text(file), newline=""), restkey="more", strict=True)
    try:
        for row in reader:
            if isinstance(row.get("more"), list):
                raise ValueError(f"{file} line {reader.line_num} has more cells than columns. Quote texts with commas")
            yield reader.line_num, dict(row)
    except csv.Error as error:
        raise ValueError(f"{file} line {reader.line_num} is not CSV ({error})") from error


def _names(value: object, column: str) -> list[str]:
    """Return the file names in a cell: one, a list, a list as JSON, or none. Raise ValueError for anything else."""
    if isinstance(value, str) and value.startswith("["):
        with suppress(json.JSONDecodeError):  # a file may be called "[1].png"
            value = json.loads(value)
    names: list[Any] = [] if value in (None, "") else value if isinstance(value, list) else [value]
    for name in names:
        if not isinstance(name, str) or not name:
            raise ValueError(f"has {column}={shorten(repr(value))}: it must be a file name or a list of file names")
        if any("\ud800" <= character <= "\udfff" for character in name):
            raise ValueError(f"has {column}={shorten(ascii(name))}: it contains a lone surrogate")
    return names
