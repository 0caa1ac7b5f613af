"""Tables of images and captions, read by the `datasets` library from the Hugging Face Hub or local files.

Tables are read as raw Arrow cells rather than by `cast_column(..., Image(decode=False))`: casting a list of images, or
plain bytes, makes `datasets` write a second copy of the whole table to its cache. A cell is memory-mapped and costs
nothing until it is read, and an image header costs its first pages.

Training needs random access to images in every pass, which a stream does not offer. So with streaming the first `limit`
rows are read once, still encoded, into a local table in the cache folder of `datasets` (data/sources/streaming.py).
That makes it possible to train on a part of a dataset that is too large to download.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, cast

import pyarrow as pa

from data.checks import check_flag, check_int, check_text, check_texts
from data.files import open_regular, user_path
from data.sources.base import REPLACED, UNUSED_COLUMNS, Bad, Sample, Source, caption_texts
from data.sources.captions import Captions
from data.sources.folders import REFERENCES
from data.sources.images import SUFFIXES, BadPicture, Picture, shorten
from data.sources.listing import OutsideFolder, existing_folder, path_inside
from data.sources.mapped_files import MappedFiles
from data.sources.open_table import is_local, open_table, other_tables
from data.sources.pixels import is_image
from data.sources.streaming import streamed_table

if TYPE_CHECKING:
    from datasets import Dataset


class HuggingFace(Source):
    """A table from the Hub, from .parquet, .arrow, .json, .jsonl or .csv files, or from `save_to_disk`.

    Args:
        path: Hub id ("user/name"), or path of a local file or folder. A path that starts with "/", "." or "~", or has
            one of these extensions, is always local.
        split: Name of the split; without streaming also a slice, "train[:100]".
        image_column: Column of images, encoded bytes, or paths of files in `picture_folder`.
        caption_column: Column of texts or lists of texts.
        reference_columns: Columns like `image_column`, or of lists; null is no reference. By default the column
            `references`, if there is one.
        revision, subset: Commit or branch, and configuration name; only for a Hub id.
        streaming: Download only what `limit` rows need. Later runs read the stored rows.
        limit: Number of rows to use, from the first; null is all.
        picture_folder: Base folder of paths; by default the folder of a local table. Paths must not leave it.
        mask: "alpha", or a column like `image_column`; null is no mask.
        prompt, captions, first_frame, max_bad, loss_weight: As in `Source`.

    Raises ValueError if the table, split or column does not exist, naming those that do, and BadData for rows that
    cannot be used.
    """

    def __init__(
        self,
        path: str | Path,
        split: str = "train",
        image_column: str = "image",
        caption_column: str = "caption",
        reference_columns: Sequence[str] | None = None,
        revision: str | None = None,
        subset: str | None = None,
        streaming: bool = False,
        limit: int | None = None,
        picture_folder: str | None = None,
        prompt: str | None = None,
        mask: str | None = None,
        captions: Captions | None = None,
        first_frame: bool = False,
        max_bad: int = 0,
        loss_weight: float = 1.0,
    ) -> None:
        self.path = check_text("dataset.path", path)
        super().__init__(self.path, captions, mask, first_frame, max_bad, prompt, loss_weight)
        for key, value in (("revision", revision), ("subset", subset)):
            if value is not None:
                check_text(f"dataset.{key}", value)
        check_flag("dataset.streaming", streaming)
        if limit is not None:
            check_int("dataset.limit", limit, 1)
        self._image = check_text("dataset.image_column", image_column)
        self._caption = check_text("dataset.caption_column", caption_column)
        given = None if reference_columns is None else check_texts("dataset.reference_columns", reference_columns)
        where = self.path, check_text("dataset.split", split), revision, subset
        table = streamed_table(*where, limit) if streaming else open_table(*where)
        columns = table.features.arrow_schema
        self._references = given if given is not None else (REFERENCES,) * (REFERENCES in columns.names)
        self._pictured = [self._image, *self._references, *([self._mask_name] if self._mask_name else [])]
        self._check_columns(columns)
        self._roots = self._picture_roots(picture_folder, columns)
        if limit is not None:
            table = table.select(range(min(limit, len(table))))
        if not len(table):
            raise ValueError(f"dataset.split={split!r} of {self.path} is empty")
        unused = [name for name in columns.names if name not in self._pictured and _has_images(table, name)]
        self._note_unused(UNUSED_COLUMNS, *unused)
        if self._prompt is not None and self._caption in columns.names:
            self._note_unused(REPLACED, f"column {self._caption} of {len(table)} rows")
        self._note_unused(
            f"tables that by their names are not of dataset.split={split}", *other_tables(self.path, split)
        )
        self._tables = {column: table.select_columns([column]).with_format("arrow") for column in self._pictured}
        self._mapped = MappedFiles(table.data.column(column) for column in self._pictured)
        self._take(self._found(table))

    def _found(self, table: "Dataset") -> Iterator[Sample | Bad]:
        captions = [self._prompt] * len(table) if self._prompt is not None else table[self._caption]
        for index, caption in enumerate(captions):
            name = f"row {index} of {self.path}"
            texts = caption if isinstance(caption, list) else [caption]
            if not self.allow_empty and (not texts or None in texts):
                yield Bad(name, f"has no caption in {self._caption!r}: null (dataset.captions.allow_empty allows that)")
                continue
            texts = caption_texts(caption, self.allow_empty)
            references = [picture for column in self._references for picture in self._pictures(index, column)]
            masks = self._pictures(index, self._mask_name) if self._mask_name else []
            target, mask = self._picture(index, self._image), masks[0] if masks else None
            yield Sample(target, tuple(texts), tuple(references), mask=mask)

    def _cell(self, index: int, column: str, item: int | None = None) -> pa.Scalar:
        """Return the encoded Arrow cell of a row, or one item of a list."""
        cell = self._tables[column][index].column(0)[0]
        return cell if item is None else cell[item]

    def _pictures(self, index: int, column: str) -> list[Picture]:
        """Return the images of a cell: none for null, one, or those of a list."""
        cell = self._cell(index, column)
        if not cell.is_valid:
            return []
        if _is_list(cell.type):
            return [self._picture(index, column, item) for item in range(len(cell))]
        return [self._picture(index, column)]

    def _picture(self, index: int, column: str, item: int | None = None) -> Picture:
        name = f"row {index} of {self.path}, column {column}" + ("" if item is None else f"[{item}]")
        return Picture(name, CellOpener(self, name, index, column, item))

    def place(self, index: int, column: str, item: int | None) -> tuple[str, str] | None:
        """Return the file that the bytes of an image are in, and the part of it; None for a path and a copy."""
        cells = self._tables[column][index].column(0).chunk(0)
        cells = cells if item is None else cells.flatten().slice(item, 1)
        if pa.types.is_struct(cells.type):
            cells = cells.field("bytes")
        return self._mapped.place(cells)

    def open(self, name: str, index: int, column: str, item: int | None) -> BinaryIO:
        """Return a stream of an encoded image. Raise BadPicture, with `name`, if there is none."""
        cell = self._cell(index, column, item)
        roots = self._roots
        if cell.is_valid and pa.types.is_struct(cell.type):  # bytes and path, one of which may be null
            import datasets
            from huggingface_hub import constants

            cell = cell["path"] if not cell["bytes"].is_valid else cell["bytes"]
            # files that `datasets` downloaded
            roots = [*roots, Path(datasets.config.HF_DATASETS_CACHE), Path(constants.HF_HUB_CACHE)]
        if not cell.is_valid:
            raise BadPicture(name, "is null")
        if not _is_text(cell.type):  # not copied: a header needs the first pages
            return cast(BinaryIO, pa.BufferReader(cell.as_buffer())) if len(cell.as_buffer()) else BytesIO()
        path = shorten(repr(cell.as_py()))
        for root in roots:
            try:
                return open_regular(path_inside(root, cell.as_py()))
            except OutsideFolder:
                continue
            except FileNotFoundError as error:
                hint = ", with / between folders" if "\\" in path else ""
                reason = f"is {path}, which does not exist in {root}: correct it{hint}, or set dataset.picture_folder"
                raise BadPicture(name, reason) from error
        raise BadPicture(name, f"is {path}, which is not in {roots[0]}: set dataset.picture_folder to its base folder")

    def _picture_roots(self, folder: str | None, columns: pa.Schema) -> list[Path]:
        """Return the base folders of paths in cells. Raise ValueError for paths without a folder, or the reverse."""
        kinds = {column: _item(columns.field(column).type) for column in self._pictured}
        paths = [column for column, kind in kinds.items() if _is_text(kind)]
        if folder is not None:
            if not any(map(_may_be_path, kinds.values())):
                raise ValueError(f"dataset.picture_folder={folder!r} has no effect: {self.path} contains no paths")
            return [existing_folder("picture_folder", folder)]
        if is_local(self.path):
            table = user_path(self.path)
            return [table if table.is_dir() else table.parent]
        if paths:
            raise ValueError(
                f"column {paths[0]!r} of {self.path} contains paths. Set dataset.picture_folder to their base folder"
            )
        return []

    def _check_columns(self, columns: pa.Schema) -> None:
        """Raise ValueError for a column that does not exist or has the wrong type."""
        asked = [("image_column", self._image)]
        asked += [("caption_column", self._caption)] if self._prompt is None else []
        asked += [("reference_columns", column) for column in self._references]
        asked += [("mask", self._mask_name)] if self._mask_name else []
        for key, column in asked:
            if column not in columns.names:
                has = ", ".join(columns.names)
                raise ValueError(f"dataset.{key}={column!r} is not a column of {self.path}. Its columns are: {has}")
            kind = columns.field(column).type
            item = _item(kind) if key in ("reference_columns", "caption_column") else kind
            empty = key == "reference_columns" and pa.types.is_null(item)  # no row has any
            is_bytes = pa.types.is_binary(item) or pa.types.is_large_binary(item)
            if not (empty or (_is_text(item) if key == "caption_column" else is_bytes or _may_be_path(item))):
                wanted = "text" if key == "caption_column" else "images, encoded bytes, or paths"
                raise ValueError(f"dataset.{key}={column!r} of {self.path} contains {kind}: it must contain {wanted}")


@dataclass(frozen=True, slots=True)
class CellOpener:
    """Function that opens the image in a cell of a table."""

    source: HuggingFace
    name: str
    index: int
    column: str
    item: int | None

    @property
    def place(self) -> tuple[str, str] | None:
        """The file and the part of it that is read, for `data.cache.image_digests`; None where that is not certain."""
        return self.source.place(self.index, self.column, self.item)

    def __call__(self) -> BinaryIO:
        return self.source.open(self.name, self.index, self.column, self.item)


def _has_images(table: "Dataset", column: str) -> bool:
    """Return whether a column holds images or paths of images, by its type and its first cell."""
    cell = table.select_columns([column]).with_format("arrow")[0].column(0)[0]
    if _is_list(cell.type) and cell.is_valid and len(cell):
        cell = cell[0]
    if pa.types.is_struct(cell.type):
        return _may_be_path(cell.type)
    if not cell.is_valid:
        return False
    if _is_text(cell.type):
        return Path(cell.as_py()).suffix.lower() in SUFFIXES
    return (pa.types.is_binary(cell.type) or pa.types.is_large_binary(cell.type)) and is_image(BytesIO(cell.as_py()))


def _item(kind: pa.DataType) -> pa.DataType:
    """Return the type of the items of a list type, and any other type as it is."""
    return kind.value_type if _is_list(kind) else kind


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _may_be_path(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):  # an image in the storage of `datasets`
        return {"bytes", "path"} <= {kind.field(i).name for i in range(kind.num_fields)}
    return _is_text(kind)
