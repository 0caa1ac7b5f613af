"""Files that hold many cache entries each, for caches with more entries than a file system handles well as files.

A pack is two files in `packs/`: `NAME.pack`, entries one after the other, and `NAME.index`, a record of 48 bytes for
each: the first half of its key, position, size, and a hash of its header. One process writes a pack and only appends to
it: first the entry, which is flushed to the disk, then its record. So a process can be killed at any time, and others
read the pack meanwhile, also on other machines: an entry without a whole record, or a record that points behind the end
of its pack, counts as missing. There is nothing to lock, unlike in a database, which network disks often cannot.

A start reads all records at once: 2,000,000 take a second or two and 80 MB.
"""

import json
import os
import threading
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

MAX_HEADER = 1 << 20  # bytes; the header of an entry has a few hundred
PACK_BYTES = 1 << 30  # from which size on a process begins another pack
RECORD = np.dtype([("key", "<u8", 2), ("begin", "<u8"), ("size", "<u8"), ("form", "<u8"), ("check", "<u8")])
WORDS = RECORD.itemsize // 8
# odd factors: a record that is torn, zeroed or shifted has another sum
FACTORS = np.array([0x9E3779B97F4A7C15 * (2 * number + 1) % 2**64 for number in range(WORDS - 1)], dtype=np.uint64)
BINARY = getattr(os, "O_BINARY", 0)  # else Windows translates ends of lines
SALT = np.uint64(0x464C5558)  # a record of zeros is none

Shapes = dict[str, tuple[int, ...]]  # shape of each tensor of an entry


@dataclass(frozen=True)
class Place:
    """Where an entry is."""

    pack: Path
    begin: int  # in bytes, as is the size
    size: int

    def read(self) -> bytes:
        """Return the bytes of the entry, fewer if the pack is truncated. Raise OSError if it cannot be read."""
        with self.pack.open("rb") as file:
            file.seek(self.begin)
            return file.read(self.size)

    def __str__(self) -> str:
        return f"{self.pack} at {self.begin}"


class Packs:
    """The entries of all packs in a folder, which may grow while this object exists. Threads may share it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.RLock()  # a lookup while the records are read again would return another entry
        self._seen: list[tuple[str, int, int]] = []  # name, size and time of each index
        self._files: list[Path] = []
        self._records = np.empty(0, RECORD)  # of all packs, one after the other
        self._ends = np.empty(0, np.int64)  # for each pack, the number of records up to its last
        self._order = np.empty(0, np.int32)  # the records in the order of their keys
        self._high = np.empty(0, np.uint64)  # first words of the keys in this order
        self._shapes: dict[int, Shapes] = {}

    def refresh(self) -> bool:
        """Read the records again if any pack has changed; return whether one had."""
        with self._lock:
            seen = _indices(self.folder)
            if seen == self._seen:
                return False
            self._seen, self._files = seen, [self.folder / f"{name.removesuffix('.index')}.pack" for name, *_ in seen]
            # filled file by file: a second copy of the records would take 48 bytes for each entry
            records, ends = np.empty(sum(size // RECORD.itemsize for _, size, _ in seen), RECORD), [0]
            for file, (_, size, _) in zip(self._files, seen, strict=True):
                valid = read_records(file)[: size // RECORD.itemsize]  # it may have grown meanwhile
                ends.append(ends[-1] + len(valid))
                records[ends[-2] : ends[-1]] = valid
                del valid
            self._records, self._ends = records[: ends[-1]], np.array(ends[1:], dtype=np.int64)
            keys = self._records["key"]
            self._order = np.lexsort((keys[:, 1], keys[:, 0])).astype(np.int32)  # stable: of equal keys newest last
            self._high = keys[self._order, 0]
            self._shapes = {}
            return True

    def rows(self, keys: Sequence[str]) -> np.ndarray:
        """Return the number of each key's record, -1 for those that no pack has."""
        wanted = packed_keys(keys)
        if not len(self._order):
            return np.full(len(keys), -1)
        places = np.searchsorted(self._high, wanted[:, 0], side="right") - 1
        while True:  # two keys that differ only in their second words are possible, though none will be met
            alike = (places >= 0) & (self._high[places] == wanted[:, 0])
            other = alike & (self._records["key"][self._order[places], 1] != wanted[:, 1])
            if not other.any():
                break
            places[other] -= 1
        return np.where(alike, self._order[places], -1)

    def forms(self, keys: Sequence[str]) -> list[int | None]:
        """Return the hash of the header of each entry, None for those that no pack has."""
        with self._lock:
            rows = self.rows(keys)
            if not len(self._records):
                return [None] * len(rows)
            forms: list[int | None] = self._records["form"][rows].tolist()
        for absent in np.flatnonzero(rows < 0).tolist():
            forms[absent] = None
        return forms

    def shapes(self, form: int) -> Shapes:
        """Return the shapes of the tensors of entries with this hash of their headers; none if none can be read."""
        with self._lock:
            if form not in self._shapes:
                alike = np.flatnonzero(self._records["form"] == form)[:100].tolist()  # one of them will be undamaged
                self._shapes[form] = next(filter(None, (self._read_shapes(row, form) for row in alike)), {})
            return self._shapes[form]

    def find(self, key: str) -> Place | None:
        """Return where an entry is, also one that was added by another process just now; None if it is in no pack."""
        with self._lock:
            row = int(self.rows([key])[0])
            if row < 0 and self.refresh():
                row = int(self.rows([key])[0])
            if row < 0:
                return None
            record = self._records[row]
            return Place(self._file_of(row), int(record["begin"]), int(record["size"]))

    def remove(self, key: str) -> None:
        """Erase the records of an entry, so that it counts as missing. Raise OSError if that is not possible."""
        wanted = packed_keys([key])[0]
        for file in list(self._files):
            index = file.with_suffix(".index")
            with suppress(FileNotFoundError), index.open("r+b") as stream:
                records = np.fromfile(stream, RECORD)
                for number in np.flatnonzero((records["key"] == wanted).all(axis=1)):
                    stream.seek(int(number) * RECORD.itemsize)
                    stream.write(bytes(RECORD.itemsize))
        self.refresh()

    def _file_of(self, row: int) -> Path:
        return self._files[int(np.searchsorted(self._ends, row, side="right"))]

    def _read_shapes(self, row: int, form: int) -> Shapes | None:
        record = self._records[row]
        try:
            with self._file_of(row).open("rb") as file:
                file.seek(int(record["begin"]))
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(min(length, MAX_HEADER)))
            header.pop("__metadata__", None)
            return {name: tuple(about["shape"]) for name, about in header.items()} if form_of(header) == form else None
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None


class PackWriter:
    """Appends entries to packs of its own, begun when they are needed. Threads may share it.

    The bytes of an entry are on the disk before its record is written, or without `flushes` when `close` returns. A
    record that the system had not written yet when it stopped counts as missing.
    """

    def __init__(self, folder: Path, flushes: bool = True) -> None:
        self.folder, self._flushes = folder, flushes
        self._lock = threading.Lock()
        self._files: tuple[int, int] | None = None  # descriptors of pack and index
        self._size = 0

    def append(self, key: str, form: int, content: bytes) -> None:
        """Add an entry. Raise OSError if that is not possible."""
        with self._lock:
            if self._files is None or self._size >= PACK_BYTES:
                self._begin()
            assert self._files is not None
            pack, index = self._files
            try:
                _write(pack, content)
                if self._flushes:
                    os.fsync(pack)
                _write(index, record_of(key, self._size, len(content), form))
            except OSError:
                self._end()  # how much was written is unknown: the next entry begins a pack
                raise
            self._size += len(content)

    def close(self) -> None:
        with self._lock:
            self._end()

    def _begin(self) -> None:
        self._end()
        self.folder.mkdir(parents=True, exist_ok=True)
        name = self.folder / f"{time.time_ns():016x}-{uuid.uuid4().hex[:16]}"  # in the order of time
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        pack = os.open(f"{name}.pack", flags | BINARY, 0o666)
        try:
            self._files = pack, os.open(f"{name}.index", flags | BINARY, 0o666)
        except OSError:
            os.close(pack)
            raise
        self._size = 0

    def _end(self) -> None:
        files, self._files = self._files or (), None
        for file in files:
            if not self._flushes:
                os.fsync(file)
            os.close(file)


def packed_keys(keys: Sequence[str]) -> np.ndarray:
    """Return the first halves of hexadecimal keys as numbers (len(keys), 2)."""
    return np.frombuffer(bytes.fromhex("".join([key[:32] for key in keys])), "<u8").reshape(-1, 2)


def form_of(header: object) -> int:
    """Return a hash of an entry's names, dtypes, shapes and offsets."""
    return xxhash.xxh3_64_intdigest(json.dumps(header, sort_keys=True).encode())


def record_of(key: str, begin: int, size: int, form: int) -> bytes:
    """Return the record of an entry."""
    record = np.zeros(1, RECORD)
    record["key"], record["begin"], record["size"], record["form"] = packed_keys([key]), begin, size, form
    record["check"] = _checks(record)
    return record.tobytes()


def read_records(pack: Path) -> np.ndarray:
    """Return the valid records of a pack, in the order of its entries; none if a file is missing or unreadable."""
    try:
        size = pack.stat().st_size
        raw = np.fromfile(pack.with_suffix(".index"), np.uint8)
    except OSError:
        return np.empty(0, RECORD)
    records = raw[: len(raw) // RECORD.itemsize * RECORD.itemsize].view(RECORD)
    begins, sizes = records["begin"], records["size"]
    within = (begins <= size) & (sizes <= size) & (sizes > 0) & (begins + sizes <= size)
    valid = within & (records["check"] == _checks(records))
    return records if valid.all() else records[valid]


def _indices(folder: Path) -> list[tuple[str, int, int]]:
    """Return name, size and time of each index in a folder, sorted by name; none if there is no such folder."""
    found = list[tuple[str, int, int]]()
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(FileNotFoundError):  # this pack was deleted just now, and the others stay
                if entry.name.endswith(".index"):
                    status = entry.stat()
                    found.append((entry.name, status.st_size, status.st_mtime_ns))
    return sorted(found)


def _checks(records: np.ndarray) -> np.ndarray:
    words = records.view("<u8").reshape(-1, WORDS)[:, :-1]
    return words @ FACTORS + SALT


def _write(file: int, content: bytes) -> None:
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(file, rest) :]
