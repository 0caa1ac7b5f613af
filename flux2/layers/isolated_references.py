"""References that see themselves alone, as in FLUX.2-klein-9B-KV.

Of the tokens [text, image, references], text and image attend to all, references to references only, and references are
modulated at time 0. Nothing in them then depends on the prompt, the noisy image or the time: their rotated keys and
values are computed at the first step of sampling and joined at the later ones, which have text and image tokens only.
Training computes all tokens at each step, with the same attention.
Source: diffusers' `Flux2KVAttnProcessor` and Flux2KleinKVPipeline.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flux2.layers.attention import attend, attention

# shift, scale, gate; each (B, 1, D), or (B, 2, D) with that of isolated references
Modulation = tuple[Tensor, Tensor, Tensor]
NO_CACHE = (
    "reference_cache=True: references of this model see the prompt and the noisy image, so their keys and values "
    "change at every step and cannot be cached. Use klein_9b_kv, which was trained for it, or leave it out"
)


@dataclass
class BlockCache:
    """Rotated keys and values of the references in one block, each (B, H, R, head_dim); None before the first step."""

    keys: Tensor | None = None
    values: Tensor | None = None


@dataclass
class ReferenceCache:
    """The caches of all blocks, in the order of the forward; an empty one is filled by a forward with references."""

    blocks: list[BlockCache] = field(default_factory=list)


def isolated_attention(q: Tensor, k: Tensor, v: Tensor, references: int, cache: BlockCache | None) -> Tensor:
    """Return attention (B, H, L, head_dim) in which the last `references` tokens see each other alone.

    Keys and values of references are stored in `cache`, or without references among the tokens come from it.
    """
    if not references:
        assert cache is not None, "without references and cache, attention is full"
        assert cache.keys is not None, "the cache is filled by a forward with references"
        assert cache.values is not None
        return attention(q, torch.cat([k, cache.keys], dim=2), torch.cat([v, cache.values], dim=2))
    others = q.shape[2] - references
    if cache is not None:  # copies, because slices would keep those of all tokens
        cache.keys, cache.values = k[:, :, others:].clone(), v[:, :, others:].clone()
    seeing_all = attention(q[:, :, :others], k, v)
    # selective recomputation keeps one attention of a block, the larger one, and computes this one again
    alone = attend(q[:, :, others:], k[:, :, others:], v[:, :, others:])
    return torch.cat([seeing_all, alone], dim=2)


def in_parts(compute: Callable[..., Tensor], references: int, tokens: list[Tensor], modulation: list[Tensor]) -> Tensor:
    """Return `compute(*tokens, *modulation)`, for the last `references` tokens with their own modulation.

    Args:
        tokens: Tensors (B, L, D).
        modulation: Tensors (B, 1, D), or (B, 2, D) with references, whose modulation is the second.
    """
    if not references:
        return compute(*tokens, *modulation)
    others = tokens[0].shape[1] - references
    split = [one.split([others, references], dim=1) for one in tokens]
    chosen = [one.split(1, dim=1) for one in modulation]
    return torch.cat([compute(*(one[i] for one in (*split, *chosen))) for i in range(2)], dim=1)


def add_gated(x: Tensor, change: Tensor, gate: Tensor) -> Tensor:
    return torch.addcmul(x, gate, change)


def joined(tokens: list[Modulation], references: list[Modulation]) -> list[Modulation]:
    """Return sets of (shift, scale, gate), each (B, 2, D), from those of other tokens and of isolated references."""
    pairs = zip(tokens, references, strict=True)
    return [tuple(torch.cat(one, dim=1) for one in zip(*pair, strict=True)) for pair in pairs]  # type: ignore[misc]


def isolation(references: int, cache: BlockCache | None) -> tuple[Any, ...]:
    """Return the further arguments of a block: none unless there are isolated references."""
    return (references, cache) if cache is not None else (references,) if references else ()
