"""The pipeline's embeddings, computed once per prompt.

They come from a text encoder on this machine, loaded when needed and freed at once unless it is to stay; from a server
(flux2/prompts/remote_client.py); or from a file (flux2/prompts/saved.py).
"""

from __future__ import annotations

import gc
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flux2.models.text_encoder import TextEncoder, TextStorage, check_storage
from flux2.models.variants import Variant
from flux2.prompts import saved as saved_prompts
from flux2.prompts.remote_client import Client, check_url
from flux2.prompts.saved import SavedPrompts
from flux2.utils import checks
from flux2.weights.loading import load_text_encoder
from flux2.weights.sources import ModelSource

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TextSource:
    """Where embeddings come from. Raises ValueError for settings that contradict each other."""

    server: str | None = None  # address of a text encoder on another machine
    saved: SavedPrompts | None = None  # file with embeddings
    storage: TextStorage | None = None  # of the local text encoder's layers; None for the pipeline's dtype
    keep: bool = False  # whether the local text encoder stays in memory

    def __post_init__(self) -> None:
        check_storage(self.storage, "text_storage")
        if self.storage is not None and (self.server or self.saved):
            raise ValueError(
                f"text_storage={self.storage!r} has no effect with {self.external_source}: no text encoder is loaded. "
                "Remove one of them"
            )
        if self.server and self.saved:
            raise ValueError(f"embeddings={str(self.saved.file)!r} and text_encoder={self.server!r} exclude each other")

    @property
    def external_source(self) -> str:
        """What replaces the local text encoder; empty if nothing does."""
        return f"the server {self.server}" if self.server else f"the file {self.saved.file}" if self.saved else ""


def text_source(
    variant: Variant, text_encoder: str | None, embeddings: str | os.PathLike[str] | None, storage: TextStorage | None
) -> tuple[TextSource, str | None]:
    """Return the source of embeddings, and the folder or repository of the text encoder, if one is given."""
    server = None
    if isinstance(text_encoder, str) and re.match(r"https?:", text_encoder):
        try:
            server, text_encoder = check_url(text_encoder), None
        except ValueError as error:
            raise ValueError(f"model.text_encoder: {error}") from error
    saved = None if embeddings is None else SavedPrompts(Path(embeddings).expanduser(), variant)
    if saved is not None and text_encoder is not None:
        raise ValueError(f"embeddings={str(saved.file)!r} and text_encoder={text_encoder!r} exclude each other")
    return TextSource(server, saved, storage), text_encoder


class Prompts:
    """Embeddings of prompts, each obtained once."""

    def __init__(self, source: ModelSource, device: torch.device, dtype: torch.dtype, text: TextSource) -> None:
        self.source, self.device, self.dtype, self.text = source, device, dtype, text
        self.encoder: TextEncoder | None = None
        self.known: dict[tuple[str, int], Tensor] = {}

    def get(self, prompts: Sequence[str], length: int | None = None) -> Tensor:
        """Return embeddings (B, T, text_width), with T = `length`, by default that of the model's training.

        Raises TypeError or ValueError, also from the source of the embeddings.
        """
        prompts = checks.strings("prompts", prompts)
        tokens = self._tokens(length)
        unknown = [prompt for prompt in dict.fromkeys(prompts) if (prompt, tokens) not in self.known]
        if unknown:
            find = self._read if self.text.saved else self._request if self.text.server else self._compute
            if cut := find(unknown, tokens):
                log.warning("truncated %d prompts to %d tokens, e.g. %.80r", len(cut), tokens, cut[0])
        return torch.cat([self.known[prompt, tokens] for prompt in prompts])

    def save(self, file: str | os.PathLike[str], prompts: Sequence[str], length: int | None = None) -> None:
        """Write the embeddings of `prompts` to `file`, for `embeddings=file`, and that of the empty prompt if the model
        may need it for classifier-free guidance.
        """
        wanted = [*dict.fromkeys(checks.strings("prompts", prompts))]
        if not self.source.variant.transformer.guidance and "" not in wanted:
            wanted.append("")
        embeddings = self.get(wanted, length)
        by_prompt = dict(zip(wanted, embeddings, strict=True))
        saved_prompts.write(Path(file).expanduser(), self.source.variant, by_prompt, self._tokens(length))

    def _tokens(self, length: int | None) -> int:
        if length is None:
            return self.source.variant.text.length
        return checks.integer("length", length, 1, checks.MAX_LENGTH)

    # Each of these functions adds the embeddings of `prompts` to `known` and returns the prompts that were truncated.

    def _read(self, prompts: Sequence[str], length: int) -> list[str]:
        assert self.text.saved is not None
        self.text.saved.check(list(prompts), length)
        for prompt in prompts:
            self.known[prompt, length] = self.text.saved.get(prompt).to(self.dtype)
        return []

    def _request(self, prompts: Sequence[str], length: int) -> list[str]:
        assert self.text.server is not None
        client = Client(self.text.server, self.source.variant, length)
        for prompt in prompts:
            self.known[prompt, length] = client.encode([prompt]).to(self.dtype)
        return client.cut

    def _compute(self, prompts: Sequence[str], length: int) -> list[str]:
        if self.encoder is None:
            self.encoder = load_text_encoder(self.source, self.device, self.dtype, self.text.storage)
        for prompt in prompts:
            self.known[prompt, length] = self.encoder.encode([prompt], length).cpu()
        cut = list(self.encoder.cut)
        self.encoder.cut.clear()
        if not self.text.keep:
            self.encoder = None
            free_memory(self.device)
        return cut


def free_memory(device: torch.device) -> None:
    """Free memory that nothing refers to."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
