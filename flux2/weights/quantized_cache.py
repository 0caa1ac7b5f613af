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
from collections.abc import Callable, Mapping
from pathlib import Path

import filelock
import torch
import xxhash
from torch import Tensor, nn

from flux2.quantization.base import QuantizedLinear
from flux2.quantization.precision import Precision
from flux2.utils.files import atomic_write, remove_unfinished
from flux2.utils.json_files import parse_json, read_json
from flux2.utils.text import gigabytes
from flux2.weights.parallel_reader import Digests, ReadTask, checksum, group_by_module, read_of, run_tasks
from flux2.weights.safetensors_files import DTYPE_NAMES, StoredTensor, TensorFiles
from flux2.weights.sources import WeightsError
from flux2.weights.streaming_writer import Plan, file_header, raw_bytes

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
    prefixes = tuple(f"{name}." for name in quantized_layers(model))
    return {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(prefixes)}


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a copy of `model` by name, in the order of the file."""
    layers = quantized_layers(model).items()
    tensors = {f"{name}.{key}": tensor for name, layer in layers for key, tensor in layer.storage().items()}
    tensors |= plain_tensors(model)
    # large elements first: the format requires a tensor to start at a multiple of its element size
    return dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))


class QuantizedCache:
    """The copy of one model's files in one precision.

    Args:
        folder: Folder of all copies; created when one is written.
        name: The model's name, which the file names start with.
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
        say: Callable[[str], None],
    ) -> None:
        self.folder, self.files, self.say = folder, files, say
        self.stem = f"{name}-{precision.recipe}"
        self.damaged: Path | None = None
        self.recipe = [VERSION, precision.recipe, str(precision.dtype), sorted(quantized_layers(model))]
        self.note = folder / "sources" / f"{digest(*map(list, files.identities))}.json"

    def copy_of(self, content: str) -> Path:
        """Return the path of the copy of files with these contents."""
        return self.folder / f"{self.stem}-{digest(content, *self.recipe)[:16]}.safetensors"

    def read(
        self, model: nn.Module, home: Callable[[str], torch.device], modules: Mapping[str, Callable[[], None]]
    ) -> bool:
        """Fill `model` from the copy, each tensor on the device `home(name)`; return False if there is no valid copy.

        `modules` as in `flux2.weights.loading.fill`.
        """
        try:
            content = read_json(self.note)["content"]
        except (OSError, ValueError, KeyError, TypeError):
            return False  # never loaded, or the record is damaged
        copy = self.copy_of(str(content))
        if not copy.is_file():
            return False
        try:
            self.fill(model, copy, home, modules)
        except ValueError as error:  # of reading, or of a layer whose storage this is not
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
            sums = dict(parse_json(files.metadata["checksums"]))
        except (KeyError, TypeError, ValueError) as error:
            raise WeightsError(f"{copy} holds no checksums") from error
        if files.metadata.get("layout") != layout(files.plan):
            raise WeightsError(f"{copy}: dtypes and shapes differ from those that were written")
        digests = Digests()

        def task(name: str, stored: dict[str, StoredTensor], use: Callable[[dict[str, Tensor]], None]) -> ReadTask:
            def check_and_use(tensors: dict[str, Tensor]) -> None:
                for one in stored.values():
                    if digests.checksum(one) != sums.get(one.key):
                        raise WeightsError(f"{copy}: the bytes of {one.key} differ from those that were written")
                use(tensors)

            return ReadTask({key: read_of(one, home(name)) for key, one in stored.items()}, check_and_use)

        tasks: dict[str, ReadTask] = {}
        rest = dict(files.tensors)
        for name, layer in quantized_layers(model).items():
            prefix = f"{name}."
            stored = {key.removeprefix(prefix): rest.pop(key) for key in files.names if key.startswith(prefix)}
            tasks[name] = task(name, stored, layer.adopt)
        plain = plain_tensors(model)
        if unpaired := sorted(plain.keys() ^ rest.keys()):
            raise WeightsError(f"{copy} and the model do not both have {unpaired[0]}")
        for name, tensor in plain.items():
            if rest[name].shape != tensor.shape:
                raise WeightsError(f"{copy}: {name} has shape {rest[name].shape} instead of {tuple(tensor.shape)}")
            tasks[name] = task(name, {name: rest[name]}, lambda tensors: set_tensor(model, *tensors.popitem()))
        run_tasks(group_by_module(tasks, modules), digests)

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
                    unfinished.write_text(
                        json.dumps({"content": content, "files": self.files.identities}), encoding="utf-8"
                    )
        except filelock.Timeout:
            return  # another process is writing it
        except (OSError, NotImplementedError) as error:  # NotImplementedError: a file system without locks
            self.say(f"no quantized copy is kept, so that the next start quantizes again: {self.folder}: {error}")

    def write_new(self, model: nn.Module, copy: Path) -> None:
        remove_unfinished(copy)
        tensors = stored_tensors(model)
        free, size = shutil.disk_usage(self.folder).free, sum(tensor.nbytes for tensor in tensors.values())
        if size + SPARE > free:
            self.say(
                f"no quantized copy is kept, so that the next start quantizes again: it needs {gigabytes(size)} and "
                f"{gigabytes(SPARE)} to spare, and {self.folder} has {gigabytes(free)} free"
            )
            return
        self.say(f"writing a quantized copy of {gigabytes(size)} to {copy} ({gigabytes(free)} free)")
        with atomic_write(copy) as unfinished:
            write_with_checksums(unfinished, tensors)


def write_with_checksums(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file with the checksum of each tensor in its metadata."""
    plan = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    sums = dict.fromkeys(plan, NO_CHECKSUM)

    def header() -> bytes:  # as many bytes for any checksums
        return file_header(plan, {"format": "pt", "layout": layout(plan), "checksums": json.dumps(sums)})

    with file.open("wb") as handle:
        handle.write(header())
        for name, tensor in tensors.items():
            data = raw_bytes(tensor)
            handle.write(data)
            sums[name] = checksum(data)
        handle.seek(0)
        handle.write(header())
