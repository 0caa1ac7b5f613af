"""Batches for a step of training, the same however the step is cut into processes and micro-batches.

Everything random is a function of (seed, step, position of the sample in the global batch), never of a running
generator. So a run resumes by its step number alone, with no sampler state to save, and one process with a batch of 4
sees exactly what four processes with one sample each see. PyTorch's DataLoader and DistributedSampler tie the order to
worker and process counts instead.

There is nothing to decode here: latents and embeddings come from the cache, a file each. One thread reads the next step
while this one trains, and what was read stays in memory up to a limit.
"""

import hashlib
import json
from collections import OrderedDict, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from data.cache import EMBEDDING_SHAPE, Cache, LatentEntry, Shape, latent_shape


def derived_generator(seed: int, *key: int | str) -> torch.Generator:
    """A CPU generator that depends on nothing but its arguments, such as (seed, "noise", step, position).

    The key goes through sha256: equal on every machine and in every process, unlike `hash`, and neighbours are
    unrelated.
    """
    digest = hashlib.sha256(json.dumps([seed, *key]).encode()).digest()
    # Torch's CPU generator keeps 32 bits of a seed; these are the ones it keeps.
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))


class BucketSampler:
    """Which samples a step trains on: `batch(step)` is a pure function of the arguments, the seed and the step.

    A batch has samples of one bucket. Each bucket runs through shuffled passes of its samples; a batch takes the next
    `global_batch` of them, across the end of a pass if need be, so a bucket smaller than a batch wraps around.

    Which bucket a step takes comes from shuffled cycles of N steps, N being the number of samples, in which a bucket
    appears once for each of its samples. Its chance is thus proportional to its size, and after a whole cycle every
    sample was seen exactly `global_batch` times; independent draws would give that only on average, and need a replay
    of all earlier steps to resume.

    Args:
        buckets: the bucket of each sample, anything hashable.
        global_batch: samples in a step over all processes and micro-batches.
        seed: of the order.
    """

    def __init__(self, buckets: Sequence[Hashable], global_batch: int, seed: int) -> None:
        if not buckets:
            raise ValueError("there are no samples to train on: the dataset is empty")
        _check_int("global_batch", global_batch, 1)
        self.global_batch = global_batch
        self.seed = _check_int("seed", seed, 0)
        members: dict[Hashable, list[int]] = defaultdict(list)
        for index, bucket in enumerate(buckets):
            members[bucket].append(index)
        self._members = list(members.values())
        self._bucket_of = torch.empty(len(buckets), dtype=torch.int64)
        for number, indices in enumerate(self._members):
            self._bucket_of[indices] = number
        self._permutation = lru_cache(maxsize=2 * len(members) + 2)(self._draw_permutation)

    def batch(self, step: int) -> list[int]:
        """The sample indices of a step (from 0), by position in the global batch; all of one bucket."""
        assert step >= 0
        cycle, place = divmod(step, len(self._bucket_of))
        order = self._bucket_of[self._permutation("bucket", cycle, len(self._bucket_of))]
        number = int(order[place])
        members = self._members[number]
        earlier_batches = cycle * len(members) + int((order[:place] == number).sum())
        batch = []
        for k in range(earlier_batches * self.global_batch, (earlier_batches + 1) * self.global_batch):
            passed, offset = divmod(k, len(members))
            batch.append(members[int(self._permutation(number, passed, len(members))[offset])])
        return batch

    def _draw_permutation(self, name: int | str, turn: int, length: int) -> Tensor:
        return torch.randperm(length, generator=derived_generator(self.seed, "order", name, turn))


@dataclass(frozen=True)
class Batch:
    """The samples of one process's micro-batch, all of one bucket.

    Attributes:
        latents: (B, 128, H/16, W/16), of the targets.
        references: for each reference, (B, 128, h_i/16, w_i/16); their sizes may differ from each other.
        embeddings: (B, L, D), of the captions.
        captions: what was embedded; "" where the caption was dropped.
        indices: which samples of the dataset.
        positions: their places in the global batch, which noise and timesteps are drawn by.
    """

    latents: Tensor
    references: list[Tensor]
    embeddings: Tensor
    captions: list[str]
    indices: list[int]
    positions: list[int]

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "Batch":
        """The same batch with its tensors on `device`, as `dtype`."""
        return replace(
            self,
            latents=self.latents.to(device, dtype),
            references=[reference.to(device, dtype) for reference in self.references],
            embeddings=self.embeddings.to(device, dtype),
        )


class Loader:
    """Reads a step's share of this process, as micro-batches, from a cache that is filled.

    Sample i of micro-batch m of process r holds position (m * num_processes + r) * batch_size + i of the global batch
    of batch_size * gradient_accumulation * num_processes samples.

    Args:
        cache, entries, captions: the filled cache; latent entry and caption of each sample, in sample order.
        embedding_keys: cache key of each caption's embedding, and of "" if captions are dropped.
        caption_dropout: probability, from 0 to 1, of training a sample on the empty prompt.
        memory_limit_gb: keep what was read, up to this many 10^9 bytes; the least recently used goes first. 0: nothing.

    Raises ValueError, naming the argument, for a value out of range or a caption without a key.
    """

    def __init__(
        self,
        cache: Cache,
        entries: Sequence[LatentEntry],
        captions: Sequence[str],
        embedding_keys: Mapping[str, str],
        *,
        batch_size: int,
        gradient_accumulation: int = 1,
        num_processes: int = 1,
        process_index: int = 0,
        seed: int,
        caption_dropout: float = 0.0,
        memory_limit_gb: float = 2.0,
    ) -> None:
        assert len(entries) == len(captions)
        assert 0 <= process_index < num_processes
        if not isinstance(caption_dropout, int | float) or not 0.0 <= caption_dropout <= 1.0:
            raise ValueError(f"caption_dropout={caption_dropout!r} must be a probability, from 0 to 1")
        if not isinstance(memory_limit_gb, int | float) or not memory_limit_gb >= 0:
            raise ValueError(f"memory_limit_gb={memory_limit_gb!r} must be a number of at least 0")
        needed = {*captions, ""} if caption_dropout > 0 else set(captions)
        if unknown := sorted(needed - embedding_keys.keys()):
            raise ValueError(f"{len(unknown)} prompts have no embedding, such as {unknown[0]!r}: plan them too")
        self.batch_size = _check_int("batch_size", batch_size, 1)
        self.gradient_accumulation = _check_int("gradient_accumulation", gradient_accumulation, 1)
        self.num_processes, self.process_index = num_processes, process_index
        self.seed, self.caption_dropout = seed, caption_dropout
        self.sampler = BucketSampler(
            [entry.bucket for entry in entries], batch_size * gradient_accumulation * num_processes, seed
        )
        self._entries, self._captions, self._embedding_keys = entries, captions, embedding_keys
        self._cache = cache
        self._memory = _Memory(cache, memory_limit_gb * 1e9)  # used by the reading thread alone
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")
        self._ahead: tuple[int, Future[list[Batch]]] | None = None

    def micro_batches(self, step: int) -> list[Batch]:
        """This process's `gradient_accumulation` micro-batches of a step (from 0), on the CPU, in the cache's dtypes.

        Also starts to read the next step in the background; what goes wrong there is raised when it is asked for.
        """
        ahead, self._ahead = self._ahead, None
        future = ahead[1] if ahead is not None and ahead[0] == step else self._reader.submit(self._read_step, step)
        batches = future.result()
        self._ahead = step + 1, self._reader.submit(self._read_step, step + 1)
        return batches

    def close(self) -> None:
        """Stops the reading thread, after what it is reading now."""
        self._reader.shutdown(cancel_futures=True)

    def _read_step(self, step: int) -> list[Batch]:
        indices = self.sampler.batch(step)
        batches = []
        for micro in range(self.gradient_accumulation):
            first = (micro * self.num_processes + self.process_index) * self.batch_size
            batches.append(self._read_batch(step, indices, range(first, first + self.batch_size)))
        return batches

    def _read_batch(self, step: int, step_indices: Sequence[int], positions: Sequence[int]) -> Batch:
        indices = [step_indices[position] for position in positions]
        entries = [self._entries[index] for index in indices]
        captions = [
            "" if self._drops_caption(step, position) else self._captions[index]
            for position, index in zip(positions, indices, strict=True)
        ]
        references = zip(*(entry.reference_keys for entry in entries), strict=True)  # by reference, each over the batch
        size, reference_sizes = entries[0].bucket
        return Batch(
            latents=self._stack("latents", [entry.key for entry in entries], latent_shape(size)),
            references=[
                self._stack("latents", keys, latent_shape(each))
                for keys, each in zip(references, reference_sizes, strict=True)
            ],
            embeddings=self._stack(
                "embeddings", [self._embedding_keys[caption] for caption in captions], EMBEDDING_SHAPE
            ),
            captions=captions,
            indices=indices,
            positions=list(positions),
        )

    def _drops_caption(self, step: int, position: int) -> bool:
        draw = torch.rand((), generator=derived_generator(self.seed, "dropout", step, position))
        return draw.item() < self.caption_dropout

    def _stack(self, name: str, keys: Sequence[str], shape: Shape) -> Tensor:
        """One tensor of every entry. ValueError, naming the entry, for one not of `shape` or not of the first's."""
        stacked: list[Tensor] = []
        for key in keys:
            stacked.append(self._cache.pick(key, self._memory.get(key), name, shape))
            shape = tuple(stacked[0].shape)
        return torch.stack(stacked)


class _Memory:
    """A cache's entries in memory, up to a number of bytes; the least recently used go first. For one thread."""

    def __init__(self, cache: Cache, limit: float) -> None:
        self._cache, self._limit, self._held = cache, limit, 0
        self._entries: OrderedDict[str, dict[str, Tensor]] = OrderedDict()

    def get(self, key: str) -> dict[str, Tensor]:
        if key in self._entries:
            self._entries.move_to_end(key)
            return self._entries[key]
        tensors = self._cache.get(key)
        self._entries[key] = tensors
        self._held += _nbytes(tensors)
        while self._held > self._limit:
            self._held -= _nbytes(self._entries.popitem(last=False)[1])
        return tensors


def _nbytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _check_int(key: str, value: object, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{key}={value!r} must be a whole number of at least {least}")
    return value
