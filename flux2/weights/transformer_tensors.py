"""The weights of a published transformer, one layer after the other, without the model.

What is converted or merged here needs each weight once: the largest is 1.4 GB in float32, the model 64 GB in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from flux2.models.transformer import Transformer
from flux2.utils.text import listed
from flux2.weights.loading import check_names, expected_shapes, transformer_names
from flux2.weights.parallel_reader import ReadTask, run_tasks
from flux2.weights.prequantized import MARKER, Weight, find_part
from flux2.weights.safetensors_files import TensorFiles
from flux2.weights.sources import WeightsError


def find_weights(model: nn.Module, files: TensorFiles, what: str) -> dict[str, Weight]:
    """Where each tensor of `model`, of names and shapes alone, is in `files`, by our names.

    Raises WeightsError unless `files` hold exactly those, in floats: what was quantized has lost what it was.
    """
    published, ignored = transformer_names(model, files)
    shapes = expected_shapes(model)
    weights, missing, misshaped = {}, set(), []
    unread = {name for name in files.names if not ignored(name) and name.rpartition(".")[2] != MARKER}
    quantized = []
    for name, entry in published.items():
        found = {key: find_part(files, key) for key in entry.names}
        missing |= {key for key, part in found.items() if part is None}
        parts = [part for part in found.values() if part is not None]
        for part in parts:
            unread -= part.names
        quantized += [part.stored["weight"].key for part in parts if part.form != "plain"]
        if len(parts) == len(found):
            weights[name] = Weight(entry, tuple(parts))
            if weights[name].shape != shapes[name]:
                misshaped.append(f"{entry.names[0]} {tuple(weights[name].shape)} instead of {tuple(shapes[name])}")
    if quantized:
        raise WeightsError(
            f"{files.place} is quantized ({listed(quantized, 2)}): most of an adapter would be lost in rounding, and "
            "what was there before is not in it. Give the published files in bfloat16 (--path)"
        )
    check_names(what, files, missing, unread, misshaped)
    return weights


class BaseWeights:
    """The tensors of a published transformer, whose names and shapes `model` has.

    Attributes:
        weights: by our names, in the order of the model.
    """

    def __init__(self, model: Transformer, files: TensorFiles, what: str) -> None:
        self.files = files
        self.weights = find_weights(model, files, what)

    def dtype(self, name: str) -> torch.dtype:
        """Of the file; of the first part where they differ."""
        return self.weights[name].parts[0].stored["weight"].dtype

    def each(self, names: Iterable[str], device: torch.device, use: Callable[[str, Tensor], None]) -> None:
        """Call `use` with each name and its tensor on `device`, in the dtype of the file, in this order."""

        def job(name: str) -> ReadTask:
            weight = self.weights[name]

            def take(tensors: Mapping[str, Tensor]) -> None:
                use(name, weight.dequantized(tensors, torch.float32))

            return ReadTask(weight.reads(device), take)

        with torch.no_grad():
            run_tasks([job(name) for name in names])
        self.files.check_unchanged()
