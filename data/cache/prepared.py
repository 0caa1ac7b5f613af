"""The cached form of a dataset, which training reads."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self, overload

import torch
from torch import Tensor

from data.cache.embeddings import unpack
from data.cache.image_digests import pixel_digest
from data.cache.latents import LatentEntry, LatentPlan
from data.cache.pruning import Lease
from data.cache.store import Cache
from data.sources.images import Picture


class HexDigests(Sequence[str]):
    """The digests of images as hexadecimal texts, which are made when they are asked for: as texts they take 113 bytes.

    `part` 0 is the digest of the content, 1 that of the pixels.
    """

    def __init__(self, pictures: Sequence[Picture], part: int) -> None:
        self._pictures, self._bytes = pictures, slice(32 * part, 32 * part + 32)

    def __len__(self) -> int:
        return len(self._pictures)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        digests = self._pictures[index].digests
        assert digests is not None
        return digests[self._bytes].hex()


@dataclass(frozen=True)
class CachedDataset:
    """Cache entries of the samples, and the keys of the prompts' embeddings."""

    cache: Cache
    entries: tuple[LatentEntry, ...]
    prompts: Mapping[str, str]  # key of each prompt's embedding
    contents: Sequence[str]  # digest of each sample's target image
    pixels: Sequence[str] = ()  # likewise, but equal for copies that differ only in metadata
    references: tuple[tuple[str, ...], ...] = ()  # such digests of each sample's references
    lease: Lease | None = field(default=None, compare=False, repr=False)  # prevents pruning while this object exists

    @classmethod
    def from_plan(cls, plan: LatentPlan, prompts: Mapping[str, str], lease: Lease | None = None) -> Self:
        """Return the cached form of the samples of a plan; `prompts` has the key of each prompt's embedding."""
        targets = [plan.work[entry.key].picture for entry in plan.entries]
        references = tuple(
            tuple(pixel_digest(plan.work[key].picture) for key in entry.reference_keys) for entry in plan.entries
        )
        contents, pixels = HexDigests(targets, 0), HexDigests(targets, 1)
        return cls(plan.cache, plan.entries, prompts, contents, pixels, references, lease)

    def embeddings(self, prompts: Sequence[str]) -> Tensor:
        """Return the embeddings (B, L, D) of prompts, read from the cache."""
        keys = [self.prompts[prompt] for prompt in prompts]
        return torch.stack([unpack(self.cache, key, self.cache.get(key)) for key in keys])
