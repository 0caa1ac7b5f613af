"""The order of training: which samples a step trains on, a pure function of the seed and the step."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Hashable, Sequence
from functools import lru_cache

import numpy as np
import torch

from data.checks import check_int


def derived_generator(seed: int, *key: int | str) -> torch.Generator:
    """A CPU generator that depends on nothing but its arguments, such as (seed, "noise", step, position).

    The key goes through sha256: equal on every machine and in every process, unlike `hash`, and neighbors are
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

    A sample of weight w is w samples: a pass holds it floor(w) or floor(w) + 1 times, in p passes all but exactly p w
    times (`_Passes`), and the cycles of buckets count it likewise.

    Args:
        buckets: the bucket of each sample, anything hashable.
        global_batch: samples in a step over all processes and micro-batches.
        seed: of the order.
        weights: of the samples; None is 1 for all.

    Raises ValueError for no samples, or weights that are negative, not finite, or all 0.
    """

    def __init__(
        self, buckets: Sequence[Hashable], global_batch: int, seed: int, weights: Sequence[float] | None = None
    ) -> None:
        if not buckets:
            raise ValueError("there are no samples to train on: the dataset is empty")
        self.global_batch = check_int("global_batch", global_batch, 1)
        self.seed = check_int("seed", seed, 0)
        given = np.ones(len(buckets)) if weights is None else np.asarray(weights, dtype=np.float64)
        assert given.shape == (len(buckets),)
        if not (np.isfinite(given).all() and (given >= 0).all() and given.any()):
            raise ValueError("the weights of samples must be numbers from 0, and not all 0")
        offsets = torch.rand(len(buckets), generator=derived_generator(seed, "weights"), dtype=torch.float64).numpy()
        members: dict[Hashable, list[int]] = defaultdict(list)
        for index, bucket in enumerate(buckets):
            members[bucket].append(index)
        self._bucket_of = np.empty(len(buckets), dtype=np.int64)
        self._passes = []
        for number, indices in enumerate(members.values()):
            self._bucket_of[indices] = number
            self._passes.append(_Passes(np.array(indices), given, offsets))
        self._cycles = _Passes(np.arange(len(buckets)), given, offsets)
        self._pass = lru_cache(maxsize=2 * len(members))(self._shuffled_pass)
        self._cycle = lru_cache(maxsize=2)(self._shuffled_cycle)

    def batch(self, step: int) -> list[int]:
        """The sample indices of a step (from 0), by position in the global batch; all of one bucket."""
        assert step >= 0
        cycle, place = self._cycles.locate(step)
        order = self._cycle(cycle)
        number = int(order[place])
        earlier = self._passes[number].before(cycle) + int((order[:place] == number).sum())
        batch = []
        for k in range(earlier * self.global_batch, (earlier + 1) * self.global_batch):
            passed, offset = self._passes[number].locate(k)
            batch.append(int(self._pass(number, passed)[offset]))
        return batch

    def _shuffled_cycle(self, cycle: int) -> np.ndarray:
        return self._bucket_of[self._shuffled(self._cycles, "bucket", cycle)]

    def _shuffled_pass(self, number: int, passed: int) -> np.ndarray:
        return self._shuffled(self._passes[number], number, passed)

    def _shuffled(self, passes: "_Passes", name: int | str, turn: int) -> np.ndarray:
        samples = passes.samples(turn)
        generator = derived_generator(self.seed, "order", name, turn)
        return samples[torch.randperm(len(samples), generator=generator).numpy()]


class _Passes:
    """Passes over samples, of which one of weight w is in pass p floor((p + 1) w + u) - floor(p w + u) times.

    u, its own draw from [0, 1), lets samples of weight 0.5 take turns. In the first p passes it was there
    floor(p w + u) times, p w rounded down or up, so where the k-th sample of all passes stands is found without
    replaying them. With weight 1 that is once a pass, whatever u is.
    """

    def __init__(self, indices: np.ndarray, weights: np.ndarray, offsets: np.ndarray) -> None:
        self._indices, self._weights, self._offsets = indices, weights[indices], offsets[indices]
        self._plain = bool((self._weights == 1).all())
        self._total = float(self._weights.sum())
        self.before = lru_cache(maxsize=8)(self._before)

    def _before(self, passed: int) -> int:
        """How many samples the passes before this one hold."""
        if self._plain:
            return passed * len(self._indices)
        return int(np.floor(passed * self._weights + self._offsets).sum())

    def samples(self, passed: int) -> np.ndarray:
        """The indices of a pass, each as often as it is in it."""
        if self._plain:
            return self._indices
        ends = [np.floor(p * self._weights + self._offsets) for p in (passed, passed + 1)]
        return np.repeat(self._indices, (ends[1] - ends[0]).astype(np.int64))

    def locate(self, k: int) -> tuple[int, int]:
        """The pass of the k-th sample of all passes, from 0, and its place there."""
        if self._plain:
            return divmod(k, len(self._indices))
        passed = max(int(k / self._total), 0)
        while self.before(passed) > k:  # the guess is off by what was rounded
            passed -= 1
        while self.before(passed + 1) <= k:
            passed += 1
        return passed, k - self.before(passed)
