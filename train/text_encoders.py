"""What turns prompts into embeddings before training: the group `text_encoder`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from flux2.sources import ModelSource
from flux2.text_encoder import Storage, check_storage
from flux2.weights import load_text_encoder, text_encoder_identity

Encode = Callable[[list[str]], Tensor]  # prompts -> (B, L, D)


class PromptEncoder(Protocol):
    """Where embeddings come from.

    Attributes:
        length: tokens that prompts are padded to; None: the model's own number.
        workers: how many prompts may be under way at once, each in a call of its own.
        cut: prompts that were longer than the length, of which a part was left out.
    """

    length: int | None
    workers: int
    cut: list[str]

    def identity(self, source: ModelSource, dtype: torch.dtype) -> str:
        """What an embedding depends on beside its prompt. Two encoders of one identity share cache entries."""

    def load(self, source: ModelSource, device: torch.device, dtype: torch.dtype) -> Encode:
        """A function from prompts to embeddings."""

    def close(self) -> None:
        """Let go of what is under way."""


def check_length(length: object) -> None:
    if length is not None and (not isinstance(length, int) or isinstance(length, bool) or length < 1):
        raise ValueError(f"text_encoder.length={length!r} must be a whole number from 1, or null")


class LocalTextEncoder:
    """The model's own text encoder on this machine.

    Args:
        length: tokens that prompts are padded to; the model's own length by default.
        storage: `nf4` or `int8`: the layers' weights are kept in 4 or 8 bits; by default in the run's dtype.
    """

    workers = 1

    def __init__(self, length: int | None = None, storage: Storage | None = None) -> None:
        check_length(length)
        check_storage(storage, "text_encoder.storage")
        self.length, self.storage = length, storage
        self.cut: list[str] = []

    def identity(self, source: ModelSource, dtype: torch.dtype) -> str:
        return text_encoder_identity(source, self.length or source.variant.text.length, dtype, self.storage)

    def load(self, source: ModelSource, device: torch.device, dtype: torch.dtype) -> Encode:
        encoder = load_text_encoder(source, device, dtype, self.storage)
        self.cut = encoder.cut
        return lambda prompts: encoder.encode(prompts, self.length)

    def close(self) -> None:
        return
