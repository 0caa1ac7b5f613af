"""Quantized copies of models on disk, so that a model is quantized once.

A copy is one safetensors file: of each quantized layer what its `storage()` gives, of all else the tensor as the model
holds it. Its name holds a digest of

    the contents     checksums of every tensor that was read, taken while it was read
    the recipe       the form, the layers that are in it, the dtype of all else
    the code         `VERSION`, to be counted up when the stored bytes of a layer come out otherwise

On later starts the files are not read again to know their contents: the first start notes them under the files' real
paths, sizes, times of change (ns) and inodes. So a file is trusted to be what it was if all four are the same. The copy
itself is trusted in nothing: its header is checked as any file's is, and the bytes of each tensor against a checksum
that was taken when they were written.

A copy is written under another name and renamed when it is whole, by one process at a time. Where it cannot be written
(read-only, no space, no locks), that is said once, and the model is used without.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from math import prod
from pathlib import Path

import filelock
import torch
import xxhash
from torch import Tensor, nn

from flux2.quantization.base import QuantizedLinear
from flux2.quantization.precision import Precision
from flux2.weights.parallel_reader import Digests, ReadTask, checksum, group_by_module, read_of, run_tasks
from flux2.weights.safetensors_files import DTYPE_NAMES, StoredTensor, TensorFiles
from flux2.weights.sources import WeightsError

VERSION = 2
SPARE = 1 << 30  # bytes of the disk that a copy leaves free
NO_CHECKSUM = "0" * 32
GB = 1e9


def digest(*things: object) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(things, sort_keys=True).encode())


def layout(tensors: Iterable[StoredTensor]) -> str:
    """A checksum of names, dtypes and shapes."""
    return digest(sorted([one.key, DTYPE_NAMES[one.dtype], list(one.shape)] for one in tensors))


def set_tensor(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Make `tensor` the parameter or buffer called `name`."""
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    if leaf in module._buffers:
        module.register_buffer(leaf, tensor)
    else:
        module.register_parameter(leaf, nn.Parameter(tensor, requires_grad=False))


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}


def plain_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers that are not the storage of a quantized layer."""
    own = tuple(f"{name}." for name in quantized_layers(model))
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(own)}


class QuantizedCache:
    """The copy of one model's files in one precision.

    Args:
        folder: of all copies; made when one is written.
        name: the model's, to be seen in file names.
        files: what the copy is of.
        model: converted, its weights not needed.
        say: is told in a line what is read and written, or why not.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        files: TensorFiles,
        model: nn.Module,
        precision: Precision,
        say: Callable[[str], None] = print,
    ) -> None:
        self.folder = folder
        self.files = files
        self.say = say
        self.stem = f"{name}-{precision.recipe}"
        self.damaged: Path | None = None
        self.recipe = [VERSION, precision.recipe, str(precision.dtype), sorted(quantized_layers(model))]
        self.note = folder / "sources" / f"{digest(*map(list, files.identities))}.json"

    def copy_of(self, content: str) -> Path:
        """Where the copy of files with these contents is."""
        return self.folder / f"{self.stem}-{digest(content, *self.recipe)[:16]}.safetensors"

    def known(self) -> Path | None:
        """The copy of these files, if their contents are known and there is one."""
        try:
            content = json.loads(self.note.read_text())["content"]
        except (OSError, ValueError, KeyError, TypeError):
            return None  # never loaded, or the note was not written whole
        copy = self.copy_of(str(content))
        return copy if copy.is_file() else None

    # -------------------------------------------------------------- reading

    def read(
        self,
        model: nn.Module,
        home: Callable[[str], torch.device],
        modules: Mapping[str, Callable[[], None]] | None = None,
    ) -> bool:
        """Fill `model` from the copy, each tensor on the device `home(name)`; False if there is no good one.

        `modules` as in `flux2.weights.loading.fill`.
        """
        copy = self.known()
        if copy is None:
            return False
        try:
            self.fill(model, copy, home, modules or {})
        except (WeightsError, ValueError) as error:  # a layer refuses what is not its storage with ValueError
            self.damaged = copy
            reason = str(error).partition(". It is damaged")[0]  # which goes on with what to do about a download
            self.say(f"the quantized copy is damaged and will be made anew: {reason}")
            return False
        self.say(f"read from the quantized copy {copy}")
        return True

    def fill(
        self,
        model: nn.Module,
        copy: Path,
        home: Callable[[str], torch.device],
        modules: Mapping[str, Callable[[], None]],
    ) -> None:
        """Raises WeightsError or ValueError if the copy is damaged."""
        files = TensorFiles([copy])
        try:
            sums = json.loads(files.metadata["checksums"])
            whole_layout = files.metadata["layout"] == layout(files[name] for name in files.names)
        except (KeyError, TypeError, ValueError):
            sums, whole_layout = None, False
        if not isinstance(sums, dict):
            raise WeightsError(f"{copy} holds no checksums")
        if not whole_layout:
            raise WeightsError(f"{copy}: dtypes and shapes are not those that were written")
        digests = Digests()
        unread = files.names
        jobs: dict[str, ReadTask] = {}

        def job(wanted: dict[str, str], device: torch.device, use: Callable[[dict[str, Tensor]], None]) -> ReadTask:
            if absent := sorted(set(wanted.values()) - unread):
                raise WeightsError(f"{copy} does not hold {absent[0]}")
            unread.difference_update(wanted.values())
            stored = {key: files[name] for key, name in wanted.items()}

            def checked(tensors: dict[str, Tensor]) -> None:
                for one in stored.values():
                    if digests.of(one) != sums.get(one.key):
                        raise WeightsError(f"{copy}: the bytes of {one.key} are not those that were written")
                use(tensors)

            return ReadTask({key: read_of(one, device) for key, one in stored.items()}, checked)

        for name, layer in quantized_layers(model).items():
            start = f"{name}."
            own = {key.removeprefix(start): key for key in files.names if key.startswith(start)}
            jobs[name] = job(own, home(name), layer.adopt)
        for name, tensor in plain_tensors(model).items():
            if name in files.names and files[name].shape != tensor.shape:
                raise WeightsError(f"{copy}: {name} has shape {files[name].shape} instead of {tuple(tensor.shape)}")
            jobs[name] = job({name: name}, home(name), lambda tensors: set_tensor(model, *tensors.popitem()))
        if unread:
            raise WeightsError(f"{copy} holds {sorted(unread)[0]}, which the model does not")
        run_tasks(group_by_module(jobs, modules), digests)

    # -------------------------------------------------------------- writing

    def write(self, model: nn.Module, digests: Digests) -> None:
        """Write a copy of the filled `model`, whose files have the contents `digests`. What hinders it is said."""
        content = digests.content()
        copy = self.copy_of(content)
        try:
            copy.parent.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(copy.with_suffix(".lock"), timeout=0):
                if copy == self.damaged or not copy.is_file():
                    self.write_new(model, copy)
                replace_file(self.note, json.dumps({"content": content, "files": self.files.identities}).encode())
        except filelock.Timeout:
            return  # another process is writing it
        except (OSError, NotImplementedError) as error:  # of a file system without locks
            self.say(f"no quantized copy is kept, so that the next start quantizes again: {self.folder}: {error}")

    def write_new(self, model: nn.Module, copy: Path) -> None:
        for left in self.folder.glob(f"{copy.stem}.*.partial"):  # of a process that was ended
            left.unlink()
        entries = Entries(model)
        free = shutil.disk_usage(self.folder).free
        size = f"{entries.size / GB:.2f} GB"
        if entries.size + SPARE > free:
            self.say(
                f"no quantized copy is kept, so that the next start quantizes again: it needs {size} and "
                f"{SPARE / GB:.1f} GB to spare, and {self.folder} has {free / GB:.2f} GB free"
            )
            return
        self.say(f"writing a quantized copy of {size} to {copy} ({free / GB:.1f} GB free)")
        partial = copy.with_suffix(f".{os.getpid()}.partial")
        try:
            entries.write(partial)
            partial.replace(copy)
        finally:
            partial.unlink(missing_ok=True)


class Entries:
    """What a copy of a filled model holds, as a safetensors file.

    Attributes:
        size: bytes of the tensors.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.places: dict[str, tuple[torch.dtype, list[int], int]] = {}  # dtype, shape, first byte
        self.size = 0
        found = {name: (tensor.dtype, list(tensor.shape), tensor.nbytes) for name, tensor in self.tensors()}
        # large elements first: the format wants a tensor to begin at a multiple of its element's size
        for name, (dtype, shape, size) in sorted(found.items(), key=lambda item: -item[1][0].itemsize):
            self.places[name] = (dtype, shape, self.size)
            self.size += size

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, layer in quantized_layers(self.model).items():
            yield from ((f"{name}.{key}", tensor) for key, tensor in layer.storage().items())
        yield from plain_tensors(self.model).items()

    def start(self, sums: dict[str, str]) -> bytes:
        """The file up to its data; as long for any checksums."""
        stored = [
            StoredTensor(Path(), name, dtype, tuple(shape), 0, 0) for name, (dtype, shape, _) in self.places.items()
        ]
        about = {"format": "pt", "layout": layout(stored), "checksums": json.dumps(sums)}
        header: dict[str, object] = {"__metadata__": about}
        for name, (dtype, shape, first) in self.places.items():
            last = first + prod(shape) * dtype.itemsize
            header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": shape, "data_offsets": [first, last]}
        raw = json.dumps(header).encode()
        raw += b" " * (-len(raw) % 8)
        return len(raw).to_bytes(8, "little") + raw

    def write(self, file: Path) -> None:
        sums = dict.fromkeys(self.places, NO_CHECKSUM)
        begin = len(self.start(sums))
        with file.open("wb") as handle:
            for name, tensor in self.tensors():
                data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
                handle.seek(begin + self.places[name][2])
                handle.write(data)
                sums[name] = checksum(data)
            handle.seek(0)
            handle.write(self.start(sums))


def replace_file(file: Path, content: bytes) -> None:
    """Write a small file, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
