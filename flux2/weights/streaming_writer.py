"""Large safetensors files, tensor by tensor, so that no more than one is in memory.

The library writes only what is in memory whole. Here the header comes first, from names, shapes and dtypes; then each
tensor, in order; at last the header again, with the hash of what follows it (`modelspec`). The format:
github.com/huggingface/safetensors.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from flux2.weights.modelspec import HASH, NO_HASH
from flux2.weights.safetensors_files import DTYPE_NAMES

GB = 1e9
SPARE = 64 << 20  # bytes that stay free beside what is written
Plan = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # a file's tensors, in the order that they are written in


def nbytes(plan: Plan) -> int:
    return sum(prod(shape) * dtype.itemsize for dtype, shape in plan.values())


def check_room(folder: Path, size: int, what: str) -> None:
    """Raises ValueError, beginning with `what`, unless the disk of `folder` has room for `size` bytes."""
    there = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(there).free
    if size + SPARE > free:
        raise ValueError(
            f"{what}: {size / GB:.2f} GB are to be written, and {there} has {free / GB:.2f} GB free. Make room, or "
            "give another place"
        )


def raw_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor as a file holds them."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


class SafetensorsFile:
    """One file that is being written."""

    def __init__(self, path: Path, plan: Plan, metadata: Mapping[str, str]) -> None:
        self.path, self.plan, self.metadata = path, plan, dict(metadata)
        self.todo = list(plan)
        self.hash = hashlib.sha256()
        self.handle: BinaryIO = path.open("wb")
        self.handle.write(self.header(NO_HASH))

    def header(self, digest: str) -> bytes:
        """The bytes before the data; as many for any digest."""
        about: dict[str, Any] = {"__metadata__": self.metadata | {HASH: digest}}
        start = 0
        for name, (dtype, shape) in self.plan.items():
            stop = start + prod(shape) * dtype.itemsize
            about[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, stop]}
            start = stop
        raw = json.dumps(about).encode()
        raw += b" " * (-len(raw) % 8)
        return len(raw).to_bytes(8, "little") + raw

    def write(self, name: str, tensor: Tensor) -> None:
        assert self.todo[:1] == [name], f"{name} is not next in {self.path}"
        del self.todo[0]
        assert (tensor.dtype, tuple(tensor.shape)) == self.plan[name], name
        data = raw_bytes(tensor)
        self.hash.update(data)
        self.handle.write(data)

    def finish(self) -> None:
        assert not self.todo, f"not written: {self.todo[:3]}"
        self.handle.seek(0)
        self.handle.write(self.header("0x" + self.hash.hexdigest()))
        self.handle.close()


class SafetensorsWriter:
    """Several files, of which each tensor has one. As a context: what is open is closed at its end."""

    def __init__(self, files: Mapping[Path, Plan], metadata: Mapping[str, str]) -> None:
        self.stack = ExitStack()
        self.files: list[SafetensorsFile] = []
        try:
            for path, plan in files.items():
                self.files.append(SafetensorsFile(path, plan, metadata))
                self.stack.callback(self.files[-1].handle.close)
        except BaseException:
            self.stack.close()
            raise
        self.home = {name: file for file in self.files for name in file.plan}

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stack.close()

    def write(self, name: str, tensor: Tensor) -> None:
        """Tensors come in the order of their file's plan."""
        self.home[name].write(name, tensor)

    def finish(self) -> None:
        for file in self.files:
            file.finish()
