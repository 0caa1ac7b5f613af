"""Where in files the cells of memory-mapped Arrow tables are.

A row of a table does not tell where it is stored: a table may be a slice, a selection or several files. But `datasets`
maps Arrow files into memory, so the address of a cell is a position in a file, whatever was done to the table before. A
cell that is a copy, as of a shuffled table, is in no mapped file.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import suppress
from os import stat
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa

OFFSETS: dict[object, np.dtype] = {pa.binary(): np.dtype("<i4"), pa.large_binary(): np.dtype("<i8")}  # of cells


class _Mapping(NamedTuple):
    begin: int  # addresses, in bytes
    end: int
    offset: int  # in the file
    inode: int
    path: str


class MappedFiles:
    """The files that the cells of some columns are in; none where Linux' list of mapped files does not exist.

    The buffers of the columns are held, since the address of a buffer that was freed may be used again.
    """

    def __init__(self, columns: Iterable[pa.ChunkedArray]) -> None:
        buffers = [
            buffer for column in columns for chunk in column.chunks for buffer in chunk.buffers() if buffer is not None
        ]
        mappings = sorted(_mappings())  # after the buffers are held
        begins = [mapping.begin for mapping in mappings]
        self._buffers: list[tuple[int, int, pa.Buffer, _Mapping]] = []
        for buffer in buffers:
            number = bisect_right(begins, buffer.address) - 1
            if number >= 0 and buffer.address + buffer.size <= mappings[number].end:
                self._buffers.append((buffer.address, buffer.size, buffer, mappings[number]))
        self._buffers.sort(key=lambda each: each[:2])
        self._addresses = [address for address, *_ in self._buffers]

    def place(self, cell: pa.Array) -> tuple[str, str] | None:
        """Return the file of a binary cell, an array of length 1, and the part of it; None if it is in none.

        The part names the inode: while a file is mapped, another one may get its path.
        """
        if cell.null_count or cell.type not in OFFSETS:
            return None
        _, offsets, data = cell.buffers()
        begin, end = np.frombuffer(offsets, OFFSETS[cell.type])[cell.offset :][:2].tolist()
        number = bisect_right(self._addresses, data.address) - 1
        if number < 0 or begin == end:
            return None
        address, size, _, mapping = self._buffers[number]
        if data.address + end > address + size:
            return None
        offset = mapping.offset + data.address + begin - mapping.begin
        return mapping.path, f"{end - begin} bytes from {offset} of inode {mapping.inode}"


def _mappings() -> Iterator[_Mapping]:
    """Yield the files that are mapped only to be read, and still have their path."""
    with suppress(OSError):
        for line in Path("/proc/self/maps").read_text(errors="surrogateescape", encoding="utf-8").splitlines():
            addresses, access, offset, _, inode, *path = line.split(None, 5)
            with suppress(OSError):  # deleted, or no file
                if path and access.startswith("r--") and stat(path[0]).st_ino == int(inode):
                    begin, end = (int(address, 16) for address in addresses.split("-"))
                    yield _Mapping(begin, end, int(offset, 16), int(inode), path[0])
