"""Memory of a text encoder, computed from its sizes: its stored weights and the activations of one prompt."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from flux2.models.variants import TextConfig
from flux2.quantization.blockwise_int8 import BLOCK
from flux2.quantization.nf4 import NESTED_BLOCK

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
