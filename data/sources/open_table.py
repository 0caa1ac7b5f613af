"""Open a table with the `datasets` library, and turn all its exceptions into one ValueError with a remedy."""

import csv
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from data.files import NO_ROOM, user_path
from data.sources.listing import check_unique

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

HUB_ID = re.compile(r"[A-Za-z0-9_-][\w.-]*(/[\w.-]+)?")
KINDS = {".parquet": "parquet", ".arrow": "arrow", ".json": "json", ".jsonl": "json", ".csv": "csv"}
DESCRIPTIONS = ("metadata.jsonl", "metadata.csv", "dataset_infos.json", "dataset_info.json")  # no tables themselves
# only an empty cell of a CSV is null, and not a caption such as None, NA or nan, as pandas has it
CSV_DEFAULTS: dict[str, Any] = {"sep": ",", "delimiter": None, "names": None, "header": "infer", "skiprows": None}
CSV_TEXTS: dict[str, Any] = {"keep_default_na": False, "na_values": [""]}
ENDINGS = f"{', '.join(KINDS)} file"


def is_local(path: str) -> bool:
    """Return whether `path` is, or can only be, a local file or folder; otherwise it is a Hub id."""
    here = user_path(path).exists()
    return here or HUB_ID.fullmatch(path) is None or Path(path).suffix in KINDS


def open_table(
    path: str, split: str, revision: str | None, subset: str | None, *, streaming: bool = False
) -> "Dataset | IterableDataset":
    """Return one split as a table or as a stream. Raise ValueError, naming `path` and `split`, if it cannot be read.

    A stream cannot be a slice, or a folder of `save_to_disk`.
    """
    import datasets  # a second to import, and folders do not need it

    local = _local(path, revision, subset)
    is_saved = local is not None and _is_saved(local)
    if streaming and "[" in split:
        raise ValueError(f"dataset.split={split!r}: a stream cannot be sliced. Use dataset.limit")
    if streaming and is_saved:
        raise ValueError(f"dataset.path={path!r} was written by save_to_disk. Remove dataset.streaming")
    with explain_errors(path, split):
        if is_saved:
            assert local is not None
            saved = datasets.load_from_disk(str(local))  # a table that was saved alone may have no name of its split
            splits: dict[str, Dataset] = saved if isinstance(saved, dict) else {str(saved.split or "train"): saved}
            if split not in splits:
                raise ValueError(f"no such split. The splits are: {', '.join(splits)}")
            return splits[split]
        place: tuple[str | None, ...] = (path, subset)
        settings: dict[str, Any] = {"revision": revision}
        files, is_csv = [], False
        if local is not None:
            place, settings, files = (str(local),), {}, table_files(local)
            if local.is_file():
                place, settings = (KINDS[local.suffix],), {"data_files": str(local)}
            builder = datasets.load_dataset_builder(*place, **settings)
            is_csv = builder.info.builder_name == "csv"
            if any(getattr(builder.config, key, default) != default for key, default in CSV_DEFAULTS.items()):
                files = []  # the folder's README says how its tables are to be read
        settings |= {"split": split, "streaming": streaming}
        table = datasets.load_dataset(*place, **settings, **(CSV_TEXTS if is_csv else {}))
        if table.info.builder_name == "csv":
            if streaming:  # its columns are not known before all of it is read
                raise ValueError("a CSV cannot be streamed. Remove dataset.streaming")
            others = other_tables(path, split)
            _check_csv([file for file in files if str(file.relative_to(str(local))) not in others], table.column_names)
            if not is_csv:  # on the Hub
                table = datasets.load_dataset(*place, **settings, **CSV_TEXTS)
        return table


def _check_csv(files: Sequence[Path], columns: Sequence[str]) -> None:
    """Raise ValueError for a name twice in a header, or a row with more cells, of which pandas says nothing.

    pandas renames the second column, and takes the first cell of all rows as their index. Without `files`, which are
    local, only the `columns` show it.
    """
    for file in (file for file in files if file.suffix == ".csv"):
        with file.open(encoding="utf-8-sig", errors="replace", newline="") as stream:
            rows = (row for row in csv.reader(stream) if len(row) > 1 or "".join(row).strip())
            try:
                header, first = next(rows, []), next(rows, [])
                check_unique("column", [name for name in header if name])
            except csv.Error:  # pandas has a message for it
                continue
            except ValueError as error:
                raise ValueError(f"{file} {error}") from None
        if len(first) > len(header):
            raise ValueError(
                f"{file} has {len(header)} columns, and {len(first)} cells in its first row: quote texts with commas, "
                "and name all columns"
            )
    if files:
        return
    if any(name.startswith("__index_level_") for name in columns):
        raise ValueError("its rows have more cells than its header: correct a local copy")
    if twice := [name for name in columns if f"{name}.1" in columns]:
        raise ValueError(f"its header has the column {twice[0]!r} twice: correct a local copy")


def table_files(local: Path) -> list[Path]:
    """Return the sorted files of a local table."""
    files = [local] if local.is_file() else sorted(local.rglob("*"))
    return [file for file in files if file.suffix in KINDS and file.name not in DESCRIPTIONS and file.is_file()]


def other_tables(path: str, split: str) -> list[str]:
    """Return the tables in a local folder that are not read for `split`, because of their names.

    The library sorts files into splits by words in their names, of one type alone: `train_stations.parquet` is a table
    of the split train, and then `dogs.parquet` belongs to none.
    """
    import datasets

    local = user_path(path)
    if not is_local(path) or not local.is_dir() or _is_saved(local):
        return []
    files = datasets.load_dataset_builder(str(local)).config.data_files or {}
    read = {os.path.realpath(file) for file in files.get(split.partition("[")[0], [])}
    return [str(file.relative_to(local)) for file in table_files(local) if os.path.realpath(file) not in read]


def _local(path: str, revision: str | None, subset: str | None) -> Path | None:
    """Return the local path, None for a Hub id. Raise ValueError if it does not exist or is not a table."""
    if not is_local(path):
        return None
    local = user_path(path)
    if not local.exists():
        raise ValueError(f"dataset.path={path!r} does not exist. Give a {ENDINGS}, a folder of them, or a Hub id")
    if revision or subset:
        raise ValueError(f"dataset.revision={revision!r}, subset={subset!r} are for a Hub id, and {path!r} is local")
    if not _is_saved(local) and not table_files(local):
        raise ValueError(
            f"dataset.path={path!r} is not a {ENDINGS}, a folder of them, or a folder written by save_to_disk. "
            "For images with .txt captions or metadata use dataset=folder, for tar shards dataset=webdataset"
        )
    return local


def _is_saved(local: Path) -> bool:
    """Return whether `save_to_disk` wrote this folder."""
    return any((local / name).is_file() for name in ("dataset_dict.json", "state.json"))


@contextmanager
def explain_errors(path: str, split: str) -> Iterator[None]:
    """Context manager that turns exceptions of `datasets` and the Hub into one ValueError."""
    from datasets.exceptions import DatasetNotFoundError, DatasetsError
    from huggingface_hub.errors import HTTPError, RepositoryNotFoundError, RevisionNotFoundError

    instead = "a local copy works too: dataset.path=/path/to/file.parquet, or a folder of parquet files"
    try:
        yield
    except (DatasetNotFoundError, RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise ValueError(
            f"dataset.path={path!r}: {error} Check the spelling; if it is private or gated, accept its license at "
            f"https://huggingface.co/datasets/{path} and run `hf auth login`; {instead}"
        ) from error
    except (ConnectionError, TimeoutError, HTTPError) as error:
        raise ValueError(f"dataset.path={path!r} could not be reached on the Hub ({error}); {instead}") from error
    except StopIteration as error:  # raised by the library if the first file has no rows
        raise ValueError(f"dataset.path={path!r}, split={split!r} cannot be read: it has no rows") from error
    except (DatasetsError, OSError, ValueError, RuntimeError, pa.ArrowException) as error:
        if isinstance(error, OSError) and error.errno in NO_ROOM:
            raise
        cause = error.__cause__ or error
        raise ValueError(f"dataset.path={path!r}, split={split!r} cannot be read: {cause}") from error
