"""data.sampler: the order is a function of seed and step, fair by weight, and the same as ever."""

from collections import Counter

import numpy as np
import pytest
import torch

from data.sampler import BucketSampler, derived_generator, larger_batches, pool_shapes

FIRST_BATCHES = [[9, 9, 9], [3, 4, 5], [8, 7, 7]]


def test_a_derived_generator_is_fixed_by_its_key() -> None:
    def draw(*key: int | str) -> float:
        return torch.rand((), generator=derived_generator(*key)).item()  # type: ignore[arg-type]

    assert draw(0, "noise", 1, 2) == draw(0, "noise", 1, 2)
    keys = [(0, "noise", 1, 2), (1, "noise", 1, 2), (0, "timestep", 1, 2), (0, "noise", 2, 1), (0, "noise", 12)]
    assert len({draw(*key) for key in keys}) == len(keys)
    # Fixed: a run resumed tomorrow, or elsewhere, must draw the same.
    assert derived_generator(0, "noise", 1, 2).initial_seed() == 2575264877


def test_derived_generators_of_neighbors_are_unrelated() -> None:
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


def counts(sampler: BucketSampler, steps: int) -> Counter[int]:
    return Counter(index for step in range(steps) for index in sampler.batch(step))


def test_weights_of_one_change_nothing() -> None:
    buckets = ["a"] * 7 + ["b"] * 2 + ["c"]
    plain, weighted = BucketSampler(buckets, 3, seed=4), BucketSampler(buckets, 3, seed=4, weights=[1.0] * 10)
    assert [plain.batch(step) for step in range(50)] == [weighted.batch(step) for step in range(50)]
    # Fixed: a run that is resumed with a later version goes on in the same order.
    assert [plain.batch(step) for step in range(3)] == FIRST_BATCHES


def test_a_whole_weight_is_so_many_times_in_every_pass() -> None:
    weights = [3, 1, 2, 1, 1]
    sampler = BucketSampler(["a", "a", "a", "b", "b"], 2, seed=0, weights=weights)
    for cycles in (1, 2, 5):  # a cycle is as many steps as samples, counted by weight
        assert counts(sampler, 8 * cycles) == {i: 2 * cycles * weight for i, weight in enumerate(weights)}


def test_fractions_are_met_in_the_long_run_and_at_any_time_nearly() -> None:
    weights = np.array([0.5, 0.5, 1.0, 2.7, 0.1, 1.3, 0.25])
    sampler = BucketSampler(["a", "a", "a", "a", "b", "b", "c"], 1, seed=2, weights=list(weights))
    for steps in (500, 1270, 2540):
        expected = weights * steps / weights.sum()
        found = counts(sampler, steps)
        assert all(abs(found[i] - expected[i]) <= 1 + weights[i] + 2 for i in range(7))


def test_samples_of_half_a_weight_take_turns() -> None:
    sampler = BucketSampler(["a"] * 40, 1, seed=0, weights=[0.5] * 40)
    first, second = (Counter(sampler._passes[0].samples(p).tolist()) for p in (0, 1))
    assert sorted({**first, **second}) == list(range(40))
    assert not first.keys() & second.keys()
    assert 8 < len(first) < 32  # each by an offset of its own


def test_a_weighted_batch_is_a_function_of_seed_and_step() -> None:
    arguments = (["a"] * 5 + ["b"] * 3, 2)
    weights = [0.3, 2.0, 1.0, 1.0, 0.9, 5.5, 0.01, 1.0]
    forwards = [BucketSampler(*arguments, seed=1, weights=weights).batch(step) for step in range(60)]
    sampler = BucketSampler(*arguments, seed=1, weights=weights)
    assert [sampler.batch(step) for step in reversed(range(60))] == forwards[::-1]
    assert all(len({index < 5 for index in batch}) == 1 for batch in forwards)


def test_weight_zero_is_never_trained() -> None:
    found = counts(BucketSampler(["a", "a", "b"], 2, seed=0, weights=[0, 1, 0]), 30)
    assert found == {1: 60}


@pytest.mark.parametrize("weights", [[0.0, 0.0], [1.0, -1.0], [1.0, float("nan")], [float("inf"), 1.0]])
def test_weights_that_are_none_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="weights"):
        BucketSampler(["a", "b"], 1, 0, weights)


def test_no_batch_has_a_sample_twice_unless_its_bucket_is_smaller() -> None:
    for count, batch in ((5, 4), (7, 3), (6, 6), (9, 8), (4, 3)):
        sampler = BucketSampler(["a"] * count, batch, seed=count)
        batches = [sampler.batch(step) for step in range(8 * count)]
        assert all(len(set(one)) == batch for one in batches)
        assert counts(sampler, 4 * count) == dict.fromkeys(range(count), 4 * batch)
        assert not sampler.small
        assert [BucketSampler(["a"] * count, batch, seed=count).batch(step) for step in (7, 3)] == [
            batches[7],
            batches[3],
        ]


def test_buckets_smaller_than_a_batch_are_known() -> None:
    assert BucketSampler(["a"] * 7 + ["b"] * 2 + ["c"], 3, seed=0).small == {"b": 2, "c": 1}


def test_shapes_of_references_that_fill_no_batch_share_a_bucket() -> None:
    shapes = [("wide", i) for i in range(4)] + [("square", 0)] * 3 + [("square", 9)]
    assert pool_shapes(shapes[:4], 4) == ["wide"] * 4
    # a batch needs two: the three of one shape have a bucket, and the single one takes them as company
    assert pool_shapes(shapes, 2) == ["wide"] * 4 + ["square"] * 4
    assert pool_shapes(shapes[:7], 2) == ["wide"] * 4 + [("square", 0)] * 3
    # what fills a batch keeps its bucket, and with it the order of earlier versions
    several = [("a", 0)] * 3 + [("a", 1)] * 2 + [("a", 2)] * 2
    assert pool_shapes(several, 2) == several
    assert pool_shapes([*several, ("a", 3)], 2) == [("a", 0)] * 3 + ["a"] * 2 + [("a", 2)] * 2 + ["a"]


def test_a_bucket_with_larger_batches_has_fewer_steps_and_all_are_seen_equally_often() -> None:
    buckets = ["large"] * 10 + ["small"] * 9
    sampler = BucketSampler(buckets, 2, seed=1, larger={"small": 6})
    steps = [sampler.batch(step) for step in range(390)]
    assert {(buckets[batch[0]], len(batch)) for batch in steps} == {("large", 2), ("small", 6)}
    assert [sampler.size(step) for step in range(390)] == [len(batch) for batch in steps]
    assert all(len(set(batch)) == len(batch) for batch in steps)
    seen = Counter(i for batch in steps for i in batch)  # 10 / 2 + 9 / 6 = 6.5 steps train each sample once
    assert len(seen) == 19
    assert all(57 <= count <= 63 for count in seen.values())
    again = BucketSampler(buckets, 2, seed=1, larger={"small": 6})
    assert [again.batch(step) for step in reversed(range(390))] == steps[::-1]


def test_batches_are_as_large_as_their_shapes_allow_and_their_buckets_have_samples() -> None:
    shapes = ["1024"] * 9 + ["512"] * 8 + ["512 with references"] * 5 + ["256"] * 3
    buckets = [shape.split()[0] for shape in shapes]
    most = {"1024": 2, "512": 6, "512 with references": 4, "256": 20}
    assert larger_batches(shapes, buckets, 2, 1, most.__getitem__) == {"512": 4, "256": 3}
    assert larger_batches(shapes, buckets, 2, 3, most.__getitem__) == {"512": 12}
