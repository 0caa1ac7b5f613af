"""The cached form of a dataset, which training reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from data.cache.embeddings import unpack
from data.cache.latents import LatentEntry
from data.cache.pruning import Lease
from data.cache.store import Cache


@dataclass(frozen=True)
class CachedDataset:
    """Cache entries of the samples, and the keys of the prompts' embeddings.

    Attributes:
        prompts: Key of each prompt's embedding.
        contents: Digest of each sample's target image.
        lease: Lock that prevents pruning as long as this object exists.
    """

    cache: Cache
    entries: tuple[LatentEntry, ...]
    prompts: dict[str, str]
    contents: tuple[str, ...]
    lease: Lease | None = field(default=None, compare=False, repr=False)

    def embeddings(self, prompts: Sequence[str]) -> Tensor:
        """Return the embeddings (B, L, D) of prompts, read from the cache."""
        keys = [self.prompts[prompt] for prompt in prompts]
        return torch.stack([unpack(self.cache, key, self.cache.get(key)) for key in keys])
