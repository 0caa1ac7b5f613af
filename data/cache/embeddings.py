"""Which cache entries the prompts need, how they are filled, and how an embedding is stored in a quarter of its size.

An embedding of dev is 512 tokens of 15360 numbers, 15.7 MB in bfloat16; of ten thousand captions that is 157 GB. With
`fp8` it is kept in e4m3, 8 bits a number, with one float32 scale for each group of at most 128 neighbors: 8.1 MB. The
groups are small because a language model's states have a few numbers that are a thousand times larger than the rest,
and with one scale a token these would leave nothing of the others. benchmarks/embedding_storage.py measures what that
does to the loss.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data.cache.store import Cache, Progress, Shape, check_finite, each, share
from data.sources.images import shortened

EMBEDDING_SHAPE: Shape = (None, None)
GROUP = 128  # neighbors that share a scale, at most
FP8_MAX = torch.finfo(torch.float8_e4m3fn).max


@dataclass(frozen=True)
class EmbeddingPlan:
    """`keys` maps each prompt to its entry; with `fp8` entries are stored packed."""

    cache: Cache
    keys: Mapping[str, str]
    fp8: bool = False

    @property
    def missing(self) -> int:
        """How many entries are not in the cache now, or not whole."""
        return sum(map(self.lacks, set(self.keys.values())))

    def lacks(self, key: str) -> bool:
        return not self.cache.holds(key, "embeddings", EMBEDDING_SHAPE)

    def size(self, length: int, width: int, dtype: torch.dtype) -> int:
        """Bytes of one entry's content, for embeddings (length, width) of `dtype`."""
        return length * (width + 4 * width // _group(width)) if self.fp8 else length * width * dtype.itemsize

    def fill(
        self,
        encode: Callable[[list[str]], Tensor],
        process_index: int = 0,
        num_processes: int = 1,
        progress: Progress | None = None,
        workers: int = 1,
    ) -> None:
        """Computes this process's share of the missing entries, storing each as soon as it is there.

        `encode` takes one prompt, in a list, and returns (1, L, D), any float dtype and device. Stored as "embeddings",
        (L, D). Raises ValueError, naming the prompt, if it is not finite.

        With several `workers` it is called by as many threads at once, for encoders that wait for an answer. When one
        call raises, no other begins; those under way are stored if they end well, after this has raised.
        """
        prompts = {key: prompt for prompt, key in self.keys.items()}

        def compute(key: str) -> int:
            embeddings = encode([prompts[key]])
            shape = tuple(embeddings.shape)
            assert len(shape) == 3, f"encode returned {shape}, not (1, L, D)"
            assert shape[0] == 1, f"encode returned {shape}, not (1, L, D)"
            check_finite(embeddings, f"the text encoder's embedding of prompt {shortened(prompts[key])!r}")
            tensors = packed(embeddings[0]) if self.fp8 else {"embeddings": embeddings[0]}
            return self.cache.put(key, tensors, {"prompt": prompts[key]})

        self.cache.sweep()
        each(compute, share(self.cache, self.lacks, list(prompts), process_index, num_processes), workers, progress)


def plan_embeddings(cache: Cache, prompts: Sequence[str], encoder_id: str, fp8: bool = False) -> EmbeddingPlan:
    """Finds the key of every distinct prompt.

    `encoder_id` is a fingerprint of all else that shapes an embedding: weights, dtype, template, length, layers read.
    """
    storage = {"storage": "fp8"} if fp8 else {}
    keys = {prompt: cache.key("embeddings", prompt=prompt, encoder=encoder_id, **storage) for prompt in prompts}
    return EmbeddingPlan(cache, keys, fp8)


def packed(embeddings: Tensor) -> dict[str, Tensor]:
    """(L, D) -> "embeddings" (L, D) in float8_e4m3fn and "scales" (L, groups) in float32, on the same device."""
    grouped = embeddings.float().unflatten(-1, (-1, _group(embeddings.shape[-1])))  # (L, groups, group)
    scales = grouped.abs().amax(-1) / FP8_MAX
    scales = torch.where(scales > 0, scales, torch.ones_like(scales))  # of zeros, or nearly
    values = (grouped / scales[..., None]).clamp(-FP8_MAX, FP8_MAX)
    return {"embeddings": values.flatten(-2).to(torch.float8_e4m3fn), "scales": scales}


def unpacked(cache: Cache, key: str, tensors: Mapping[str, Tensor], shape: Shape = EMBEDDING_SHAPE) -> Tensor:
    """The embeddings (L, D) of the entry `key`, as read: in its dtype, of a packed one in float32.

    ValueError, naming the entry, if it holds no embeddings of `shape`.
    """
    found = cache.pick(key, tensors, "embeddings", shape)
    if found.dtype != torch.float8_e4m3fn:
        return found
    length, width = found.shape
    scales = cache.pick(key, tensors, "scales", (length, width // _group(width)))
    grouped = found.float().unflatten(-1, (scales.shape[1], -1))
    return (grouped * scales[..., None]).flatten(-2)


def _group(width: int) -> int:
    return math.gcd(width, GROUP)
