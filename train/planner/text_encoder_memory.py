"""What a text encoder takes, from its sizes: weights as they are kept, and what one prompt needs beside them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from flux2.models.variants import TextConfig
from flux2.quantization.int8 import BLOCK
from flux2.quantization.nf4 import NESTED_BLOCK

# config.json of the published text encoders, by what they are and how wide
TEXT_SIZES = {
    ("mistral", 5120): {"mlp": 32768, "heads": 32, "pairs": 8, "head": 128, "words": 131072},
    ("qwen3", 4096): {"mlp": 12288, "heads": 32, "pairs": 8, "head": 128, "words": 151936},
    ("qwen3", 2560): {"mlp": 9728, "heads": 32, "pairs": 8, "head": 128, "words": 151936},
}


def weight_bytes(size: int, storage: str | None, dtype: torch.dtype) -> int:
    """Of a text encoder's linear of `size` elements, scales included."""
    blocks = -(-size // BLOCK)
    if storage == "int8":
        return size + 4 * blocks
    if storage == "nf4":
        return -(-size // 2) + blocks + 4 * -(-blocks // NESTED_BLOCK) + 4
    return size * dtype.itemsize


def text_encoder_bytes(
    text: TextConfig, width: int, length: int, dtype: torch.dtype, sizes: Mapping[str, int], storage: str | None = None
) -> tuple[int, int]:
    """(weights, activations of one prompt) of the layers of a text encoder that are read.

    Args:
        width: of its hidden states.
        length: tokens of a prompt.
        sizes: `mlp` width, attention `heads`, key and value `pairs`, `head` width, `words` of the vocabulary.
        storage: of the layers' linears. With one, a dequantized weight is among the activations.
    """
    layers, element = max(text.layers), dtype.itemsize
    inner, shared = sizes["heads"] * sizes["head"], sizes["pairs"] * sizes["head"]
    linears = 2 * [width * inner] + 2 * [width * shared] + 3 * [width * sizes["mlp"]]
    norms = 2 * width + (2 * sizes["head"] if text.kind == "qwen3" else 0)
    layer = sum(weight_bytes(size, storage, dtype) for size in linears) + element * norms
    # every layer's output is handed out; beside them one layer's mlp
    activations = length * (width * (layers + 1) + 3 * sizes["mlp"] + 2 * width) + (max(linears) if storage else 0)
    return layers * layer + element * sizes["words"] * width, element * activations
