"""The first rows of a streamed dataset, stored as a local table.

A table lies at `<datasets cache>/flux2-lora/<recipe>/<version>.arrow`: the recipe is the request, the version the
commit on the Hub, or sizes and times of local files. So a later run reads it without downloading, a new commit is
streamed again, and without a network the newest version is used. Files are written atomically, and one of several
processes streams while the others wait.
"""

import hashlib
import json
import logging
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from data.files import atomic_write, user_path
from data.sources.open_table import explain_errors, is_local, open_table, table_files

if TYPE_CHECKING:
    from datasets import Dataset

ROWS_AT_ONCE = 100  # in memory while they are written
log = logging.getLogger(__name__)


def streamed_table(path: str, split: str, revision: str | None, subset: str | None, limit: int | None) -> "Dataset":
    """Return the first `limit` rows (None: all), with encoded images. Raise ValueError, naming `path`, if it fails."""
    import datasets
    from filelock import FileLock

    recipe = json.dumps([path if not is_local(path) else str(user_path(path).resolve()), split, subset, limit])
    key = hashlib.sha256(json.dumps([recipe, revision]).encode()).hexdigest()[:32]
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "flux2-lora" / key
    kept = sorted(folder.glob("*.arrow"), key=lambda file: file.stat().st_mtime)
    version = _version(path, revision)
    if version is None and kept:
        log.warning("the version of %s cannot be requested: using the rows that were streamed before", path)
        return datasets.Dataset.from_file(str(kept[-1]))
    file = folder / f"{version or 'unknown'}.arrow"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not file.exists():
            stream = open_table(path, split, revision, subset, streaming=True)
            with atomic_write(file) as temporary, explain_errors(path, split):
                _write(temporary, path, islice(iter(stream.decode(False)), limit), stream.features)
    return datasets.Dataset.from_file(str(file))


def _version(path: str, revision: str | None) -> str | None:
    """Return an identifier of the content of `path`; None if the Hub cannot be reached or does not have it."""
    if is_local(path):
        files = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in table_files(user_path(path))]
        return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:40]
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    try:
        return HfApi().dataset_info(path, revision=revision).sha
    except (OfflineModeIsEnabled, HTTPError, OSError):
        return None


def _write(file: Path, path: str, rows: Iterator[dict[str, Any]], features: Any) -> None:
    """Write rows as an Arrow stream, a few at a time."""
    schema = None if features is None else features.arrow_schema
    with pa.OSFile(str(file), "wb") as sink:
        writer = None
        while batch := list(islice(rows, ROWS_AT_ONCE)):
            for row in batch:
                if any(isinstance(cell, dict) and _is_elsewhere(cell) for cell in row.values()):
                    raise ValueError(f"{path} refers to separate image files. Remove dataset.streaming")
            table = pa.Table.from_pylist(batch, schema=schema)
            if writer is None:
                schema = table.schema
                writer = pa.ipc.new_stream(sink, schema)
            writer.write_table(table)
        if writer is None:
            raise ValueError("the stream is empty")
        writer.close()


def _is_elsewhere(cell: dict[str, Any]) -> bool:
    return "bytes" in cell and cell["bytes"] is None and "://" in str(cell.get("path"))
