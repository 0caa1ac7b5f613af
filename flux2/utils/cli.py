"""Helpers shared by the commands: parsing of options, error messages and the detection of out-of-memory errors."""

import math
import re
from pathlib import Path

import torch

from flux2.utils.text import printable

# in the messages of errors of PyTorch and CUDA that have no type of their own
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory", "STATUS_ALLOC_FAILED")


def split_adapter(option: str) -> tuple[str, float, str]:
    """Split `PATH[:SCALE[,RANGES]]` or `PATH:RANGES` into path, scale and ranges; a colon can belong to the path.

    Ranges (flux2/adapters/strengths.py) are recognized by their form and not checked. Raise ValueError for a scale that
    is not finite, or is left out before a comma.
    """
    path, colon, strength = option.rpartition(":")
    if not colon or Path(option).exists():
        return option, 1.0, ""
    scale, _, ranges = strength.partition(",")
    if re.fullmatch(r"[\w.-]+=[^/\\]*", strength):
        return path, 1.0, strength
    if not scale.strip() and ranges:
        raise ValueError(f"--adapter {option}: there is no scale before the comma. Write {path}:{ranges.strip()}")
    try:
        value = float(scale)
    except ValueError:
        return option, 1.0, ""
    if not math.isfinite(value):
        raise ValueError(f"--adapter {option}: the scale {scale} must be a finite number")
    return path, value, ranges


def format_error(error: Exception) -> str:
    """Return the message of `error` as one line of bounded length, with settings named as command-line options."""
    line = " ".join(str(error).split())
    line = re.sub(r"\bmodel\.(path|autoencoder|text_encoder)[=:] ?", lambda key: f"--{key[1].replace('_', '-')} ", line)
    return printable(re.sub(r"\S{400,}", lambda name: f"{name[0][:120]}...{name[0][-40:]}", line))


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` says that memory of a GPU or of the host is used up."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(sign in str(error) for sign in OUT_OF_MEMORY)
