"""The cached form of a dataset: what training reads of every sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from data.cache.embeddings import unpacked
from data.cache.latents import LatentEntry
from data.cache.pruning import Lease
from data.cache.store import Cache


@dataclass(frozen=True)
class CachedDataset:
    """What training reads from the cache: an entry a sample, and the key of every prompt's embedding.

    As long as it is there, nothing is pruned from the cache. `contents` is the digest of each sample's target.
    """

    cache: Cache
    entries: tuple[LatentEntry, ...]
    prompts: dict[str, str]
    contents: tuple[str, ...]
    lease: Lease | None = field(default=None, compare=False, repr=False)

    def embeddings(self, prompts: Sequence[str]) -> Tensor:
        """(B, L, D), read from the cache."""
        keys = [self.prompts[prompt] for prompt in prompts]
        return torch.stack([unpacked(self.cache, key, self.cache.get(key)) for key in keys])
