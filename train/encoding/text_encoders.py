"""What turns prompts into embeddings before training: the group `text_encoder`."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from flux2.models.text_encoder import TextStorage, check_storage
from flux2.prompts.remote_client import Client, ProtocolName, check_patience, check_url, pick_protocol
from flux2.prompts.remote_protocol import Unreachable
from flux2.weights.loading import embedding_identity, load_text_encoder, text_encoder_fingerprint
from flux2.weights.sources import ModelSource

MOST_CONCURRENT_REQUESTS = 64
log = logging.getLogger(__name__)
Encode = Callable[[list[str]], Tensor]  # prompts -> (B, L, D)


class PromptEncoder(Protocol):
    """Where embeddings come from.

    Attributes:
        length: tokens that prompts are padded to; None: the model's own number.
        workers: how many prompts may be under way at once, each in a call of its own.
        here: whether it takes memory of this machine; storage: the form that its layers' weights have then.
        cut: prompts that were longer than the length, of which a part was left out.
    """

    here: bool
    storage: TextStorage | None
    length: int | None
    workers: int
    cut: list[str]

    def identity(self, source: ModelSource, dtype: torch.dtype) -> str:
        """What an embedding depends on beside its prompt. Two encoders of one identity share cache entries."""

    def load(self, source: ModelSource, device: torch.device, dtype: torch.dtype) -> Encode:
        """A function from prompts to embeddings."""

    def close(self) -> None:
        """Let go of what is under way."""


def check_count(name: str, value: object, most: float = math.inf) -> None:
    """Raises ValueError, naming the setting, unless `value` is a whole number from 1 to `most`."""
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        limit = f"to {most}" if most < math.inf else "on"
        raise ValueError(f"text_encoder.{name}={value!r} must be a whole number from 1 {limit}")


class LocalTextEncoder:
    """The model's own text encoder on this machine.

    Args:
        length: tokens that prompts are padded to; the model's own length by default.
        storage: `nf4` or `int8`: the layers' weights are kept in 4 or 8 bits; by default in the run's dtype.
    """

    here = True
    workers = 1

    def __init__(self, length: int | None = None, storage: TextStorage | None = None) -> None:
        if length is not None:
            check_count("length", length)
        check_storage(storage, "text_encoder.storage")
        self.length, self.storage = length, storage
        self.cut: list[str] = []

    def identity(self, source: ModelSource, dtype: torch.dtype) -> str:
        text, files = source.variant.text, text_encoder_fingerprint(source)
        return embedding_identity(text, files, self.length or text.length, dtype, self.storage)

    def load(self, source: ModelSource, device: torch.device, dtype: torch.dtype) -> Encode:
        encoder = load_text_encoder(source, device, dtype, self.storage)
        self.cut = encoder.cut
        return lambda prompts: encoder.encode(prompts, self.length)

    def close(self) -> None:
        return


class RemoteTextEncoder:
    """A text encoder on another machine: of `python -m flux2.serve`, or the published endpoint for dev.

    Its embeddings share cache entries with a local encoder's only if the server says that they are the same.

    Args:
        url: of the server.
        protocol: `flux2` or `published`; by default what the address speaks (flux2/prompts/remote_client.py).
        length: tokens that prompts are padded to; the model's own length by default.
        max_concurrent_requests: prompts that are asked for at once, each in a request of its own.
        timeout: seconds until an answer must be there.
        attempts: that are made in all for one prompt.
        wait: seconds before the second attempt; doubled for each one after it.
    """

    here = False
    storage = None

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
            check_count("length", length)
        check_count("max_concurrent_requests", max_concurrent_requests, MOST_CONCURRENT_REQUESTS)
        try:
            check_patience(timeout, attempts, wait)
            pick_protocol(check_url(url), protocol)
        except ValueError as error:
            raise ValueError(f"text_encoder.{error}") from error
        self.url, self.protocol, self.length, self.max_concurrent_requests = (
            url,
            protocol,
            length,
            max_concurrent_requests,
        )
        self.timeout, self.attempts, self.wait = timeout, attempts, wait
        self.cut: list[str] = []
        self._client: Client | None = None

    @property
    def workers(self) -> int:
        return self.max_concurrent_requests

    def identity(self, source: ModelSource, dtype: torch.dtype) -> str:
        """`dtype` does not matter: the server has its own.

        If the server gives no answer, it is what `source.fingerprints` knows of it, after a warning: with a full cache
        the server need not run. Raises Unreachable if nothing is known, RemoteError for what the server refuses.
        """
        client, known = self.client(source), source.fingerprints
        name = f"text encoder at {self.url} for {source.variant.name}, {client.length} tokens"
        try:
            found = client.identity()
        except Unreachable as error:
            kept = known.get(name) if known is not None else None
            if kept is None:
                raise
            log.warning("using what is cached of the %s (%s)", name, error)
            return kept
        if known is not None:
            known.set(name, found)
        return found

    def load(self, source: ModelSource, device: torch.device, dtype: torch.dtype) -> Encode:
        client = self.client(source)
        self.cut = client.cut
        return client.encode

    def client(self, source: ModelSource) -> Client:
        if self._client is None:
            self._client = Client(
                self.url,
                source.variant,
                self.length,
                protocol=self.protocol,
                timeout=self.timeout,
                attempts=self.attempts,
                wait=self.wait,
            )
        return self._client

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None
