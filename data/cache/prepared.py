"""The cached form of a dataset, which training reads."""

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
    """Cache entries of the samples, and the keys of the prompts' embeddings."""

    cache: Cache
    entries: tuple[LatentEntry, ...]
    prompts: dict[str, str]  # key of each prompt's embedding
    contents: tuple[str, ...]  # digest of each sample's target image
    pixels: tuple[str, ...] = ()  # likewise, but equal for copies that differ only in metadata
    references: tuple[tuple[str, ...], ...] = ()  # such digests of each sample's references
    lease: Lease | None = field(default=None, compare=False, repr=False)  # prevents pruning while this object exists

    def embeddings(self, prompts: Sequence[str]) -> Tensor:
        """Return the embeddings (B, L, D) of prompts, read from the cache."""
        keys = [self.prompts[prompt] for prompt in prompts]
        return torch.stack([unpack(self.cache, key, self.cache.get(key)) for key in keys])
