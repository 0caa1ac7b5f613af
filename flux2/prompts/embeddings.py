"""The pipeline's embeddings, computed once per prompt.

They come from a text encoder on this machine, loaded when needed and freed at once unless it is to stay; from a server
(flux2/prompts/remote_client.py); or from a file (flux2/prompts/saved.py).
"""

import gc
import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flux2.models.text_encoder import TextEncoder, TextStorage, check_storage
from flux2.models.variants import Variant
from flux2.prompts import saved as saved_prompts
from flux2.prompts.remote_client import Client, check_url
from flux2.prompts.saved import SavedPrompts
from flux2.utils import checks
from flux2.utils.files import user_path
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
        if self.storage is not None and self.external_source:
            raise ValueError(
                f"text_storage={self.storage!r} has no effect with {self.external_source}: no text encoder is loaded. "
                "Remove one of them"
            )

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
    saved = None if embeddings is None else SavedPrompts(user_path(embeddings), variant)
    if saved is not None and (server or text_encoder) is not None:
        given = f"embeddings={str(saved.file)!r} and text_encoder={server or text_encoder!r}"
        raise ValueError(f"{given} exclude each other")
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
            encode, cut = self._encode_function(unknown, tokens)
            for prompt in unknown:
                self.known[prompt, tokens] = encode(prompt).to("cpu", self.dtype)
            if cut:
                log.warning("truncated %d prompts to %d tokens, e.g. %.80r", len(cut), tokens, cut[0])
                cut.clear()
            if self.encoder is not None and not self.text.keep:
                del encode
                self.encoder = None
                free_memory(self.device)
        return torch.cat([self.known[prompt, tokens] for prompt in prompts])

    def save(self, file: str | os.PathLike[str], prompts: Sequence[str], length: int | None = None) -> None:
        """Write the embeddings of `prompts` to `file`, for `embeddings=file`, and that of the empty prompt if the model
        may need it for classifier-free guidance.
        """
        empty = [] if self.source.variant.transformer.guidance else [""]
        wanted = [*dict.fromkeys([*checks.strings("prompts", prompts), *empty])]
        by_prompt = dict(zip(wanted, self.get(wanted, length), strict=True))
        saved_prompts.write(user_path(file), self.source.variant, by_prompt, self._tokens(length))

    def _tokens(self, length: int | None) -> int:
        if length is None:
            return self.source.variant.text.length
        return checks.integer("length", length, 1, checks.MAX_LENGTH)

    def _encode_function(self, prompts: list[str], length: int) -> tuple[Callable[[str], Tensor], list[str]]:
        """Return a function from one of `prompts` to its embedding, and the list of prompts that it truncated."""
        if self.text.saved is not None:
            self.text.saved.check(prompts, length)
            return self.text.saved.get, []
        if self.text.server is not None:
            client = Client(self.text.server, self.source.variant, length)
            return lambda prompt: client.encode([prompt]), client.cut
        if self.encoder is None:
            self.encoder = load_text_encoder(self.source, self.device, self.dtype, self.text.storage)
        encoder = self.encoder
        return lambda prompt: encoder.encode([prompt], length), encoder.cut


def free_memory(device: torch.device) -> None:
    """Free memory that nothing refers to."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
