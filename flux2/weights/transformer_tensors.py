"""Read the weights of a published transformer one layer after the other, without the model.

Conversion and merging need each weight once: the largest is 1.4 GB in float32, the model 64 GB in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from flux2.models.transformer import Transformer
from flux2.utils.text import listed
from flux2.weights.loading import match_weights, transformer_names
from flux2.weights.parallel_reader import ReadTask, run_tasks
from flux2.weights.prequantized import Weight, find_part
from flux2.weights.safetensors_files import TensorFiles
from flux2.weights.sources import WeightsError


def find_weights(model: nn.Module, files: TensorFiles, what: str) -> dict[str, Weight]:
    """Return where each tensor of `model`, which has names and shapes only, is in `files`, by our names.

    Raises WeightsError unless `files` hold exactly these tensors as floats: quantization has lost the original values.
    """
    published, ignored = transformer_names(model, files)
    parts = {key: find_part(files, key) for entry in published.values() for key in entry.names}
    if quantized := [key for key, part in parts.items() if part is not None and part.form != "plain"]:
        raise WeightsError(
            f"{files.place} is quantized ({listed(quantized, 2)}): rounding would lose most of an adapter, and the "
            "original values are not in it. Give the published files in bfloat16 (--path)"
        )
    return match_weights(model, files, published, what, ignored)


class BaseWeights:
    """The tensors of a published transformer with the names and shapes of `model`, by our names in its order."""

    def __init__(self, model: Transformer, files: TensorFiles, what: str) -> None:
        self.files = files
        self.weights = find_weights(model, files, what)

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype in the file; if its parts differ, that of the first."""
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
