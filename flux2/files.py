"""Safetensors files: the tensors of one or several by name."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from flux2.sources import ModelSource, Part, WeightsError


class TensorFiles:
    """The tensors of one or several safetensors files by name, read one at a time."""

    def __init__(self, files: Iterable[Path]) -> None:
        self.files = sorted(files)
        if not self.files:
            raise WeightsError("no .safetensors file was found")
        self._handles = [self._open(file) for file in self.files]
        self._where = {name: handle for handle in self._handles for name in handle.keys()}  # noqa: SIM118

    @staticmethod
    def _open(file: Path) -> safe_open:
        try:
            return safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise WeightsError(
                f"{file} cannot be read as safetensors ({error}). It is damaged or its download is incomplete: "
                "delete it and fetch it again."
            ) from error

    @property
    def names(self) -> set[str]:
        return set(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._where[name].get_slice(name).get_shape())

    def __getitem__(self, name: str) -> Tensor:
        return self._where[name].get_tensor(name)


def part_files(folder: Path) -> TensorFiles:
    """The tensors of one published folder: the shards its index names, or every safetensors file in it."""
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if not indexes:
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise WeightsError(f"{folder} holds no .safetensors file")
        return TensorFiles(files)
    try:
        shards = {folder / shard for shard in json.loads(indexes[0].read_text())["weight_map"].values()}
    except (json.JSONDecodeError, KeyError) as error:
        raise WeightsError(f"{indexes[0]} is not an index of shards ({error!r}): fetch it again") from error
    if absent := sorted(shard.name for shard in shards if not shard.exists()):
        raise WeightsError(f"{folder}: its index names files that are not there: {', '.join(absent)}")
    return TensorFiles(shards)


def tensor_files(source: ModelSource, part: Part) -> TensorFiles:
    """The tensors of a part: of its single file, or of its folder."""
    file = source.file(part)
    return part_files(source.folder(part)) if file is None else TensorFiles([file])
