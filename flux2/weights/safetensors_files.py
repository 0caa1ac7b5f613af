"""Safetensors files: where each tensor's bytes are, and whether the file is complete.

The header is read here and not by the safetensors library, because the bytes are read in chunks, by several threads and
into memory that we choose (flux2/weights/parallel_reader.py), and because errors must name the file and the tensor.
The format: github.com/huggingface/safetensors.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from flux2.utils.json_files import parse_json, read_json
from flux2.utils.text import listed
from flux2.weights.sources import ModelSource, Part, WeightsError

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
HEADER_LIMIT = 100 << 20  # bytes; the limit of the format
MOST_DIMENSIONS = 8  # of a tensor
BLANK = 1 << 20  # zero bytes at the end that mark an incomplete download
ADVICE = "Give the model's safetensors files in bfloat16, FP8 or NF4"
OTHER_ENDINGS = (".gguf", ".bin", ".pt", ".pth", ".ckpt")
# first bytes of other files, which may have been renamed to .safetensors
OTHER_FILES = {
    b"GGUF": "GGUF, which is not read. Give safetensors files, of a model in bfloat16, FP8 or NF4",
    b"PK\x03\x04": "a PyTorch checkpoint (or another zip archive), which can run code. Give a safetensors file",
    b"\x80": "a pickle, which can run code. Give a safetensors file",
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself. Download it with `hf download`",
    b"<": "a web page: the download failed or needs a login. Download it with `hf download`",
}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: `size` bytes from `start`, under the name `key`."""

    file: Path
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    size: int

    def read_into(self, view: memoryview, offset: int = 0) -> None:
        """Fill `view` with the bytes from `offset`. Raises WeightsError that names file and tensor."""
        try:
            with self.file.open("rb") as handle:
                handle.seek(self.start + offset)
                if handle.readinto(view) < len(view):
                    raise damaged_file(self.file, f"it ends within {self.key}")
        except OSError as error:
            raise WeightsError(f"{self.file}: {self.key} cannot be read ({error.strerror})") from error


def damaged_file(file: Path, what: str) -> WeightsError:
    """Return the error for a file that is not valid safetensors."""
    return WeightsError(
        f"{file} cannot be read as safetensors: {what}. It is damaged or its download is incomplete: delete it and "
        "download it again."
    )


def other_kind(file: Path) -> str | None:
    """Return what a file with an invalid header is, and what to do; None if that is not known."""
    with file.open("rb") as handle:
        first = handle.read(32)
    return next((text for start, text in OTHER_FILES.items() if first.startswith(start)), None)


def parse_header(file: Path, raw: bytes) -> dict[str, Any]:
    """Return the entries of a header by name. Raises WeightsError unless each name occurs once."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) < len(pairs):
            ((repeated, _),) = Counter(name for name, _ in pairs).most_common(1)
            raise damaged_file(file, f"its header holds {repeated!r} twice")
        return entries

    try:
        header = parse_json(raw, object_pairs_hook=once)
    except WeightsError:
        raise
    except ValueError as error:
        raise damaged_file(file, f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise damaged_file(file, f"its header is a {type(header).__name__}, not a table of tensors")
    return header


def stored_tensor(file: Path, key: str, entry: Any, begin: int) -> StoredTensor:
    """Return one tensor of the header; data starts at byte `begin`."""
    try:
        name, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        numbers = (*shape, start, stop)
        is_complete = isinstance(name, str) and len(shape) <= MOST_DIMENSIONS
        is_complete = is_complete and all(type(number) is int and number >= 0 for number in numbers)
    except (TypeError, KeyError, ValueError):
        is_complete = False
    if not is_complete:
        raise damaged_file(file, f"its header's entry for {key} has no dtype, shape and data_offsets")
    if name not in DTYPES:
        raise WeightsError(f"{file}: {key} has dtype {name}. Give a file in one of {', '.join(DTYPES)}")
    needed = prod(shape) * DTYPES[name].itemsize
    if stop - start != needed:
        raise damaged_file(file, f"{key}, {name} of shape {shape}, needs {needed} bytes and has {stop - start}")
    return StoredTensor(file, key, DTYPES[name], shape, begin + start, needed)


def read_header(file: Path) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """Return the tensors of a safetensors file and its metadata.

    Raises WeightsError, with the file and if possible the tensor, unless the tensors fill the file exactly.
    """
    try:
        with file.open("rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            length = int.from_bytes(handle.read(8), "little")
            if size < 8:
                raise damaged_file(file, f"it has {size} bytes")
            if not 2 <= length <= HEADER_LIMIT:
                if other := other_kind(file):
                    raise WeightsError(f"{file} is {other}.")
                raise damaged_file(file, f"it starts with a header length of {length}: another kind of file, or blank")
            raw = handle.read(length)
    except OSError as error:
        raise WeightsError(f"{file} cannot be read ({error.strerror})") from error
    if len(raw) < length:
        raise damaged_file(file, f"it ends within its header: {size} bytes, and the header needs {8 + length}")
    header = parse_header(file, raw)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise damaged_file(file, "its metadata is not a table of texts")
    tensors = {key: stored_tensor(file, key, entry, 8 + length) for key, entry in header.items()}
    check_places(file, tensors, 8 + length, size)
    return tensors, metadata


def check_places(file: Path, tensors: dict[str, StoredTensor], begin: int, size: int) -> None:
    """Raise WeightsError unless the tensors follow each other from `begin` to the end of the file."""
    last, end = "", begin
    for stored in sorted(tensors.values(), key=lambda stored: (stored.start, stored.size)):
        if stored.start < end:
            raise damaged_file(file, f"{last} and {stored.key} overlap")
        if stored.start > end:
            raise damaged_file(file, f"{stored.start - end} bytes before {stored.key} belong to no tensor")
        last, end = stored.key, stored.start + stored.size
        if end > size:
            raise damaged_file(file, f"it ends within {last}: {size} bytes, and the tensors up to it need {end}")
    if end < size:
        raise damaged_file(file, f"{size - end} bytes follow its last tensor {last}")
    if last and tensors[last].size >= BLANK:
        with file.open("rb") as handle:
            handle.seek(size - BLANK)
            if not any(handle.read(BLANK)):
                what = f"{last} ends in {BLANK} bytes of zeros, as in allocated space that was never written"
                raise damaged_file(file, what)


class TensorFiles:
    """The tensors of one or several safetensors files by name.

    Raises WeightsError if a file is incomplete, or two files hold the same tensor.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.files = sorted(files)
        self.identities = [file_identity(file) for file in self.files]
        self.tensors: dict[str, StoredTensor] = {}
        self.metadata: dict[str, str] = {}
        for file in self.files:
            tensors, metadata = read_header(file)
            self.metadata |= metadata
            if twice := sorted(tensors.keys() & self.tensors.keys()):
                raise WeightsError(f"{twice[0]} is both in {self.tensors[twice[0]].file} and in {file.name}")
            self.tensors |= tensors

    @property
    def names(self) -> set[str]:
        return set(self.tensors)

    @property
    def plan(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtypes and shapes by name."""
        return {name: (stored.dtype, stored.shape) for name, stored in self.tensors.items()}

    @property
    def place(self) -> Path:
        """The file, or the folder of several files."""
        return self.files[0] if len(self.files) == 1 else self.files[0].parent

    def __getitem__(self, name: str) -> StoredTensor:
        return self.tensors[name]

    def check_unchanged(self) -> None:
        """Raise WeightsError if a file was written to since the headers were read."""
        for file, before in zip(self.files, self.identities, strict=True):
            if file_identity(file) != before:
                raise WeightsError(f"{file} was changed while it was read. Wait until it is complete and start again.")


def file_identity(file: Path) -> tuple[str, int, int, int]:
    """Return what changes when a file changes: real path, size, modification time in ns, inode."""
    try:
        status = file.stat()
    except OSError as error:
        raise WeightsError(f"{file} cannot be read ({error.strerror})") from error
    return str(file.resolve()), status.st_size, status.st_mtime_ns, status.st_ino


def part_files(folder: Path) -> TensorFiles:
    """Return the tensors of a published folder: of the shards that its index names, or of every safetensors file."""
    shards = set(folder.glob("*.safetensors"))
    for index in sorted(folder.glob("*.safetensors.index.json"))[:1]:
        try:
            names = set(read_json(index)["weight_map"].values())
            if wrong := [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]:
                raise ValueError(f"{wrong[0]!r} is not the name of a safetensors file in its folder")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightsError(f"{index} is not an index of shards ({error!r}): download it again") from error
        shards = {folder / name for name in names}
        if absent := sorted(shard.name for shard in shards if not shard.exists()):
            raise WeightsError(f"{folder}: its index names files that do not exist: {', '.join(absent)}")
    if not shards:
        others = sorted(file.name for kind in OTHER_ENDINGS for file in folder.glob(f"*{kind}"))
        found = f", but {listed(others, 3)}, which is not read. {ADVICE}" if others else ""
        raise WeightsError(f"{folder} holds no .safetensors file{found}")
    return TensorFiles(shards)


def tensor_files(source: ModelSource, part: Part) -> TensorFiles:
    """Return the tensors of a part: of its single file, or of its folder."""
    file = source.file(part)
    return part_files(source.folder(part)) if file is None else TensorFiles([file])
