"""Images in folders: with caption files, with a metadata file, or as pairs of before and after.

A folder is listed once, and images are opened by their paths. Files that metadata names must lie in the folder, so that
a downloaded dataset cannot read other files of this machine. Symbolic links are followed: their creator could read the
files that they point to.
"""

import json
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.checks import check_flag, check_text, check_texts
from data.sources.base import REPLACED, UNUSED_COLUMNS, Bad, CaptionPlace, Sample, Source, caption_texts
from data.sources.captions import Captions
from data.sources.images import SUFFIXES, Picture, file_picture, shorten
from data.sources.listing import (
    METADATA,
    MOST_TEXT,
    Listing,
    different,
    existing_folder,
    is_foreign,
    is_image_name,
    list_files,
    path_inside,
    read_csv,
    read_jsonl,
    read_text,
)

REFERENCES = "references"
TRAINED_PARTNERS = (
    "trained, although by their names they belong to other images. If they do, move them out of the folder (masks are "
    "dataset.mask, references dataset=pairs or the column references of metadata.jsonl)"
)
OTHER_FILES = "files that may hold captions: for cat.png cat.txt is read"
REPEATS = re.compile(r"([2-9]|[1-9]\d{1,2})_.+")  # kohya's name of a folder whose images it repeats: 10_cat


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
        prompt, captions, first_frame, max_bad, loss_weight: As in `Source`.

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
        loss_weight: float = 1.0,
    ) -> None:
        self.path = existing_folder("path", path)
        super().__init__(str(self.path), captions, mask, first_frame, max_bad, prompt, loss_weight)
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
        found = self._found(self.path, (os.path.realpath(self.path),))
        self._take(found, f": it contains no images ({endings}){beneath}")
        self._pictures.clear()
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

    def _found(self, folder: Path, above: tuple[str, ...]) -> Iterator[Sample | Bad | CaptionPlace]:
        """Yield the samples of a folder, with `recursive` also those of its subfolders. `above` are real paths."""
        metadata = [folder / name for name in METADATA if (folder / name).exists()]
        if len(metadata) == 2:
            raise ValueError(f"{folder} has both {' and '.join(METADATA)}. Remove one of them")
        if metadata:
            self._has_metadata = True
            yield from self._from_metadata(metadata[0])
            return
        found = list_files(folder)
        yield from self._from_sidecars(folder, found)
        for name in found.folders:
            inside = folder / name
            if inside == self._mask_folder:
                continue
            real = os.path.realpath(inside)
            if self._recursive and real not in above:
                yield from self._found(inside, (*above, real))
            elif not self._recursive and (count := self._count_images(inside)):
                self._note_unused("subfolders with images (dataset.recursive=true)", f"{name} ({count})")

    def _count_images(self, folder: Path) -> int:
        try:
            return sum(map(len, list_files(folder).pictures.values()))
        except OSError as error:
            self._note_unused("folders that cannot be read", str(error))
            return 0

    def _from_sidecars(self, folder: Path, found: Listing) -> Iterator[Sample | Bad | CaptionPlace]:
        masks: dict[str, list[str]] = {}
        if self._mask_folder is not None:
            there = self._mask_folder / folder.relative_to(self.path)
            if folder == self.path:
                existing_folder("mask", there)
            masks = list_files(there, recursive=True).pictures if there.is_dir() else {}
        for stem, files in found.pictures.items():
            mask, texts = masks.get(stem, []), found.texts.get(stem, [])
            for path in files:
                if len(files) > 1 and (self._prompt is None or masks):
                    others = [os.path.basename(other) for other in files if other != path]
                    shared = different(others, os.path.basename(path))
                    yield Bad(path, f"shares its name, and so its caption, with {shared}: rename one of them")
                elif len(mask) > 1:
                    yield Bad(path, f"has several masks, {' and '.join(mask)}: remove all but one")
                elif len(texts) > 1:
                    yield Bad(
                        path,
                        f"has several captions, {different(list(map(os.path.basename, texts)))}: remove all but one",
                    )
                elif is_foreign(path):
                    yield Bad(path, "has a format that Pillow cannot read: convert it")
                elif self._mask_folder is not None and not mask:
                    yield Bad(path, f"has no mask in {self._mask_folder}")
                elif not texts and (partner := found.partner_of(stem, is_certain=self._prompt is not None)):
                    yield Bad(
                        path,
                        f"has no caption and, by its name, belongs to {os.path.basename(partner)}. References are the "
                        "column references of metadata.jsonl, or a folder (dataset=pairs); masks are dataset.mask. "
                        "Rename it if it is an image of its own",
                    )
                else:
                    sample = Sample(file_picture(path), (), mask=file_picture(mask[0]) if mask else None)
                    if self._prompt is None and not texts:
                        yield self._without_caption(sample, f"{stem}.txt or metadata.jsonl")
                        continue
                    if not texts and found.partner_of(stem):
                        self._note(TRAINED_PARTNERS, path)
                    yield self._in_file(_with_caption(sample, self._prompt, texts), *texts)
        self._note_captions(found.texts, found.lone_texts)
        instead = (
            f"{OTHER_FILES}, or {' or '.join(METADATA)}" if self._prompt is None else f"files that may hold {REPLACED}"
        )
        self._note_unused(instead, *found.unread)
        if folder != self.path and found.pictures and REPEATS.fullmatch(folder.name):
            self._note_unused(
                "numbers in names of folders, which kohya's scripts read as repeats. To repeat images, make each "
                "folder a source of dataset=mix and set dataset.repeats",
                str(folder),
            )
        # the masks of subfolders are those of their own images
        lone = (files[0] for stem, files in masks.items() if "/" not in stem and stem not in found.pictures)
        self._note_unused("masks without an image of their name", *lone)

    def _from_metadata(self, file: Path) -> Iterator[Sample | Bad | CaptionPlace]:
        rows = list(read_jsonl(file) if file.suffix == ".jsonl" else read_csv(file))
        if not rows:
            raise ValueError(f"{file} is empty. Write one line for each image")
        self._note_what_is_not_named(file, [row for _, row in rows])
        references = self._references
        if references is None:
            references = (REFERENCES,) * any(REFERENCES in row for _, row in rows)
        caption_column = self._caption if self._prompt is None else None
        if self._prompt is not None:
            self._note_unused(REPLACED, *(f"{file} line {number}" for number, row in rows if row.get(self._caption)))
        wanted = (self._image, *(self._references or ()), caption_column, self._mask_name)
        needed = [column for column in wanted if column is not None]
        if self._places is not None and caption_column is not None:
            needed.remove(caption_column)
        self._folder = file.parent
        for column in needed:
            if not any(column in row for _, row in rows):
                raise ValueError(f"{file} has no column {column!r}; it has: {', '.join(rows[0][1])}")
        rows.reverse()
        while rows:  # each is freed when its sample is made: a million of them take half a gigabyte
            number, row = rows.pop()
            try:
                if missing := [column for column in needed if column not in row]:
                    raise ValueError(f"has no column {missing[0]!r}; it has: {', '.join(row)}")
                target = self._picture(row, self._image)
                others = [self._inside(name) for column in references for name in _names(row.get(column), column)]
                mask = self._picture(row, self._mask_name) if self._mask_name and row[self._mask_name] else None
                is_empty = row.get(self._caption) in (None, "", []) and not (self.allow_empty and self._caption in row)
                at = file, number, row, self._caption
                if self._places is not None and self._prompt is None and is_empty:
                    yield CaptionPlace(Sample(target, (), tuple(others), mask=mask), *at)
                    continue
                texts = (
                    [self._prompt] if self._prompt is not None else caption_texts(row[self._caption], self.allow_empty)
                )
                yield self._in_file(Sample(target, tuple(texts), tuple(others), mask=mask), *at)
            except ValueError as error:
                yield Bad(f"{file} line {number}", str(error))

    def _note_what_is_not_named(self, file: Path, rows: Sequence[dict[str, Any]]) -> None:
        """Note images, captions and metadata below the folder of `file` that it leaves out, and its unused columns."""
        used = {self._image, self._mask_name, *(self._references or (REFERENCES,))}
        names, others = set[str](), dict[str, None]()
        for row in rows:
            for column, cell in row.items():
                texts = _texts(cell)
                names.update(texts)
                if column not in used and column not in others and any(map(is_image_name, texts)):
                    others[column] = None
        self._note_unused(UNUSED_COLUMNS, *others)
        try:
            found = list_files(file.parent, recursive=True)
        except OSError as error:
            self._note_unused("folders that cannot be read", str(error))
            return
        begin = len(f"{file.parent}/")
        unnamed = [path for files in found.pictures.values() for path in files if path[begin:] not in names]
        if unnamed:  # or named in another way, such as ./a.png
            named = {_comparable(file.parent / name) for name in names}
            unnamed = [path for path in unnamed if _comparable(path) not in named]
        self._note_unused(f"images that {file} does not name", *unnamed)
        captions = [path for stem, files in found.texts.items() if stem in found.pictures for path in files]
        self._note_unused(f"captions, because {file} has them" if self._prompt is None else REPLACED, *captions)
        self._note_unused(f"files that may hold captions, because {file} has them", *found.unread)
        metadata = [path for path in found.metadata if path != str(file)]
        self._note_unused(f"metadata of subfolders, because {file} describes them", *metadata)

    def _picture(self, row: dict[str, Any], column: str) -> Picture:
        names = _names(row.get(column), column)
        if len(names) != 1:
            raise ValueError(f"has {column}={row.get(column)!r}: it must be one file name")
        return self._inside(names[0])

    def _inside(self, name: str) -> Picture:
        """Return the image of this name in the folder of the metadata. Raise ValueError if it is not inside."""
        path = path_inside(self._folder, name)
        if (picture := self._pictures.get(path)) is None:
            picture = self._pictures[path] = file_picture(path)
        return picture


class Pairs(Source):
    """Images before and after an edit: `source/x.png`, `target/x.png`, and the instruction in `target/x.txt`.

    Args:
        target_folder: Folder of the images to learn, including subfolders.
        reference_folders: One folder for each reference, with images of the same names in any format.
        prompt: One instruction for all images, instead of the `.txt` files.
        incomplete: Accept images that a reference folder lacks, without that reference; otherwise they count as bad.
        mask: "alpha", or a folder of images with the same names.
        captions, first_frame, max_bad, loss_weight: As in `Source`.

    Samples are in the order of the targets' names. Raises ValueError for a folder that does not exist, and BadData for
    samples that cannot be used, including references without a target.
    """

    _hint = " (dataset.incomplete=true allows that)"

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
        loss_weight: float = 1.0,
    ) -> None:
        self.path = existing_folder("path", path)
        super().__init__(str(self.path), captions, mask, first_frame, max_bad, prompt, loss_weight)
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
    ) -> Iterator[Sample | Bad | CaptionPlace]:
        found = list_files(target, recursive=True)
        targets, texts = found.pictures, found.texts
        references = [list_files(folder, recursive=True) for folder in sources]
        references_by_stem = [files.pictures for files in references]
        masked = list_files(masks, recursive=True).pictures if masks is not None else {}
        for stem, (name, *same) in targets.items():
            partners = [files.get(stem, []) for files in references_by_stem]
            twice = [files for files in ([name, *same], *partners, masked.get(stem, [])) if len(files) > 1]
            lacking = [folder for folder, files in zip(sources, partners, strict=True) if not files]
            if len(texts.get(stem, [])) > 1:
                twice.append(texts[stem])
            if twice:
                yield Bad(name, f"has several possible pairs, {different(twice[0])}: remove all but one")
            elif foreign := [file for files in ([name], *partners) for file in files if is_foreign(file)]:
                yield Bad(foreign[0], "has a format that Pillow cannot read: convert it")
            elif lacking and not incomplete:
                yield Bad(name, f"has no image of its name in {lacking[0]}{self._hint}")
            elif masks is not None and stem not in masked:
                yield Bad(name, f"has no mask in {masks}")
            else:
                mask = file_picture(masked[stem][0]) if masks is not None else None
                originals = tuple(file_picture(file) for files in partners for file in files)
                sample = Sample(file_picture(name), (), originals, mask=mask)
                if self._prompt is None and stem not in texts:
                    yield self._without_caption(sample, f"{stem}.txt next to it")
                else:
                    file = texts.get(stem, [])
                    yield self._in_file(_with_caption(sample, self._prompt, file), *file)
        self._note_captions(found.texts, found.lone_texts)
        texts_of_references = [path for files in references for texts in files.texts.values() for path in texts]
        self._note_unused(f"captions of references: those in {target} count", *texts_of_references)
        listings = [list_files(self.path), found, *references]
        metadata = dict.fromkeys(path for files in listings for path in files.metadata)
        self._note_unused("metadata, which dataset=folder reads, with references in its column references", *metadata)
        unread = dict.fromkeys(path for files in listings for path in files.unread)
        self._note_unused(OTHER_FILES if self._prompt is None else f"files that may hold {REPLACED}", *unread)
        self._note_unused(
            "masks without an image of their name", *(masked[stem][0] for stem in masked.keys() - targets)
        )
        for files in references_by_stem:
            for stem in sorted(files.keys() - targets.keys()):
                yield Bad(files[stem][0], f"has no target of its name in {target}")


def _with_caption(sample: Sample, prompt: str | None, texts: Sequence[str]) -> Sample | Bad:
    """Return the sample with `prompt`, or else the text of the file, as its caption; Bad if that cannot be read."""
    try:
        return replace(sample, captions=(read_text(texts[0], MOST_TEXT) if prompt is None else prompt,))
    except ValueError as error:
        return Bad(sample.name, f"has a caption that cannot be used: {error}")


def _comparable(path: str | Path) -> str:
    return unicodedata.normalize("NFC", os.path.normpath(path))


def _texts(cell: object) -> tuple[str, ...]:
    """Return the strings of a cell of metadata: one, those of a list, or those of a list that is written as JSON."""
    if isinstance(cell, str):
        if not cell.startswith("["):
            return (cell,)
        with suppress(ValueError, RecursionError):
            cell = json.loads(cell)
    return tuple(text for text in (cell if isinstance(cell, list) else [cell]) if isinstance(text, str))


def _names(value: object, column: str) -> list[str]:
    """Return the file names in a cell: one, a list, a list as JSON, or none. Raise ValueError for anything else."""
    if isinstance(value, str) and value.startswith("["):
        with suppress(ValueError, RecursionError):  # a file may be called "[1].png"
            value = json.loads(value)
    names: list[Any] = [] if value in (None, "") else value if isinstance(value, list) else [value]
    for name in names:
        if not isinstance(name, str) or not name:
            raise ValueError(f"has {column}={shorten(repr(value))}: it must be a file name or a list of file names")
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"has {column}={shorten(ascii(name))}: it contains a lone surrogate") from error
    return names
