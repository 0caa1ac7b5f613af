"""data.sampler: the order is a function of seed and step, fair by weight, and the same as ever."""

from collections import Counter

import numpy as np
import pytest
import torch

from data.sampler import BucketSampler, derived_generator


def test_a_derived_generator_is_fixed_by_its_key() -> None:
    def draw(*key: int | str) -> float:
        return torch.rand((), generator=derived_generator(*key)).item()  # type: ignore[arg-type]

    assert draw(0, "noise", 1, 2) == draw(0, "noise", 1, 2)
    keys = [(0, "noise", 1, 2), (1, "noise", 1, 2), (0, "timestep", 1, 2), (0, "noise", 2, 1), (0, "noise", 12)]
    assert len({draw(*key) for key in keys}) == len(keys)
    # Fixed: a run resumed tomorrow, or elsewhere, must draw the same.
    assert derived_generator(0, "noise", 1, 2).initial_seed() == 2575264877


def test_derived_generators_of_neighbours_are_unrelated() -> None:
    draws = torch.stack([torch.randn(8, generator=derived_generator(0, "noise", step)) for step in range(2000)])
    correlation = torch.corrcoef(torch.cat([draws[:-1], draws[1:]], dim=1).T)
    assert (correlation - torch.eye(16))[:8, 8:].abs().max() < 0.1


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    buckets = ["a"] * 5 + ["b"] * 3
    sampler = BucketSampler(buckets, 2, seed=1)
    forwards = [sampler.batch(step) for step in range(40)]
    assert [BucketSampler(buckets, 2, seed=1).batch(step) for step in reversed(range(40))] == forwards[::-1]
    assert [BucketSampler(buckets, 2, seed=2).batch(step) for step in range(40)] != forwards


def test_a_batch_has_one_bucket() -> None:
    buckets = [i % 3 for i in range(20)]
    sampler = BucketSampler(buckets, 4, seed=0)
    assert all(len({buckets[i] for i in sampler.batch(step)}) == 1 for step in range(60))


def test_within_a_bucket_all_are_seen_before_any_again() -> None:
    buckets = ["a"] * 7 + ["b"] * 4 + ["c"]
    sampler = BucketSampler(buckets, 3, seed=5)
    streams: dict[str, list[int]] = {"a": [], "b": [], "c": []}
    for step in range(60):
        batch = sampler.batch(step)
        streams[buckets[batch[0]]] += batch
    for name, stream in streams.items():
        members = {i for i, bucket in enumerate(buckets) if bucket == name}
        passes = [stream[i : i + len(members)] for i in range(0, len(stream) - len(members) + 1, len(members))]
        assert len(passes) > 3
        assert all(set(one) == members for one in passes)
        if name != "c":
            assert len({tuple(one) for one in passes}) > 1  # reshuffled


def test_after_as_many_steps_as_samples_each_was_seen_equally_often() -> None:
    sampler = BucketSampler(["a"] * 7 + ["b"] * 2 + ["c"], 4, seed=0)
    for cycle in range(3):
        seen = Counter(i for step in range(10 * cycle, 10 * cycle + 10) for i in sampler.batch(step))
        assert seen == dict.fromkeys(range(10), 4)


def test_the_order_of_buckets_is_shuffled_anew_each_cycle() -> None:
    buckets = ["a"] * 6 + ["b"] * 6
    sampler = BucketSampler(buckets, 1, seed=0)
    order = [buckets[sampler.batch(step)[0]] for step in range(36)]
    assert len({tuple(order[i : i + 12]) for i in (0, 12, 24)}) == 3


def test_no_samples_is_an_error() -> None:
    with pytest.raises(ValueError, match="no samples"):
        BucketSampler([], 1, 0)
