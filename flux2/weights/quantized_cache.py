"""Quantized copies of models on disk, so that a model is quantized once.

A copy is one safetensors file: what `storage()` of each quantized layer returns, and every other tensor as the model
holds it. Its name holds a digest of

    the contents     checksums of every tensor that was read, computed while reading
    the recipe       the format, the layers that have it, the dtype of all other tensors
    the code         `VERSION`, to be increased when the stored bytes of a layer change

Later starts do not read the files again to know their contents: the first start records the contents under the files'
real paths, sizes, modification times (ns) and inodes. A file is trusted to be unchanged if all four are equal. The copy
itself is not trusted: its header is checked as that of any file, and the bytes of each tensor against a checksum that
was computed when they were written.

One process at a time writes a copy, under a temporary name. If it cannot be written (read-only, no space, no locks),
one message says so, and the model is used without.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path

import filelock
import torch
import xxhash
from torch import Tensor, nn

from flux2.quantization.base import QuantizedLinear
from flux2.quantization.precision import Precision
from flux2.utils.files import atomic_write, remove_unfinished
from flux2.utils.text import gigabytes
from flux2.weights.parallel_reader import Digests, ReadTask, checksum, group_by_module, read_of, run_tasks
from flux2.weights.safetensors_files import DTYPE_NAMES, TensorFiles
from flux2.weights.sources import WeightsError
from flux2.weights.streaming_writer import Plan, file_header, nbytes, raw_bytes

VERSION = 2
SPARE = 1 << 30  # bytes of the disk that stay free after a copy is written
NO_CHECKSUM = "0" * 32


def digest(*things: object) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(things, sort_keys=True).encode())


def layout(tensors: Plan) -> str:
    """Return a checksum of names, dtypes and shapes."""
    return digest(sorted([name, DTYPE_NAMES[dtype], list(shape)] for name, (dtype, shape) in tensors.items()))


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
    """Return the parameters and buffers that do not belong to a quantized layer."""
    own = tuple(f"{name}." for name in quantized_layers(model))
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(own)}


class QuantizedCache:
    """The copy of one model's files in one precision.

    Args:
        folder: Folder of all copies; created when one is written.
        name: The model's name, which the file names start with.
        files: The files that are copied.
        model: The converted model; its weights are not needed.
        say: Receives one line for each copy that is read or written, or the reason why not.
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
        """Return the path of the copy of files with these contents."""
        return self.folder / f"{self.stem}-{digest(content, *self.recipe)[:16]}.safetensors"

    def known(self) -> Path | None:
        """Return the copy of these files, or None if their contents are unknown or there is no copy."""
        try:
            content = json.loads(self.note.read_text())["content"]
        except (OSError, ValueError, KeyError, TypeError):
            return None  # never loaded, or the record is damaged
        copy = self.copy_of(str(content))
        return copy if copy.is_file() else None

    # -------------------------------------------------------------- reading

    def read(
        self,
        model: nn.Module,
        home: Callable[[str], torch.device],
        modules: Mapping[str, Callable[[], None]] | None = None,
    ) -> bool:
        """Fill `model` from the copy, each tensor on the device `home(name)`; return False if there is no valid copy.

        `modules` as in `flux2.weights.loading.fill`.
        """
        copy = self.known()
        if copy is None:
            return False
        try:
            self.fill(model, copy, home, modules or {})
        except (WeightsError, ValueError) as error:  # a layer raises ValueError for storage that is not its own
            self.damaged = copy
            reason = str(error).partition(". It is damaged")[0]  # without the advice for downloads
            self.say(f"the quantized copy is damaged and will be written again: {reason}")
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
        """Fill `model` from `copy`. Raises WeightsError or ValueError if the copy is damaged."""
        files = TensorFiles([copy])
        try:
            sums = json.loads(files.metadata["checksums"])
            is_complete = files.metadata["layout"] == layout(files.plan)
        except (KeyError, TypeError, ValueError):
            sums, is_complete = None, False
        if not isinstance(sums, dict):
            raise WeightsError(f"{copy} holds no checksums")
        if not is_complete:
            raise WeightsError(f"{copy}: dtypes and shapes differ from those that were written")
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
                        raise WeightsError(f"{copy}: the bytes of {one.key} differ from those that were written")
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
        """Write a copy of the filled `model`, whose files have the contents `digests`, or say why there is none."""
        content = digests.content()
        copy = self.copy_of(content)
        try:
            copy.parent.mkdir(parents=True, exist_ok=True)
            with filelock.FileLock(copy.with_suffix(".lock"), timeout=0):
                if copy == self.damaged or not copy.is_file():
                    self.write_new(model, copy)
                self.note.parent.mkdir(exist_ok=True)
                with atomic_write(self.note) as unfinished:
                    unfinished.write_text(json.dumps({"content": content, "files": self.files.identities}))
        except filelock.Timeout:
            return  # another process is writing it
        except (OSError, NotImplementedError) as error:  # NotImplementedError: a file system without locks
            self.say(f"no quantized copy is kept, so that the next start quantizes again: {self.folder}: {error}")

    def write_new(self, model: nn.Module, copy: Path) -> None:
        remove_unfinished(copy)
        writer = CopyWriter(model)
        free = shutil.disk_usage(self.folder).free
        size = gigabytes(writer.size)
        if writer.size + SPARE > free:
            self.say(
                f"no quantized copy is kept, so that the next start quantizes again: it needs {size} and "
                f"{gigabytes(SPARE)} to spare, and {self.folder} has {gigabytes(free)} free"
            )
            return
        self.say(f"writing a quantized copy of {size} to {copy} ({gigabytes(free)} free)")
        with atomic_write(copy) as unfinished:
            writer.write(unfinished)


class CopyWriter:
    """Writes a filled model as a safetensors file with checksums; `size` is the bytes of all tensors."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        tensors: Plan = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in self.tensors()}
        # large elements first: the format requires a tensor to start at a multiple of its element size
        self.plan: Plan = dict(sorted(tensors.items(), key=lambda item: -item[1][0].itemsize))
        self.size = nbytes(self.plan)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, layer in quantized_layers(self.model).items():
            yield from ((f"{name}.{key}", tensor) for key, tensor in layer.storage().items())
        yield from plain_tensors(self.model).items()

    def header(self, sums: dict[str, str]) -> bytes:
        """Return the bytes before the data; their number does not depend on the checksums."""
        about = {"format": "pt", "layout": layout(self.plan), "checksums": json.dumps(sums)}
        return file_header(self.plan, about)

    def write(self, file: Path) -> None:
        sums = dict.fromkeys(self.plan, NO_CHECKSUM)
        starts, start = {}, len(self.header(sums))
        for name, (dtype, shape) in self.plan.items():
            starts[name] = start
            start += prod(shape) * dtype.itemsize
        with file.open("wb") as handle:
            for name, tensor in self.tensors():
                data = raw_bytes(tensor)
                handle.seek(starts[name])
                handle.write(data)
                sums[name] = checksum(data)
            handle.seek(0)
            handle.write(self.header(sums))
