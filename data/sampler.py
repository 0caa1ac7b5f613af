"""The order of training: the samples of a step, as a pure function of the seed and the step."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from data.checks import check_int


def derived_generator(seed: int, *key: int | str) -> torch.Generator:
    """Return a CPU generator that depends only on the arguments, such as (seed, "noise", step, position).

    The key goes through sha256, which unlike `hash` is equal in every process and on every machine, and makes similar
    keys unrelated.
    """
    digest = hashlib.sha256(json.dumps([seed, *key]).encode()).digest()
    # PyTorch's CPU generator uses only the lower 32 bits of a seed
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))


class BucketSampler:
    """Chooses the samples of a step: `batch(step)` is a pure function of the arguments and the step.

    A batch has samples of one bucket. Each bucket has shuffled passes over its samples; a batch takes the next
    `global_batch` of them, across the end of a pass if necessary. A bucket smaller than a batch wraps around; in a
    larger one no batch has a sample twice, unless its weight asks for that (`_without_repeats`).

    The bucket of a step comes from shuffled cycles of N steps, N being the number of samples, in which a bucket
    appears once for each of its samples. So its probability is proportional to its size, and after a whole cycle every
    sample was seen exactly `global_batch` times. Independent draws would give that only on average, and resuming would
    need a replay of all earlier steps.

    A bucket may have batches larger than `global_batch` (`larger`). Its steps are as many times fewer, so that samples
    of all buckets are seen equally often, up to rounding.

    A sample of weight w counts as w samples: a pass contains it floor(w) or floor(w) + 1 times, p passes contain it
    p w times up to rounding (`_Passes`), and the cycles of buckets count it in the same way.

    Args:
        global_batch: Number of samples in a step over all processes and micro-batches.
        weights: Weights of the samples; None is 1 for all.
        larger: Numbers of samples in a step of the buckets that have more than `global_batch`.

    Raises ValueError if there are no samples, or for weights that are negative, not finite, or all 0.
    """

    def __init__(
        self,
        buckets: Sequence[Hashable],
        global_batch: int,
        seed: int,
        weights: Sequence[float] | None = None,
        larger: Mapping[Any, int] | None = None,
    ) -> None:
        if not buckets:
            raise ValueError("there are no samples to train on: the dataset is empty")
        self.global_batch = check_int("global_batch", global_batch, 1)
        self.seed = check_int("seed", seed, 0)
        given = np.ones(len(buckets)) if weights is None else np.asarray(weights, dtype=np.float64)
        assert given.shape == (len(buckets),)
        if not (np.isfinite(given).all() and (given >= 0).all() and given.any()):
            raise ValueError("the weights of samples must be numbers >= 0, and not all 0")
        offsets = torch.rand(len(buckets), generator=derived_generator(seed, "weights"), dtype=torch.float64).numpy()
        numbers: dict[Hashable, int] = {}  # of the buckets, in the order of their first samples
        each = (numbers.setdefault(bucket, len(numbers)) for bucket in buckets)
        self._bucket_of = np.fromiter(each, np.int32, len(buckets))
        counts = np.bincount(self._bucket_of)
        self._sizes = [(larger or {}).get(bucket, global_batch) for bucket in numbers]
        assert all(size >= global_batch for size in self._sizes)
        # buckets with fewer samples than a batch, which repeats them
        self.small = {bucket: int(counts[n]) for bucket, n in numbers.items() if counts[n] < global_batch}
        order = np.argsort(self._bucket_of, kind="stable").astype(np.int32)
        members = np.split(order, np.cumsum(counts)[:-1])
        self._passes = [_Passes(indices, given, offsets) for indices in members]
        turns = given * (global_batch / np.array(self._sizes))[self._bucket_of]  # a sample's share of the steps
        self._cycles = _Passes(np.arange(len(buckets), dtype=np.int32), turns, offsets)
        self._turns = [_Passes(indices, turns, offsets) for indices in members] if larger else self._passes
        self._order = lru_cache(maxsize=2 * len(numbers) + 2)(self._shuffled)

    def batch(self, step: int) -> list[int]:
        """Return the sample indices of a step (from 0), by position in the global batch; all from one bucket."""
        cycle, place, number = self._bucket(step)
        order, size = self._order("bucket", cycle), self._sizes[number]
        earlier = self._turns[number].before(cycle) + int((order[:place] == number).sum())
        batch = []
        for k in range(earlier * size, (earlier + 1) * size):
            passed, offset = self._passes[number].locate(k)
            batch.append(int(self._order(number, passed)[offset]))
        return batch

    def size(self, step: int) -> int:
        """Return the number of samples of a step, `global_batch` or more."""
        return self._sizes[self._bucket(step)[2]]

    def _bucket(self, step: int) -> tuple[int, int, int]:
        """Return the cycle of a step, its place in it, and the number of its bucket."""
        assert step >= 0
        cycle, place = self._cycles.locate(step)
        return cycle, place, int(self._order("bucket", cycle)[place])

    def _shuffled(self, name: int | str, turn: int) -> np.ndarray:
        """Return the samples of a pass of the bucket with this number, or the buckets of a cycle ("bucket")."""
        if name == "bucket":
            return self._bucket_of[self._permuted(name, self._cycles, turn)]
        assert isinstance(name, int)
        return self._without_repeats(name, turn)

    def _permuted(self, name: int | str, passes: "_Passes", turn: int) -> np.ndarray:
        samples = passes.samples(turn)
        generator = derived_generator(self.seed, "order", name, turn)
        return samples[torch.randperm(len(samples), generator=generator).numpy()]

    def _without_repeats(self, number: int, turn: int) -> np.ndarray:
        """Return the order of a pass of which no sample is in a batch that an earlier pass has put it in already.

        A batch across the end of a pass begins with the last samples of that pass. Those among them that the next
        pass draws for the rest of the batch are swapped with the first ones after it that are not. The order depends
        on the pass before, back to one that begins with a batch: fewer passes than a batch has samples.
        """
        passes, batch = self._passes[number], self._sizes[number]
        size = len(passes.samples(turn))
        first = turn
        while passes.plain and size >= batch and first * size % batch:
            first -= 1
        order = self._permuted(number, passes, first)
        for later in range(first + 1, turn + 1):
            head = -later * size % batch  # samples that complete the batch
            taken = set(order[size - batch + head :].tolist()) if head else set()
            order = self._permuted(number, passes, later)
            free = (place for place in range(head, size) if order[place] not in taken)
            for place in range(head):
                if order[place] in taken:
                    other = next(free)
                    order[[place, other]] = order[[other, place]]
        return order


class _Passes:
    """Passes over samples; pass p contains a sample of weight w floor((p + 1) w + u) - floor(p w + u) times.

    u, drawn from [0, 1) for each sample, makes samples of weight 0.5 alternate. The first p passes contain a sample
    floor(p w + u) times, which is p w rounded down or up, so the k-th sample of all passes is found without replaying
    them. A sample of weight 1 is in every pass once, for any u.
    """

    def __init__(self, indices: np.ndarray, weights: np.ndarray, offsets: np.ndarray) -> None:
        self._indices = indices
        self.plain = bool((weights[indices] == 1).all())
        chosen = slice(0) if self.plain else indices
        # not needed if all weights are 1: copies, because a view would hold the whole array
        self._weights, self._offsets = weights[chosen].copy(), offsets[chosen].copy()
        self._total = float(self._weights.sum())
        self.before = lru_cache(maxsize=8)(self._before)

    def _before(self, passed: int) -> int:
        """Return the number of samples in all passes before this one."""
        if self.plain:
            return passed * len(self._indices)
        return int(np.floor(passed * self._weights + self._offsets).sum())

    def samples(self, passed: int) -> np.ndarray:
        """Return the indices of a pass, repeated ones included."""
        if self.plain:
            return self._indices
        ends = [np.floor(p * self._weights + self._offsets) for p in (passed, passed + 1)]
        return np.repeat(self._indices, (ends[1] - ends[0]).astype(np.int64))

    def locate(self, k: int) -> tuple[int, int]:
        """Return the pass of the k-th sample of all passes, from 0, and its position in that pass."""
        if self.plain:
            return divmod(k, len(self._indices))
        passed = max(int(k / self._total), 0)
        while self.before(passed) > k:  # correct the guess, which ignores rounding
            passed -= 1
        while self.before(passed + 1) <= k:
            passed += 1
        return passed, k - self.before(passed)


def pool_shapes(shapes: Sequence[tuple[Hashable, Hashable]], global_batch: int) -> list[Hashable]:
    """Return the bucket of each sample, given as (shape of the target, shapes of the references).

    Samples of one shape are a bucket if they fill a batch. All other samples of the same target share one, so that a
    step need not repeat a sample because no other has its references; to fill a batch, the rarest of the frequent
    shapes join them. Which shapes of references are trained together is left to the loader.
    """
    counts = Counter(shapes)
    bucket: dict[Hashable, Hashable] = {}
    for target in dict.fromkeys(target for target, _ in shapes):
        # the first of equally rare ones, in the order of the samples
        own = sorted((shape for shape in counts if shape[0] == target), key=counts.__getitem__)
        pooled = 0
        for shape in own:
            joins = counts[shape] < global_batch or 0 < pooled < global_batch
            pooled += counts[shape] if joins else 0
            bucket[shape] = target if joins else shape
    return [bucket[shape] for shape in shapes]


def larger_batches(
    shapes: Sequence[Hashable],
    buckets: Sequence[Hashable],
    batch_size: int,
    micro_batches: int,
    batch_of: Callable[[Any], int],
) -> dict[Hashable, int]:
    """Return the number of samples in a step of the buckets that can have more than `batch_size` in a micro-batch.

    Args:
        shapes, buckets: Shape of each sample, and its bucket (`pool_shapes`).
        micro_batches: Number of micro-batches in a step, of all processes.
        batch_of: Function that returns the number of samples in a micro-batch by their shape.
    """
    counts, most = Counter(buckets), dict[Hashable, int]()
    for shape, bucket in dict.fromkeys(zip(shapes, buckets, strict=True)):
        most[bucket] = min(most.get(bucket, counts[bucket] // micro_batches), batch_of(shape))
    return {bucket: size * micro_batches for bucket, size in most.items() if size > batch_size}
