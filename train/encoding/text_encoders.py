"""Text encoders that compute embeddings before training: the group `text_encoder`."""

import logging
from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from flux2.models.text_encoder import TextStorage, check_storage
from flux2.models.variants import Variant
from flux2.prompts.remote_client import PUBLISHED, Client, ProtocolName, check_patience, check_url, pick_protocol
from flux2.prompts.remote_protocol import Unreachable
from flux2.utils.checks import MAX_LENGTH
from flux2.weights.loading import embedding_identity, load_text_encoder, text_encoder_fingerprint
from flux2.weights.sources import ModelSource
from train.utils.checks import check_count

MOST_CONCURRENT_REQUESTS = 64
AutoName = Literal["auto"]
AUTO: AutoName = "auto"  # a value that memory=auto chooses
log = logging.getLogger(__name__)
Encode = Callable[[list[str]], Tensor]  # prompts -> (B, L, D)


class PromptEncoder(Protocol):
    """Source of embeddings."""

    def check(self, variant: Variant) -> None:
        """Raise ValueError if it is known not to have the embeddings of `variant`."""

    here: bool  # whether it runs on this machine and takes its memory
    storage: TextStorage | None  # of its layers' weights on this machine; None is the run's dtype
    device: str | None  # cpu, or None for that of the run
    length: int | None  # number of tokens that prompts are padded to; None is the model's own
    max_concurrent_requests: int  # number of concurrent calls, one prompt each
    cut: list[str]  # prompts that were truncated to the length

    def identity(self, source: ModelSource, dtype: torch.dtype) -> str:
        """Return everything besides the prompt that determines an embedding, for the cache key."""

    def load(self, source: ModelSource, device: torch.device, dtype: torch.dtype) -> Encode:
        """Return a function from prompts to embeddings."""

    def close(self) -> None:
        """Cancel running calls and free resources."""


class LocalTextEncoder:
    """The model's own text encoder on this machine, with the attributes of `PromptEncoder`.

    `auto` is what memory=auto chooses (train/stages/memory.py). Until then, and without it, it is None: not quantized,
    on the device of the run.
    """

    here = True
    max_concurrent_requests = 1

    def __init__(
        self, length: int | None = None, storage: TextStorage | AutoName | None = None, device: str | None = None
    ) -> None:
        if length is not None:
            check_count("text_encoder.length", length, 1, MAX_LENGTH)
        if device not in (None, "cpu", AUTO):
            raise ValueError(f"text_encoder.device={device!r} must be cpu, {AUTO}, or null: the device of the run")
        self.length, self.device = length, None if device == AUTO else device
        self.storage: TextStorage | None = None if storage == AUTO else storage
        check_storage(self.storage, "text_encoder.storage", f"{AUTO}, or null")
        self.cut: list[str] = []

    def check(self, variant: Variant) -> None:
        return

    def identity(self, source: ModelSource, dtype: torch.dtype) -> str:
        text, files = source.variant.text, text_encoder_fingerprint(source)
        return embedding_identity(text, files, self.length or text.length, dtype, self.storage)

    def load(self, source: ModelSource, device: torch.device, dtype: torch.dtype) -> Encode:
        encoder = load_text_encoder(source, self.device or device, dtype, self.storage)
        self.cut = encoder.cut
        return lambda prompts: encoder.encode(prompts, self.length)

    def close(self) -> None:
        return


class RemoteTextEncoder:
    """A text encoder on another machine: `python -m flux2.serve`, or the published endpoint for dev.

    Its embeddings share cache entries with a local encoder's only if the server reports the same identity.

    Args:
        length, max_concurrent_requests: As in `PromptEncoder`.
        protocol, timeout, attempts, wait: As in `flux2.prompts.remote_client.Client`.
    """

    here = False
    storage = None
    device = None

    def __init__(
        self,
        url: str,
        protocol: ProtocolName | None = None,
        length: int | None = None,
        max_concurrent_requests: int = 4,
        timeout: float = 120.0,
        attempts: int = 8,
        wait: float = 1.0,
    ) -> None:
        if length is not None:
            check_count("text_encoder.length", length, 1, MAX_LENGTH)
        check_count("text_encoder.max_concurrent_requests", max_concurrent_requests, 1, MOST_CONCURRENT_REQUESTS)
        try:
            check_patience(timeout, attempts, wait)
            pick_protocol(check_url(url), protocol)
        except ValueError as error:
            raise ValueError(f"text_encoder.{error}") from error
        self.url, self.protocol, self.length = url, protocol, length
        self.max_concurrent_requests = max_concurrent_requests
        self.timeout, self.attempts, self.wait = timeout, attempts, wait
        self.cut: list[str] = []
        self._client: Client | None = None

    def check(self, variant: Variant) -> None:
        """Raise ValueError if `url` is Hugging Face's endpoint for dev, and `variant` is another model."""
        if check_url(self.url) == PUBLISHED and variant.name != "dev":
            raise ValueError(
                f"text_encoder.url={self.url} is the text encoder of model=dev, not of model={variant.name}. Set "
                "text_encoder=local, or text_encoder.url=... of a `python -m flux2.serve` for this model"
            )

    def identity(self, source: ModelSource, dtype: torch.dtype) -> str:
        """Return the identity that the server reports; `dtype` is ignored, because the server has its own.

        If the server does not answer, returns the identity stored in `source.fingerprints`, after a warning: with a
        full cache the server need not run. Raises Unreachable if there is none, RemoteError if the server refuses.
        """
        client, known = self.client(source), source.fingerprints
        name = f"text encoder at {self.url} for {source.variant.name}, {client.length} tokens"
        try:
            identity = client.identity()
        except Unreachable as error:
            if known is None or (stored := known.get(name)) is None:
                raise
            log.warning("using cached embeddings of the %s (%s)", name, error)
            return stored
        if known is not None:
            known.set(name, identity)
        return identity

    def load(self, source: ModelSource, device: torch.device, dtype: torch.dtype) -> Encode:
        client = self.client(source)
        self.cut = client.cut
        return client.encode

    def client(self, source: ModelSource) -> Client:
        if self._client is None:
            patience: dict[str, Any] = {"timeout": self.timeout, "attempts": self.attempts, "wait": self.wait}
            self._client = Client(self.url, source.variant, self.length, protocol=self.protocol, **patience)
        return self._client

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None
