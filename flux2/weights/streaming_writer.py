"""Write large safetensors files tensor by tensor, with one tensor in memory at a time.

The library writes only tensors that are all in memory, and a header in another order each time. Here the header is
written first, from names, shapes and dtypes; then each tensor, in order; finally the header again, with the hash of the
data (`modelspec`). The format: github.com/huggingface/safetensors.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from flux2.utils.files import name_write_errors
from flux2.utils.text import gigabytes
from flux2.weights.modelspec import HASH, NO_HASH, OWN_HASH
from flux2.weights.safetensors_files import DTYPE_NAMES

SPARE = 64 << 20  # bytes of the disk that stay free
Plan = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # dtypes and shapes by name, in the order of writing


def nbytes(plan: Plan) -> int:
    """Return the number of bytes of all tensors."""
    return sum(prod(shape) * dtype.itemsize for dtype, shape in plan.values())


def check_room(folder: Path, size: int, what: str) -> None:
    """Raise ValueError, starting with `what`, unless the disk of `folder` has room for `size` bytes."""
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(existing).free
    if size + SPARE > free:
        raise ValueError(
            f"{what}: {gigabytes(size)} are needed, and {existing} has {gigabytes(free)} free. Make room, or choose "
            "another folder"
        )


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor as a file holds them."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def file_header(plan: Plan, metadata: Mapping[str, str]) -> bytes:
    """Return the bytes of a file before its data."""
    header: dict[str, Any] = {"__metadata__": metadata}
    start = 0
    for name, (dtype, shape) in plan.items():
        stop = start + prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


class SafetensorsFile:
    """A file that is being written to `handle`, which is open at `path`."""

    def __init__(self, path: Path, handle: BinaryIO, plan: Plan, metadata: Mapping[str, str]) -> None:
        self.path, self.handle, self.plan, self.metadata = path, handle, plan, metadata
        self.todo = list(plan)
        self.hash = hashlib.sha256()
        self._write_header(NO_HASH)

    def _write_header(self, digest: str) -> None:  # as many bytes for any digest
        self._put(file_header(self.plan, {**self.metadata, HASH: digest, OWN_HASH: digest}))

    def _put(self, data: bytes | memoryview) -> None:
        with name_write_errors(self.path):
            self.handle.write(data)

    def write(self, name: str, tensor: Tensor) -> None:
        assert self.todo[:1] == [name], f"{name} is not next in {self.path}"
        del self.todo[0]
        assert (tensor.dtype, tuple(tensor.shape)) == self.plan[name], name
        data = raw_bytes(tensor)
        self.hash.update(data)
        self._put(data)

    def finish(self) -> None:
        assert not self.todo, f"not written: {self.todo[:3]}"
        self.handle.seek(0)
        self._write_header("0x" + self.hash.hexdigest())
        with name_write_errors(self.path):
            self.handle.close()


@contextmanager
def safetensors_writer(
    plans: Mapping[Path, Plan], metadata: Mapping[str, str]
) -> Iterator[Callable[[str, Tensor], None]]:
    """Context manager that yields a function which writes a tensor to the file that plans it, in the order of its plan.

    At the end all files are finished; after an exception they are only closed.
    """
    with ExitStack() as stack:
        files: list[SafetensorsFile] = []
        for path, plan in plans.items():
            handle = path.open("wb")
            stack.callback(handle.close)
            files.append(SafetensorsFile(path, handle, plan, metadata))
        file_of = {name: file for file in files for name in file.plan}
        yield lambda name, tensor: file_of[name].write(name, tensor)
        for file in files:
            file.finish()


def write_safetensors(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata, with the hash of the data: the same bytes for the same content."""
    order = sorted(state, key=lambda name: (-state[name].dtype.itemsize, name))  # aligned, as the format requires
    plan = {name: (state[name].dtype, tuple(state[name].shape)) for name in order}
    with safetensors_writer({path: plan}, dict(sorted(metadata.items()))) as write:
        for name in order:
            write(name, state[name])
