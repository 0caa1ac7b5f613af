"""Sources of training samples: a folder, or a table read by the `datasets` library, as a sequence of `Sample`.

A source lists its samples when it is constructed and checks everything that needs no decoding (arguments, columns,
missing files), so that a mistake costs a second and not an hour. Pictures stay closed until `Picture.load`: planning
ten thousand of them reads headers and hashes, never pixels.

Tables are read as raw Arrow cells rather than by `cast_column(..., Image(decode=False))`: casting a list of pictures,
or plain bytes, makes `datasets` write a second copy of the whole table to its cache. A cell is memory-mapped and costs
nothing until read.

Hydra makes the sources (`_target_: data.samples.Folder`), and passes a mistyped value through without a word:
constructors check.
"""

import json
import logging
import re
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, overload

import pyarrow as pa

from data.pictures import SUFFIXES, UNREADABLE, Picture, file_picture, shortened

if TYPE_CHECKING:
    from datasets import Dataset

log = logging.getLogger(__name__)
HUB_ID = re.compile(r"[A-Za-z0-9_-][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True)
class Sample:
    """One example: the picture to learn and the pictures it is an edit of.

    Attributes:
        target: the picture to learn.
        captions: at least one, stripped, may be empty; with several, which one is trained is drawn each time.
        references: the pictures that the target is an edit of, in the order that the caption counts them.
        weight: how often it is trained relative to others; 3.0 is three times in every pass over the data.
        mask: where the target counts, white wholly and black not at all, as large as the target; None: everywhere.
    """

    target: Picture
    captions: tuple[str, ...]
    references: tuple[Picture, ...] = ()
    weight: float = 1.0
    mask: Picture | None = None

    @property
    def name(self) -> str:
        return self.target.name

    @property
    def caption(self) -> str:
        """The first of its captions."""
        return self.captions[0]


class Source(Sequence[Sample]):
    """A fixed, ordered list of samples. Subclasses give `__len__` and `_sample`."""

    @abstractmethod
    def _sample(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Sample, ...]: ...
    def __getitem__(self, index: int | slice) -> Sample | tuple[Sample, ...]:
        chosen = range(len(self))[index]  # negative indices, slices and IndexError as for any sequence
        return self._sample(chosen) if isinstance(chosen, int) else tuple(self._sample(i) for i in chosen)


class Folder(Source):
    """A folder of pictures with a `metadata.jsonl`, or without it each picture beside a `.txt` of the same stem.

    Args:
        path: the folder. Pictures in its subfolders count only if metadata.jsonl names them.
        caption_column, image_column: columns of metadata.jsonl; file names in it are relative to the folder.
        reference_columns: columns of metadata.jsonl that hold a file name, a list of file names, or null.

    Order: that of the lines of metadata.jsonl, or else of the file names.
    Raises ValueError for anything missing, naming it: the folder, pictures, captions, columns, or a bad line.
    """

    def __init__(
        self,
        path: str | Path,
        caption_column: str = "text",
        image_column: str = "file_name",
        reference_columns: Sequence[str] = (),
    ) -> None:
        self.path = Path(_text("path", path)).expanduser()
        caption_column, image_column = _text("caption_column", caption_column), _text("image_column", image_column)
        references = _columns("reference_columns", reference_columns)
        if not self.path.is_dir():
            problem = "is not a folder" if self.path.exists() else "does not exist"
            raise ValueError(f"dataset.path={str(path)!r} {problem}: give a folder of pictures")
        metadata = self.path / "metadata.jsonl"
        if metadata.exists():
            self._samples = self._from_metadata(metadata, image_column, caption_column, references)
        elif (caption_column, image_column, references) != ("text", "file_name", ()):
            raise ValueError(
                f"{metadata} does not exist, so caption_column={caption_column!r}, image_column={image_column!r} and "
                f"reference_columns={list(references)} name nothing: write that file, or leave the columns out"
            )
        else:
            self._samples = self._from_sidecars()

    def __len__(self) -> int:
        return len(self._samples)

    def _sample(self, index: int) -> Sample:
        return self._samples[index]

    def _from_sidecars(self) -> list[Sample]:
        files = sorted(file for file in self.path.iterdir() if file.is_file() and not file.name.startswith("."))
        if foreign := [file.name for file in files if file.suffix.lower() in UNREADABLE]:
            raise ValueError(f"{self.path} holds formats that Pillow cannot read, convert them: {_some(foreign)}")
        pictures = [file for file in files if file.suffix.lower() in SUFFIXES]
        if not pictures:
            raise ValueError(f"dataset.path={str(self.path)!r} holds no pictures ({', '.join(sorted(SUFFIXES))})")
        links = [file for file in self.path.iterdir() if file.is_symlink() and not file.name.startswith(".")]
        broken = sorted(f.name for f in links if f.suffix.lower() in SUFFIXES | {".txt"} and not f.exists())
        if broken:
            raise ValueError(f"{self.path} has links to files that do not exist, mend or remove them: {_some(broken)}")
        stems = Counter(file.stem for file in pictures)
        if shared := [file.name for file in pictures if stems[file.stem] > 1]:
            log.warning("%s: %d pictures share their caption with another: %s", self.path, len(shared), _some(shared))
        if silent := [file.name for file in pictures if not file.with_suffix(".txt").is_file()]:
            raise ValueError(
                f"{self.path}: no caption for {_some(silent)}: write a .txt of the same name beside each "
                "(it may be empty), or a metadata.jsonl for all"
            )
        return [Sample(file_picture(file), (_read_text(file.with_suffix(".txt")).strip(),)) for file in pictures]

    def _from_metadata(self, file: Path, image: str, caption: str, references: tuple[str, ...]) -> list[Sample]:
        samples, missing = [], []
        for number, line in enumerate(_read_text(file).split("\n"), start=1):
            if not line.strip():
                continue
            where = f"{file} line {number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where} is not JSON ({error}): each line is one object") from error
            if not isinstance(row, dict):
                raise ValueError(f"{where} is {line.strip()[:80]!r}: each line is one JSON object")
            for column in (image, caption, *references):
                if column not in row:
                    raise ValueError(f"{where} has no column {column!r}; it has: {', '.join(row)}")
            names = [row[image]]
            for column in references:
                value = row[column]
                names += [] if value is None else value if isinstance(value, list) else [value]
            for value in (row[caption], *names):
                if not isinstance(value, str):
                    raise ValueError(f"{where} holds {value!r}: captions and file names are text")
                if any("\ud800" <= character <= "\udfff" for character in value):
                    raise ValueError(f"{where} holds {shortened(ascii(value))}: half of a character (a lone surrogate)")
            if "" in names:
                raise ValueError(f"{where} has an empty file name: name a picture, or for no reference write null")
            paths = [self.path / name for name in names]
            missing += [name for name, path in zip(names, paths, strict=True) if not _is_file(path)]
            target, *others = map(file_picture, paths)
            samples.append(Sample(target, (row[caption].strip(),), tuple(others)))
        twice = [name for name, times in Counter(sample.name for sample in samples).items() if times > 1]
        if twice and not missing:
            log.warning("%s names %d pictures on several lines: %s", file, len(twice), _some(twice))
        if missing:
            raise ValueError(f"{file} names files that do not exist in {self.path}: {_some(missing)}")
        if not samples:
            raise ValueError(f"{file} is empty: write one JSON object a line")
        return samples


class HuggingFace(Source):
    """A table of pictures and captions: on the Hub, a .parquet file, a folder of such, or made by `save_to_disk`.

    Args:
        path: Hub id ("user/name") or local path. What starts with "/", "." or "~", or ends with ".parquet", is always
            local.
        split: which split; for the Hub and parquet also a slice, "train[:100]".
        image_column: pictures, encoded bytes, or paths.
        caption_column: text.
        reference_columns: columns like `image_column`, or lists of such; a null is no reference.
        revision, subset: a commit or branch, and a configuration name; only for a Hub id.

    Raises ValueError, naming what was asked for and what there is, if the table, split or column cannot be had.
    """

    def __init__(
        self,
        path: str | Path,
        split: str = "train",
        image_column: str = "image",
        caption_column: str = "caption",
        reference_columns: Sequence[str] = (),
        revision: str | None = None,
        subset: str | None = None,
    ) -> None:
        self.path = _text("path", path)
        for key, value in (("revision", revision), ("subset", subset)):
            if value is not None:
                _text(key, value)
        self._image = _text("image_column", image_column)
        self._references = _columns("reference_columns", reference_columns)
        table = _open_table(self.path, _text("split", split), revision, subset)
        columns = table.features.arrow_schema
        _check_column("caption_column", _text("caption_column", caption_column), columns, self.path)
        _check_column("image_column", self._image, columns, self.path)
        for column in self._references:
            _check_column("reference_columns", column, columns, self.path)
        if not len(table):
            raise ValueError(f"split {split!r} of {self.path} is empty")
        self._captions: list[str | None] = list(table[caption_column])
        if None in self._captions:
            row = self._captions.index(None)
            raise ValueError(f"row {row} of {self.path} has no {caption_column!r}: give a text, which may be empty")
        self._tables = {c: table.select_columns([c]).with_format("arrow") for c in (self._image, *self._references)}

    def __len__(self) -> int:
        return len(self._captions)

    def _sample(self, index: int) -> Sample:
        caption = self._captions[index]
        assert caption is not None
        references: list[Picture] = []
        for column in self._references:
            cell = self._cell(index, column)
            if _is_list(cell.type):
                references += [self._picture(index, column, item) for item in range(len(cell) if cell.is_valid else 0)]
            elif cell.is_valid:
                references.append(self._picture(index, column))
        return Sample(self._picture(index, self._image), (caption.strip(),), tuple(references))

    def _cell(self, index: int, column: str, item: int | None = None) -> pa.Scalar:
        """The Arrow cell of a row, undecoded; `item` picks one of a list."""
        cell = self._tables[column][index].column(0)[0]
        return cell if item is None else cell[item]

    def _picture(self, index: int, column: str, item: int | None = None) -> Picture:
        name = f"row {index} of {self.path}, column {column}" + ("" if item is None else f"[{item}]")
        return Picture(name, partial(self._open, index, column, item))

    def _open(self, index: int, column: str, item: int | None) -> BinaryIO:
        value = self._cell(index, column, item).as_py()
        if isinstance(value, dict):  # of bytes and path, one may be null
            value = value["path"] if value.get("bytes") is None else value["bytes"]
        if value is None:
            raise ValueError("the cell is null")
        return BytesIO(value) if isinstance(value, bytes) else Path(value).open("rb")


def _open_table(path: str, split: str, revision: str | None, subset: str | None) -> "Dataset":
    """Opens one split, from wherever `path` points; every failure becomes one ValueError with a remedy."""
    import datasets  # a second to import, and folders do not need it
    from datasets.exceptions import DatasetNotFoundError, DatasetsError
    from huggingface_hub.errors import HTTPError, RepositoryNotFoundError, RevisionNotFoundError

    local = Path(path).expanduser()
    on_hub = not local.exists() and HUB_ID.fullmatch(path) is not None and not path.endswith(".parquet")
    instead = "a local copy works too: dataset.path=/path/to/file.parquet, or a folder of parquet files"
    if not on_hub and not local.exists():
        raise ValueError(f"dataset.path={path!r} does not exist: give a .parquet file, a folder of such, or a Hub id")
    if not on_hub and (revision or subset):
        raise ValueError(f"dataset.revision={revision!r}, subset={subset!r} are for a Hub id, and {path!r} is local")
    try:
        if on_hub:
            return datasets.load_dataset(path, subset, split=split, revision=revision)
        if local.suffix == ".parquet" and local.is_file():
            return datasets.load_dataset("parquet", data_files=str(local), split=split)
        if any((local / name).is_file() for name in ("dataset_dict.json", "state.json")):
            return _saved_split(datasets.load_from_disk(str(local)), split)
        if local.is_dir() and any(local.rglob("*.parquet")):
            return datasets.load_dataset(str(local), split=split)
    except (DatasetNotFoundError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ValueError(
            f"dataset.path={path!r}: {error} Check the spelling; if it is private or gated, accept its licence at "
            f"https://huggingface.co/datasets/{path} and run `hf auth login`; {instead}"
        ) from error
    except (ConnectionError, TimeoutError, HTTPError) as error:
        raise ValueError(f"dataset.path={path!r} could not be reached on the Hub ({error}); {instead}") from error
    except (DatasetsError, OSError, ValueError, RuntimeError, pa.ArrowException) as error:
        raise ValueError(
            f"dataset.path={path!r}, split={split!r} cannot be read: {error.__cause__ or error}"
        ) from error
    raise ValueError(
        f"dataset.path={path!r} is neither a .parquet file, a folder that holds some, nor one made by save_to_disk; "
        "for pictures with .txt captions or metadata.jsonl use data.samples.Folder (dataset=folder)"
    )


def _saved_split(saved: "Dataset | dict[str, Dataset]", split: str) -> "Dataset":
    """Picks a split of what save_to_disk wrote; a table saved alone without a split's name counts as "train"."""
    splits: dict[str, Dataset] = saved if isinstance(saved, dict) else {str(saved.split or "train"): saved}
    if split not in splits:
        raise ValueError(f"no such split; it has: {', '.join(splits)}")
    return splits[split]


def _check_column(key: str, column: str, columns: pa.Schema, path: str) -> None:
    """ValueError unless the table has the column and it holds what `key` needs; lists only for reference_columns."""
    if column not in columns.names:
        raise ValueError(f"dataset.{key}={column!r} is not a column of {path}; it has: {', '.join(columns.names)}")
    kind = columns.field(column).type
    item = kind.value_type if key == "reference_columns" and _is_list(kind) else kind
    if key == "caption_column":
        fits, wanted = _is_text(item), "text"
    else:
        fits, wanted = _is_picture(item), "pictures, encoded bytes, or paths"
    if not fits:
        raise ValueError(f"dataset.{key}={column!r} of {path} holds {kind}: {wanted} expected")


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _is_picture(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):  # how `datasets` stores a picture
        return {"bytes", "path"} <= {kind.field(i).name for i in range(kind.num_fields)}
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or _is_text(kind)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long for the file system
        return False


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): save it as UTF-8") from error


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(shortened, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _text(key: str, value: object) -> str:
    if not isinstance(value, str | Path) or not str(value):
        raise ValueError(f"dataset.{key}={value!r} is {type(value).__name__}: a text that is not empty was expected")
    return str(value)


def _columns(key: str, value: object) -> tuple[str, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ValueError(f"dataset.{key}={value!r} is {type(value).__name__}: a list of column names was expected")
    return tuple(_text(key, column) for column in value)
