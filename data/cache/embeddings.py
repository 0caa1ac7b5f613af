"""Cache entries of prompts: their keys, filling them, and storage of embeddings in FP8.

An embedding of dev is 512 tokens of 15360 numbers, 15.7 MB in bfloat16; ten thousand captions need 157 GB. With `fp8`
it is stored in e4m3, 8 bits per number, with one float32 scale for each group of at most 128 neighbors: 8.1 MB. The
groups are small because a language model's states have a few numbers that are a thousand times larger than the rest;
with one scale per token these would leave nothing of the others. benchmarks/embedding_storage.py measures the effect on
the loss.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data.cache.store import Cache, Progress, Shape, check_finite, fill_share, share_of
from data.sources.images import shorten

EMBEDDING_SHAPE: Shape = (None, None)
GROUP = 128  # maximum number of neighbors that share a scale
FP8_MAX = torch.finfo(torch.float8_e4m3fn).max


class PromptKeys(Mapping[str, str]):
    """The cache key of each prompt's embedding, made when it is asked for: a million of them take 113 MB."""

    def __init__(self, prompts: Iterable[str], recipe: Mapping[str, str]) -> None:
        self._prompts, self._key_of = dict.fromkeys(prompts), Cache.keys("embeddings", "prompt", **recipe)

    def __getitem__(self, prompt: str) -> str:
        if prompt not in self._prompts:
            raise KeyError(prompt)
        return self._key_of(prompt)

    def __contains__(self, prompt: object) -> bool:
        return prompt in self._prompts

    def __iter__(self) -> Iterator[str]:
        return iter(self._prompts)

    def __len__(self) -> int:
        return len(self._prompts)


@dataclass(frozen=True)
class EmbeddingPlan:
    """The cache key of each prompt's embedding; with `fp8` entries are stored packed."""

    cache: Cache
    keys: Mapping[str, str]
    fp8: bool = False

    @property
    def missing(self) -> int:
        """The number of entries that are missing from the cache or incomplete."""
        return len(self.cache.lacking(self.keys.values(), expected_tensor))

    def missing_in(self, process_index: int, num_processes: int) -> int:
        """Return the number of missing entries in one process's share."""
        keys = share_of(self.cache, list(self.keys.values()), process_index, num_processes)
        return len(self.cache.lacking(keys, expected_tensor))

    def size(self, length: int, width: int, dtype: torch.dtype) -> int:
        """Return the bytes of one entry's tensors, for embeddings (length, width) of `dtype`."""
        return embedding_bytes(length, width, dtype, self.fp8)

    def fill(
        self,
        encode: Callable[[list[str]], Tensor],
        process_index: int = 0,
        num_processes: int = 1,
        progress: Progress | None = None,
        workers: int = 1,
    ) -> None:
        """Compute this process's share of the missing entries and store each as soon as it is ready.

        `encode` takes one prompt, in a list, and returns (1, L, D) in any float dtype, on any device. The entry has a
        tensor "embeddings" (L, D). Raises ValueError, naming the prompt, if it is not finite.

        With several `workers`, as many threads call `encode` at once, for encoders that wait for a server. After an
        exception no further call starts; running ones still store their results.
        """
        prompts = {key: prompt for prompt, key in self.keys.items()}

        def compute(key: str) -> int:
            embeddings = encode([prompts[key]])
            assert embeddings.shape[:-2] == (1,), f"encode returned {embeddings.shape}, not (1, L, D)"
            check_finite(embeddings, f"the text encoder's embedding of prompt {shorten(prompts[key])!r}")
            tensors = pack(embeddings[0]) if self.fp8 else {"embeddings": embeddings[0]}
            return self.cache.put(key, tensors, {"prompt": prompts[key]})

        fill_share(self.cache, expected_tensor, list(prompts), compute, process_index, num_processes, progress, workers)


def embedding_bytes(length: int, width: int, dtype: torch.dtype, fp8: bool) -> int:
    """Return the bytes of the tensors of an embedding (length, width) of `dtype`, or packed with `fp8`."""
    return length * (width + 4 * width // _group(width)) if fp8 else length * width * dtype.itemsize


def plan_embeddings(cache: Cache, prompts: Sequence[str], encoder_id: str, fp8: bool = False) -> EmbeddingPlan:
    """Return the plan for all distinct prompts.

    `encoder_id` is a fingerprint of everything else that determines an embedding: weights, dtype, template, length, and
    the layers whose states are used.
    """
    storage = {"storage": "fp8"} if fp8 else {}
    return EmbeddingPlan(cache, PromptKeys(prompts, {"encoder": encoder_id, **storage}), fp8)


def expected_tensor(key: str) -> tuple[str, Shape]:
    """Return name and shape of an entry's tensor."""
    return "embeddings", EMBEDDING_SHAPE


def pack(embeddings: Tensor) -> dict[str, Tensor]:
    """Return "embeddings" (L, D) in float8_e4m3fn and "scales" (L, groups) in float32, on the device of the input."""
    grouped = embeddings.float().unflatten(-1, (-1, _group(embeddings.shape[-1])))  # (L, groups, group)
    scales = grouped.abs().amax(-1) / FP8_MAX
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))  # for groups of zeros, or nearly so
    values = (grouped / scales[..., None]).clamp(-FP8_MAX, FP8_MAX)
    return {"embeddings": values.flatten(-2).to(torch.float8_e4m3fn), "scales": scales}


def unpack(cache: Cache, key: str, tensors: Mapping[str, Tensor], shape: Shape = EMBEDDING_SHAPE) -> Tensor:
    """Return the embeddings (L, D) in the tensors of entry `key`: in their dtype, or float32 if they are packed.

    Raises ValueError, naming the entry, if there are no embeddings of `shape`.
    """
    stored = cache.pick(key, tensors, "embeddings", shape)
    if stored.dtype != torch.float8_e4m3fn:
        return stored
    length, width = stored.shape
    scales = cache.pick(key, tensors, "scales", (length, width // _group(width)))
    grouped = stored.float().unflatten(-1, (scales.shape[1], -1))
    return (grouped * scales[..., None]).flatten(-2)


def _group(width: int) -> int:
    return math.gcd(width, GROUP)
