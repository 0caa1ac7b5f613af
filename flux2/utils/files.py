"""Files and folders that are complete or absent: written under a temporary name, flushed to the disk and renamed."""

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import xxhash


def temporary_path(path: Path) -> Path:
    """Return a new name in the folder of `path` for what is not complete yet."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")


def remove_unfinished(path: Path) -> None:
    """Delete what processes that were killed while writing the file `path` left behind."""
    for file in path.parent.glob(f".{path.name}.*.part"):
        file.unlink()


def checksum(file: Path, *, flush: bool = False) -> str:
    """Return the checksum (XXH3) of a file; with `flush` the file is on the disk afterwards."""
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, xxhash.xxh3_128)
        if flush:
            os.fsync(opened.fileno())
    return digest.hexdigest()


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Context manager that yields a temporary path for a file or folder, then flushes and renames it to `path`.

    After an exception the temporary one is deleted, and `path` is as it was. The folder of `path` must exist.
    """
    temporary = temporary_path(path)
    try:
        yield temporary
        for file in filter(Path.is_file, [temporary, *temporary.rglob("*")]):
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
        if path.is_dir():
            old = path.rename(temporary_path(path))
            try:
                temporary.rename(path)
            except BaseException:
                old.rename(path)
                raise
            _delete(old)
        else:
            temporary.replace(path)
    finally:
        _delete(temporary)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
