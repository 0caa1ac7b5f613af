"""Batches of a training step with captions, crops and dropout drawn, for any split into processes and micro-batches.

All randomness is a function of (seed, step, position of the sample in the global batch), not the state of a generator.
So a run resumes from its step number alone, and one process with a batch of 4 sees exactly what four processes with one
sample each see. PyTorch's DataLoader and DistributedSampler make the order depend on the number of processes instead.

Nothing is decoded here: latents and embeddings come from the cache, one file each, and stay in memory up to a limit.
A loader is not thread-safe.
"""

import itertools
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from data.buckets import Size
from data.cache import Cache
from data.cache.embeddings import EMBEDDING_SHAPE, unpack
from data.cache.latents import LatentEntry, latent_shape, mask_shape
from data.cache.store import Shape
from data.checks import check_int
from data.sampler import BucketSampler, derived_generator, larger_batches, pool_shapes


@dataclass(frozen=True)
class Batch:
    """Samples of one process's micro-batch, all of one shape."""

    latents: Tensor  # (B, 128, H/16, W/16) of the targets
    references: list[Tensor]  # (B, 128, h_i/16, w_i/16) for each reference i
    embeddings: Tensor  # (B, L, D) of the captions
    captions: list[str]  # "" where the caption was dropped
    indices: list[int]  # of the samples in the dataset
    positions: list[int]  # in the global batch; they determine noise and timesteps
    mask: Tensor | None = None  # (B, 1, H/16, W/16), weights in the loss from 0 to 1; None if no sample has a mask
    rejected: Tensor | None = None  # like latents, of the images that the targets are preferred over; None without
    weights: Tensor | None = None  # (B,) factors of the samples' losses; None is 1 for all

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "Batch":
        """Return the batch with its tensors on `device` as `dtype`, without waiting for the copies."""
        return replace(
            self,
            latents=copy_to_device(self.latents, device).to(dtype),
            references=[copy_to_device(reference, device).to(dtype) for reference in self.references],
            embeddings=copy_to_device(self.embeddings, device).to(dtype),
            mask=None if self.mask is None else copy_to_device(self.mask, device).to(dtype),
            rejected=None if self.rejected is None else copy_to_device(self.rejected, device).to(dtype),
            weights=None if self.weights is None else copy_to_device(self.weights, device).to(dtype),
        )


@dataclass(frozen=True)
class DrawnSample:
    """What a step trains at one position of the global batch."""

    position: int
    index: int  # of the sample in the dataset
    variant: int  # number of the crop or mirrored copy among `LatentEntry.variants`
    entry: LatentEntry  # that variant
    caption: str  # "" where it was dropped
    drops_caption: bool


def copy_to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Copy a CPU tensor to `device`, from pinned memory, so that the host need not wait for the GPU."""
    if torch.device(device).type != "cuda":
        return tensor.to(device)
    return pin(tensor).to(device, non_blocking=True)


def pin(tensor: Tensor) -> Tensor:
    """Return a CPU tensor in pinned memory, or as it is, with one warning, where the system has none left."""
    try:
        return tensor.pin_memory()
    except RuntimeError as error:
        warn_of_unpinned_memory(str(error).splitlines()[0])
        return tensor


@cache
def warn_of_unpinned_memory(error: str) -> None:
    warnings.warn(f"host memory could not be pinned ({error}): the host waits for its copies to the GPU", stacklevel=3)


class Loader:
    """Reads this process's micro-batches of a step from a filled cache.

    The samples of a step have targets of one size. References may differ in number and size; a micro-batch in which
    they do is returned as several batches, one for each shape.

    Sample i of micro-batch m of process r has position (m * num_processes + r) * B + i in the global batch of
    B * gradient_accumulation * num_processes samples; B is batch_size, or more for the step's bucket with `batch_of`.

    Args:
        cache, entries, captions: Filled cache; latent entry and captions of each sample, in sample order.
        embedding_keys: Cache key of each caption's embedding, and of "" if captions are dropped.
        batch_of: Function that returns the number of samples in a micro-batch by their shape (`LatentEntry.bucket`),
            batch_size or more. A bucket with fewer samples than that has smaller batches, so that none is repeated.
            None is batch_size for all.
        weights: Frequency of training of each sample relative to others; None is 1 for all.
        loss_weights: Factor of the loss of each sample; None is 1 for all.
        caption_dropout: Probability, from 0 to 1, of training a sample with the empty prompt.
        reference_dropout: Probability, from 0 to 1, of training the samples of a step without their references. It is
            drawn once for all samples of a step, because token shapes differ with and without references.
        memory_limit_gb: Size of the memory for entries in 10^9 bytes; the least recently used are dropped first.

    Raises ValueError, naming the argument, also for a caption without a key or reference_dropout without references.
    """

    def __init__(
        self,
        cache: Cache,
        entries: Sequence[LatentEntry],
        captions: Sequence[Sequence[str]],
        embedding_keys: Mapping[str, str],
        *,
        batch_size: int,
        gradient_accumulation: int = 1,
        num_processes: int = 1,
        process_index: int = 0,
        seed: int,
        batch_of: Callable[[Any], int] | None = None,
        weights: Sequence[float] | None = None,
        loss_weights: Sequence[float] | None = None,
        caption_dropout: float = 0.0,
        reference_dropout: float = 0.0,
        memory_limit_gb: float = 2.0,
    ) -> None:
        assert len(entries) == len(captions)
        assert all(captions)
        assert 0 <= process_index < num_processes
        for key, value in (("caption_dropout", caption_dropout), ("reference_dropout", reference_dropout)):
            if not isinstance(value, int | float) or not 0.0 <= value <= 1.0:
                raise ValueError(f"{key}={value!r} must be a number from 0 to 1")
        if not isinstance(memory_limit_gb, int | float) or not memory_limit_gb >= 0:
            raise ValueError(f"memory_limit_gb={memory_limit_gb!r} must be a number >= 0")
        if reference_dropout > 0 and not any(entry.reference_keys for entry in entries):
            raise ValueError(f"reference_dropout={reference_dropout} has no effect: no sample has references")
        needed = itertools.chain(itertools.chain.from_iterable(captions), [""] * (caption_dropout > 0))
        if unknown := sorted({caption for caption in needed if caption not in embedding_keys}):
            raise ValueError(f"{len(unknown)} prompts have no embedding, such as {unknown[0]!r}. Plan them too")
        self.batch_size = check_int("batch_size", batch_size, 1)
        self.gradient_accumulation = check_int("gradient_accumulation", gradient_accumulation, 1)
        self.num_processes, self.process_index = num_processes, process_index
        self.seed, self.caption_dropout, self.reference_dropout = seed, caption_dropout, reference_dropout
        global_batch = batch_size * gradient_accumulation * num_processes
        shapes: dict[Any, Any] = {}  # one object of each for all samples
        of_samples = [shapes.setdefault(entry.bucket, entry.bucket) for entry in entries]
        buckets = pool_shapes(of_samples, global_batch)
        self._per_step = gradient_accumulation * num_processes  # micro-batches of all processes
        larger = larger_batches(of_samples, buckets, batch_size, self._per_step, batch_of) if batch_of else {}
        self.sampler = BucketSampler(buckets, global_batch, seed, weights, larger)
        self._entries, self._captions, self._embedding_keys = entries, captions, embedding_keys
        self._loss_weights = loss_weights if loss_weights and set(loss_weights) != {1} else None
        self._cache = cache
        self._memory = _Memory(cache, memory_limit_gb * 1e9)

    def micro_batches(self, step: int) -> list[Batch]:
        """Return this process's `gradient_accumulation` micro-batches of a step (from 0), on the CPU, as cached.

        A micro-batch is in as many parts as it has shapes in the process where it has most of them: with a sharded
        base, all processes must call the model equally often.
        """
        indices, has_references = self.sampler.batch(step), not self.drops_references(step)
        size = self.batch_size_in(step)
        batches = []
        for micro in range(self.gradient_accumulation):
            groups = []  # positions of one shape, for each process
            for process in range(self.num_processes):
                by_shape: dict[tuple[Size, ...], list[int]] = {}
                first = (micro * self.num_processes + process) * size
                for position in range(first, first + size):
                    sizes = self._entries[indices[position]].reference_sizes if has_references else ()
                    by_shape.setdefault(sizes, []).append(position)
                groups.append(list(by_shape.values()))
            parts = _split(groups[self.process_index], max(map(len, groups)))
            batches += [self._read_batch(step, indices, positions) for positions in parts]
        return batches

    def batch_size_in(self, step: int) -> int:
        """Return the number of samples in a micro-batch of a step."""
        return self.sampler.size(step) // self._per_step

    def drawn_samples(self, step: int) -> list[DrawnSample]:
        """Return what a step trains in all processes, by position in the global batch; reads nothing."""
        return [self._draw_sample(step, *place) for place in enumerate(self.sampler.batch(step))]

    def drops_references(self, step: int) -> bool:
        """Return whether a step trains its samples without their references."""
        return self._is_drawn(self.reference_dropout, "reference dropout", step)

    def _read_batch(self, step: int, step_indices: Sequence[int], positions: Sequence[int]) -> Batch:
        drawn = [self._draw_sample(step, position, step_indices[position]) for position in positions]
        indices, entries = [one.index for one in drawn], [one.entry for one in drawn]
        captions = [one.caption for one in drawn]
        size, reference_sizes = entries[0].bucket
        factors = self._loss_weights
        rejected = [entry.rejected_key for entry in entries if entry.rejected_key is not None]
        if self.drops_references(step):
            reference_sizes = ()
        return Batch(
            latents=self._stack("latents", [entry.key for entry in entries], latent_shape(size)),
            references=[
                self._stack("latents", [entry.reference_keys[number] for entry in entries], latent_shape(each))
                for number, each in enumerate(reference_sizes)
            ],
            embeddings=self.embeddings(captions),
            captions=captions,
            indices=indices,
            positions=list(positions),
            mask=self._masks([entry.mask_key for entry in entries], size),
            rejected=self._stack("latents", rejected, latent_shape(size)) if rejected else None,
            weights=None if factors is None else torch.tensor([factors[index] for index in indices]),
        )

    def _draw_sample(self, step: int, position: int, index: int) -> DrawnSample:
        """Return a sample with its drawn variant and its drawn caption, "" if it is dropped."""
        variants, captions = self._entries[index].variants, self._captions[index]
        variant = self._draw("variant", step, position, len(variants))
        is_dropped = self._is_drawn(self.caption_dropout, "dropout", step, position)
        caption = "" if is_dropped else captions[self._draw("caption", step, position, len(captions))]
        return DrawnSample(position, index, variant, variants[variant], caption, is_dropped)

    def _draw(self, what: str, step: int, position: int, choices: int) -> int:
        if choices == 1:
            return 0
        return int(torch.randint(choices, (), generator=derived_generator(self.seed, what, step, position)))

    def _is_drawn(self, probability: float, *key: int | str) -> bool:
        return torch.rand((), generator=derived_generator(self.seed, *key)).item() < probability

    def _stack(self, name: str, keys: Sequence[str], shape: Shape) -> Tensor:
        """Return one tensor of every entry, stacked. Raise ValueError, naming the entry, for another shape."""
        return torch.stack([self._cache.pick(key, self._memory.get(key), name, shape) for key in keys])

    def embeddings(self, prompts: Sequence[str]) -> Tensor:
        """Return the embeddings (B, L, D) of prompts. Raise ValueError, naming the entry, if shapes differ."""
        stacked: list[Tensor] = []
        for key in (self._embedding_keys[prompt] for prompt in prompts):
            shape = tuple(stacked[0].shape) if stacked else EMBEDDING_SHAPE
            stacked.append(unpack(self._cache, key, self._memory.get(key), shape))
        return torch.stack(stacked)

    def _masks(self, keys: Sequence[str | None], size: Size) -> Tensor | None:
        """Return the masks (B, 1, H/16, W/16) from 0 to 1, with 1 everywhere for a sample without a mask."""
        if not any(keys):
            return None
        shape = mask_shape(size)
        everywhere = torch.full(shape, 255, dtype=torch.uint8)
        masks = [everywhere if key is None else self._stack("mask", [key], shape)[0] for key in keys]
        return torch.stack(masks).float() / 255


def _split(groups: list[list[int]], count: int) -> list[list[int]]:
    """Return `groups` in `count` parts, made by halving the largest. They must have at least as many items."""
    parts = list(groups)
    while len(parts) < count:
        largest = max(range(len(parts)), key=lambda number: len(parts[number]))
        half = len(parts[largest]) // 2
        parts[largest : largest + 1] = [parts[largest][:half], parts[largest][half:]]
    return parts


class _Memory:
    """Entries of a cache in memory, up to a number of bytes; the least recently used are dropped first."""

    def __init__(self, cache: Cache, limit: float) -> None:
        self._cache, self._limit, self._held = cache, limit, 0
        self._entries: OrderedDict[str, tuple[dict[str, Tensor], int]] = OrderedDict()  # tensors and their bytes

    def get(self, key: str) -> dict[str, Tensor]:
        if key in self._entries:
            self._entries.move_to_end(key)
            return self._entries[key][0]
        tensors = self._cache.get(key)
        size = sum(tensor.nbytes for tensor in tensors.values())
        self._entries[key] = tensors, size
        self._held += size
        while self._held > self._limit:
            self._held -= self._entries.popitem(last=False)[1][1]
        return tensors
