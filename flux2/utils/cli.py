"""What the commands share: messages in the words of their options, and which errors mean out of memory."""

from __future__ import annotations

import math
import re
from pathlib import Path

import torch

# in the messages of errors of PyTorch and CUDA that have no type of their own
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "STATUS_ALLOC_FAILED")


def split_adapter(given: str) -> tuple[str, float]:
    """`PATH[:SCALE]` -> path and scale. A colon that is part of the path stays there.

    Raises ValueError for a scale that is not finite.
    """
    path, colon, scale = given.rpartition(":")
    if not colon or Path(given).exists():
        return given, 1.0
    try:
        value = float(scale)
    except ValueError:
        return given, 1.0
    if not math.isfinite(value):
        raise ValueError(f"--adapter {given}: the scale {scale} must be a finite number")
    return path, value


def message(error: Exception) -> str:
    """One line, whatever a library wrote, in which settings are called as this command calls them."""
    line = " ".join(str(error).split())
    line = re.sub(r"\bmodel\.(path|autoencoder|text_encoder)[=:] ?", lambda key: f"--{key[1].replace('_', '-')} ", line)
    return re.sub(r"\S{400,}", lambda name: f"{name[0][:120]}...{name[0][-40:]}", line)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` says that memory of a GPU or of the host is used up."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(sign in str(error) for sign in OUT_OF_MEMORY)
