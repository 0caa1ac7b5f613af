"""Paths that a user gives; files and folders that are complete or absent.

These are written under a temporary name, flushed to the disk and renamed.
"""

import errno
import glob
import hashlib
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import xxhash
from safetensors import SafetensorError

UNFINISHED = re.compile(r"\..*\.([0-9a-f]{4})-(\d{1,9})-[0-9a-f]{4}\.part", re.DOTALL)  # of `temporary_path`
MOVE_SECONDS = 3.0
_CLEANED: set[str] = set()  # folders from which this process removed what killed processes left


# what to do about errors of writing
REMEDIES = {
    errno.EFBIG: "Raise the limit on file sizes (ulimit -f)",
    errno.EDQUOT: "Make room there, or raise the quota",
}


class NotWritten(OSError):  # noqa: N818
    """A file could not be written, for example because the disk is full; `filename` and the message name it."""

    def __str__(self) -> str:
        remedy = REMEDIES.get(self.errno or 0, "Make room there, or choose another place")
        return f"{self.filename} cannot be written ({self.strerror}). {remedy}."


@contextmanager
def name_write_errors(path: Path, temporary: Path | None = None) -> Iterator[None]:
    """Context manager in which errors of writing the file `path` that name no file become `NotWritten`.

    These are Python's, safetensors' and PyTorch's for a full disk, a quota or a limit on file sizes. An error that
    names the `temporary` path under which `path` is written, or a file in it, names `path` instead.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # PyTorch raises RuntimeError from an OSError; the context of the others is what was handled before
        cause = error.__context__ if isinstance(error, RuntimeError) else error
        if isinstance(cause, OSError) and cause.filename is not None:
            if temporary is not None:
                cause.filename = re.sub(f"^{re.escape(str(temporary))}", lambda _: str(path), str(cause.filename))
            raise
        if isinstance(cause, OSError):
            code = cause.errno
        else:
            found = re.search(r"\(os error (\d+)\)", str(error))  # of safetensors
            code = int(found[1]) if found else None
        if code is None:
            raise
        raise NotWritten(code, os.strerror(code), str(path)) from error


def write_text(path: Path, text: str) -> None:
    """Write `text` to a file, the same bytes on every system; an error names it."""
    with name_write_errors(path):
        path.write_text(text, encoding="utf-8", newline="\n")


def user_path(path: str | os.PathLike[str]) -> Path:
    """Return a path that a user gave, with `~` and `~name` expanded as a shell does."""
    return Path(os.path.expanduser(path))  # Path.expanduser raises for an unknown name


def check_new(path: Path, option: str, *, overwrite: bool) -> None:
    """Raise ValueError if the file that `option` names exists and must not be replaced."""
    if not overwrite and os.path.lexists(path):
        raise ValueError(f"{option} {path} exists: give another {option}, or --overwrite to replace it")


def temporary_path(path: Path) -> Path:
    """Return a new name in the folder of `path` for what is not complete yet; it tells the host and the process."""
    return path.with_name(f".{path.name}.{host()}-{os.getpid()}-{uuid.uuid4().hex[:4]}.part")


def host() -> str:
    """Return a short digest of this machine's name."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:4]


def remove_unfinished(path: Path) -> None:
    """Delete what processes that were killed while writing the file `path` left behind. No other may be writing it."""
    for file in path.parent.glob(f".{glob.escape(path.name)}.*.part"):
        file.unlink()


def checksum(file: Path, *, flush: bool = False) -> str:
    """Return the checksum (XXH3) of a file; with `flush` the file is on the disk afterwards."""
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, xxhash.xxh3_128)
    if flush:
        _flush(file)
    return digest.hexdigest()


def _flush(file: Path) -> None:
    with file.open("r+b" if os.name == "nt" else "rb") as opened:  # Windows flushes only what is open for writing
        os.fsync(opened.fileno())


def remove_abandoned(folder: Path) -> None:
    """Delete what killed processes of this machine left in `folder`, which may be tens of GB.

    Each process does this once per folder: listing it at every write would take longer the more files are written.
    """
    place = os.path.realpath(folder)
    if place in _CLEANED or not os.access(place, os.R_OK):
        return
    _CLEANED.add(place)
    for name in os.listdir(place):
        found = UNFINISHED.fullmatch(name)
        if found and found[1] == host() and not psutil.pid_exists(int(found[2])):
            with suppress(OSError):  # of another user
                _delete(folder / name)


@contextmanager
def atomic_write(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """Context manager that yields a temporary path for a file or folder, then flushes and renames it to `path`.

    After an exception the temporary one is deleted, and `path` is as it was; an error that names no file names `path`.
    The folder of `path` must exist. Without `replace`, which is for files only, raise FileExistsError if another
    process has written `path` meanwhile.
    """
    remove_abandoned(path.parent)
    temporary = temporary_path(path)
    try:
        with name_write_errors(path, temporary):
            yield temporary
            for file in filter(Path.is_file, [temporary, *temporary.rglob("*")]):
                _flush(file)
        if path.is_dir():
            old = temporary_path(path).with_suffix(".old")  # no next start deletes it
            move(path, old)
            try:
                move(temporary, path)
            except BaseException:
                move(old, path)
                raise
            _delete(old)
        elif replace:
            move(temporary, path)
        else:
            _rename_to_new(temporary, path)
    finally:
        _delete(temporary)


def move(source: Path, target: Path) -> None:
    """Rename a file, replacing `target`, or a folder where there is none.

    Windows refuses that while any process has the file open, or one in the folder, such as a virus scanner: there it
    is tried for some seconds.
    """
    until = time.monotonic() + MOVE_SECONDS
    while True:
        try:
            os.replace(source, target)
            return
        except PermissionError:
            if os.name != "nt" or time.monotonic() > until:
                raise
            time.sleep(0.02)


def _rename_to_new(temporary: Path, path: Path) -> None:
    try:
        path.hardlink_to(temporary)  # fails if `path` exists, which a rename replaces
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if os.path.lexists(path):
            raise FileExistsError(f"{path} exists") from None
        move(temporary, path)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
