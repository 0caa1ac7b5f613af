"""Memory of a text encoder, computed from its sizes, and the choice of one that fits.

Its memory is that of its stored weights and of the activations of one prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import product
from typing import Any

import torch

from flux2.models.variants import TextConfig
from flux2.quantization.blockwise_int8 import BLOCK
from flux2.quantization.nf4 import NESTED_BLOCK
from train.config.memory import AUTO
from train.planner.workload import TextEncoderChoice, Workload

# config.json values of the published text encoders, by kind and hidden size
TEXT_SIZES = {
    ("mistral", 5120): {"mlp": 32768, "heads": 32, "pairs": 8, "head": 128, "words": 131072},
    ("qwen3", 4096): {"mlp": 12288, "heads": 32, "pairs": 8, "head": 128, "words": 151936},
    ("qwen3", 2560): {"mlp": 9728, "heads": 32, "pairs": 8, "head": 128, "words": 151936},
}


def weight_bytes(size: int, storage: str | None, dtype: torch.dtype) -> int:
    """Return the bytes of a linear layer of `size` elements, including scales."""
    blocks = -(-size // BLOCK)
    if storage == "int8":
        return size + 4 * blocks
    if storage == "nf4":
        return -(-size // 2) + blocks + 4 * -(-blocks // NESTED_BLOCK) + 4
    return size * dtype.itemsize


def text_encoder_bytes(
    text: TextConfig, width: int, length: int, dtype: torch.dtype, sizes: Mapping[str, int], storage: str | None = None
) -> tuple[int, int]:
    """Return the bytes of (weights, activations of one prompt) of the text encoder's layers that are used.

    Args:
        width, length: Hidden size, and number of tokens of a prompt.
        sizes: `mlp` width, attention `heads`, key and value heads (`pairs`), `head` width, vocabulary size (`words`).
        storage: Quantization of the linear layers; it adds a dequantized weight to the activations.
    """
    layers, element = max(text.layers), dtype.itemsize
    inner, shared = sizes["heads"] * sizes["head"], sizes["pairs"] * sizes["head"]
    linears = 2 * [width * inner] + 2 * [width * shared] + 3 * [width * sizes["mlp"]]
    norms = 2 * width + (2 * sizes["head"] if text.kind == "qwen3" else 0)
    layer = sum(weight_bytes(size, storage, dtype) for size in linears) + element * norms
    # the outputs of all layers are returned, and one layer's MLP is active
    activations = length * (width * (layers + 1) + 3 * sizes["mlp"] + 2 * width) + (max(linears) if storage else 0)
    return layers * layer + element * sizes["words"] * width, element * activations


def text_encoder_choices(given: Mapping[str, Any], on_gpu: bool) -> Iterator[TextEncoderChoice]:
    """Yield the choices that a group `text_encoder` leaves open, the one closest to the published encoder first.

    A GPU is preferred, because layers in 4 bits encode a prompt there in a fraction of the time that a CPU takes for
    the same.
    """
    storages = (None, "int8", "nf4") if given.get("storage") == AUTO else (given.get("storage"),)
    devices = (None, *(["cpu"] if on_gpu else [])) if given.get("device") == AUTO else (given.get("device"),)
    for device, storage in product(devices, storages):
        yield TextEncoderChoice(storage, device)


def prompt_bytes(job: Workload, storage: str | None) -> tuple[int, int]:
    """Return the bytes of (weights, activations) while prompts are encoded on this machine; zeros if unknown."""
    width = job.variant.transformer.text_width // len(job.variant.text.layers)
    sizes = job.text_sizes or TEXT_SIZES.get((job.variant.text.kind, width))
    if not sizes or not job.text_here:
        return 0, 0
    return text_encoder_bytes(job.variant.text, width, job.text_tokens, job.dtype, sizes, storage)


def cpu_encoding(job: Workload, choice: TextEncoderChoice, process: float) -> dict[str, float]:
    """Return the host memory by component while a CPU encodes prompts for a run on a GPU; empty if it does not."""
    if not job.on_gpu or choice.device != "cpu":
        return {}
    held, activations = prompt_bytes(job, choice.storage)
    return {"text encoder": held, "working set": activations, "process (assumed)": process} if held else {}


def first_fit(
    job: Workload,
    given: Mapping[str, Any],
    limit: float,
    host: float,
    libraries: float,
    is_cached: Callable[[str | None], bool] = lambda storage: False,
) -> TextEncoderChoice | None:
    """Return the first choice of `text_encoder_choices` that fits, or whose storage `is_cached`; None if none.

    With a cache of all prompts nothing is loaded. Other arguments are as in `fits`.
    """
    choices = text_encoder_choices(given, job.on_gpu)
    return next((one for one in choices if fits(job, one, limit, host, libraries) or is_cached(one.storage)), None)


def fits(job: Workload, choice: TextEncoderChoice, limit: float, host: float, libraries: float) -> bool:
    """Return whether a text encoder fits `limit` bytes of the device of the run, or `host` bytes of free host memory.

    `libraries` are bytes that a GPU needs as well.
    """
    held, activations = prompt_bytes(job, choice.storage)
    in_host = job.on_gpu and choice.device == "cpu"
    return not held or held + activations + (0 if in_host else libraries) <= (host if in_host else limit)
