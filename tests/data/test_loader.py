"""data.loader: the same samples, places and dropouts whatever the split, and from any step on."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data.cache import Cache
from data.cache.embeddings import plan_embeddings
from data.cache.latents import LatentEntry
from data.loader import Batch, Loader, _Memory, copy_to_device, warn_of_unpinned_memory

SPLITS = [(4, 1, 1), (2, 2, 1), (2, 1, 2), (1, 1, 4), (1, 2, 2)]  # batch_size, gradient_accumulation, num_processes


def filled(folder: Path, count: int = 6) -> tuple[Cache, list[LatentEntry], list[tuple[str, ...]], dict[str, str]]:
    """A cache of latents that hold the index of their sample, and embeddings of it plus 100 (empty prompt: -1)."""
    cache = Cache(folder)
    entries, captions, keys = [], [], {"": cache.key("text", prompt="")}
    cache.put(keys[""], {"embeddings": torch.full((2, 3), -1.0)}, {})
    for index in range(count):
        wide = index % 3 == 2  # a third is wide and has a reference, so two buckets
        size, references = ((48, 16), ((16, 32),)) if wide else ((32, 32), ())
        key, caption = cache.key("latents", index=index), f"sample {index}"
        cache.put(key, {"latents": torch.full((128, size[1] // 16, size[0] // 16), float(index)).bfloat16()}, {})
        reference_keys = tuple(cache.key("reference", index=index) for _ in references)
        for reference in reference_keys:
            cache.put(reference, {"latents": torch.full((128, 2, 1), 50.0 + index)}, {})
        keys[caption] = cache.key("text", prompt=caption)
        cache.put(keys[caption], {"embeddings": torch.full((2, 3), 100.0 + index)}, {})
        entries.append(LatentEntry(size, key, references, reference_keys))
        captions.append((caption,))
    return cache, entries, captions, keys


def by_position(
    contents: tuple, step: int, split: tuple[int, int, int], dropout: float, growth: int = 1
) -> dict[int, tuple]:
    """What each position of a step trains on, gathered over processes and micro-batches."""
    batch_size, accumulation, processes = split
    found = {}
    for process in range(processes):
        loader = Loader(
            *contents,
            batch_size=batch_size,
            gradient_accumulation=accumulation,
            num_processes=processes,
            process_index=process,
            seed=3,
            caption_dropout=dropout,
            batch_of=lambda shape: batch_size * (growth if shape[0] == (32, 32) else 1),
        )
        batches = loader.micro_batches(step)
        assert len(batches) == accumulation
        for batch in batches:
            for place, position in enumerate(batch.positions):
                assert position not in found
                tensors = (batch.latents[place], batch.embeddings[place], *(ref[place] for ref in batch.references))
                values = tuple(tensor.flatten()[0].item() for tensor in tensors)
                found[position] = (batch.indices[place], batch.captions[place], values)
    return found


@pytest.mark.parametrize("step", [0, 1, 5, 17])
def test_the_split_does_not_change_what_a_position_trains_on(tmp_path: Path, step: int) -> None:
    contents = filled(tmp_path)
    whole = by_position(contents, step, SPLITS[0], dropout=0.5)
    assert sorted(whole) == [0, 1, 2, 3]
    for split in SPLITS[1:]:
        assert by_position(contents, step, split, dropout=0.5) == whole


def test_a_batch_of_more_samples_is_split_likewise(tmp_path: Path) -> None:
    contents = filled(tmp_path, count=24)  # 16 of 32 x 32, 8 of 48 x 16
    sizes = set()
    for step in range(6):
        whole = by_position(contents, step, SPLITS[0], dropout=0.5, growth=3)
        is_small = whole[0][0] % 3 != 2
        assert sorted(whole) == list(range(12 if is_small else 4))
        for split in SPLITS[1:]:
            assert by_position(contents, step, split, dropout=0.5, growth=3) == whole
        sizes.add(len(whole))
    assert sizes == {4, 12}


def test_the_positions_of_a_process_follow_the_documented_order(tmp_path: Path) -> None:
    loader = Loader(*filled(tmp_path), batch_size=2, gradient_accumulation=2, num_processes=3, process_index=1, seed=0)
    assert [batch.positions for batch in loader.micro_batches(0)] == [[2, 3], [8, 9]]


def test_a_batch_stacks_what_the_cache_holds(tmp_path: Path) -> None:
    loader = Loader(*filled(tmp_path), batch_size=2, seed=0)
    shapes = set()
    for step in range(8):
        (batch,) = loader.micro_batches(step)
        wide = batch.indices[0] % 3 == 2
        shapes.add(batch.latents.shape)
        assert batch.latents.shape == ((2, 128, 1, 3) if wide else (2, 128, 2, 2))
        assert batch.latents.dtype == torch.bfloat16
        assert batch.latents[:, 0, 0, 0].tolist() == batch.indices
        assert [reference.shape for reference in batch.references] == ([(2, 128, 2, 1)] if wide else [])
        for reference in batch.references:
            assert reference[:, 0, 0, 0].tolist() == [50 + index for index in batch.indices]
        assert batch.embeddings.shape == (2, 2, 3)
        assert batch.embeddings[:, 0, 0].tolist() == [100 + index for index in batch.indices]
        assert batch.captions == [f"sample {index}" for index in batch.indices]
    assert len(shapes) == 2


def test_captions_are_dropped_at_about_the_rate_asked_for(tmp_path: Path) -> None:
    loader = Loader(*filled(tmp_path), batch_size=8, seed=0, caption_dropout=0.25)
    steps = []
    for step in range(100):
        (batch,) = loader.micro_batches(step)
        steps.append([caption == "" for caption in batch.captions])
        for caption, embedding, index in zip(batch.captions, batch.embeddings, batch.indices, strict=True):
            assert embedding[0, 0] == (-1 if caption == "" else 100 + index)
    assert 160 < sum(map(sum, steps)) < 240  # 800 draws: 200, standard deviation 12
    assert len(set(zip(*steps, strict=True))) == 8  # each position draws its own
    assert len({tuple(step) for step in steps}) > 40  # and each step


@pytest.mark.parametrize(("dropout", "expected"), [(0.0, 0), (1.0, 40)])
def test_dropout_of_none_and_of_all_is_exact(tmp_path: Path, dropout: float, expected: int) -> None:
    loader = Loader(*filled(tmp_path), batch_size=4, seed=0, caption_dropout=dropout)
    assert sum(loader.micro_batches(step)[0].captions.count("") for step in range(10)) == expected


def test_a_fresh_loader_continues_at_any_step(tmp_path: Path) -> None:
    contents = filled(tmp_path)
    first = Loader(*contents, batch_size=3, seed=0, caption_dropout=0.3)
    for step in range(6):
        (expected,) = first.micro_batches(step)
    resumed = Loader(*contents, batch_size=3, seed=0, caption_dropout=0.3, memory_limit_gb=0)
    (batch,) = resumed.micro_batches(5)
    assert (batch.indices, batch.captions) == (expected.indices, expected.captions)
    assert torch.equal(batch.latents, expected.latents)
    assert torch.equal(batch.embeddings, expected.embeddings)


def test_memory_spares_the_disk_up_to_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contents = filled(tmp_path, count=2)
    reads: Counter[str] = Counter()
    get = Cache.get

    def counting(cache: Cache, key: str) -> dict[str, torch.Tensor]:
        reads[key] += 1
        return get(cache, key)

    monkeypatch.setattr(Cache, "get", counting)
    for limit, expected in ((2.0, 1), (0.0, 9)):
        reads.clear()
        loader = Loader(*contents, batch_size=2, seed=0, memory_limit_gb=limit)
        for step in range(8):
            loader.micro_batches(step)
        assert set(reads.values()) <= {expected, expected - 1} - {0}
    # One sample's latents and embedding are 128 * 4 * 2 + 24 bytes: room for one sample of the two, not for both.
    reads.clear()
    loader = Loader(*contents, batch_size=2, seed=0, memory_limit_gb=1100 / 1e9)
    for step in range(8):
        loader.micro_batches(step)
        assert loader._memory._held <= 1100
    assert max(reads.values()) > 1


def test_memory_forgets_the_least_recently_used_first(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    for name in "abc":
        cache.put(name * 64, {"x": torch.zeros(10)}, {})
    memory = _Memory(cache, 80)  # room for two of 40 bytes
    for name in "abac":
        memory.get(name * 64)
    assert [key[0] for key in memory._entries] == ["a", "c"]


def test_steps_may_be_asked_for_in_any_order(tmp_path: Path) -> None:
    loader = Loader(*filled(tmp_path), batch_size=3, seed=0)
    for step in (0, 5, 2, 3, 3):
        (batch,) = loader.micro_batches(step)
        assert batch.indices == loader.sampler.batch(step)


def test_what_a_batch_is_changed_to_does_not_reach_the_next(tmp_path: Path) -> None:
    loader = Loader(*filled(tmp_path, count=1), batch_size=1, seed=0)
    loader.micro_batches(0)[0].latents.fill_(77)
    assert loader.micro_batches(2)[0].latents.unique().tolist() == [0]


def test_memory_that_cannot_be_pinned_is_copied_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(tensor: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("CUDA error: out of memory\nCompile with ...")

    copies = []

    def copy(tensor: torch.Tensor, device: torch.device, non_blocking: bool) -> torch.Tensor:
        copies.append(tensor)
        return tensor

    warn_of_unpinned_memory.cache_clear()
    monkeypatch.setattr(torch.Tensor, "pin_memory", refuse)
    monkeypatch.setattr(torch.Tensor, "to", copy)
    given = torch.zeros(3)
    with pytest.warns(UserWarning, match=r"host memory could not be pinned \(CUDA error: out of memory\)"):
        assert copy_to_device(given, torch.device("cuda")) is given
    copy_to_device(given, "cuda")  # a second warning would be an error
    assert len(copies) == 2


def test_a_batch_moves_as_a_whole() -> None:
    tensor = torch.ones(1, 128, 2, 2)
    batch = Batch(tensor, [tensor, tensor], torch.ones(1, 2, 3), ["a"], [7], [0]).to("meta", torch.bfloat16)
    for moved in (batch.latents, *batch.references, batch.embeddings):
        assert moved.device.type == "meta"
        assert moved.dtype == torch.bfloat16
    assert (batch.captions, batch.indices, batch.positions) == (["a"], [7], [0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 2.0}, "batch_size=2.0"),
        ({"gradient_accumulation": True}, "gradient_accumulation=True"),
        ({"seed": "1"}, "seed='1'"),
        ({"caption_dropout": 1.5}, "caption_dropout=1.5"),
        ({"caption_dropout": "0.1"}, "caption_dropout='0.1'"),
        ({"reference_dropout": -0.1}, "reference_dropout=-0.1"),
        ({"memory_limit_gb": -1}, "memory_limit_gb=-1"),
    ],
)
def test_a_wrong_argument_is_named(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Loader(*filled(tmp_path, 1), **({"batch_size": 1, "seed": 0} | changes))


def test_a_caption_without_an_embedding_is_named_before_training(tmp_path: Path) -> None:
    cache, entries, captions, keys = filled(tmp_path, 2)
    with pytest.raises(ValueError, match=r"1 prompts?.*embedding.*'sample 1'"):
        Loader(cache, entries, captions, {"sample 0": keys["sample 0"]}, batch_size=1, seed=0)
    del keys[""]
    Loader(cache, entries, captions, keys, batch_size=1, seed=0)
    with pytest.raises(ValueError, match=r"embedding.*''"):
        Loader(cache, entries, captions, keys, batch_size=1, seed=0, caption_dropout=0.1)


def test_one_of_several_captions_is_drawn_by_step_and_position(tmp_path: Path) -> None:
    cache, entries, captions, keys = filled(tmp_path)
    several = [tuple(captions[(index + shift) % 6][0] for shift in range(3)) for index in range(6)]
    contents = cache, entries, several, keys
    found: Counter[int] = Counter()
    for step in range(50):
        whole = by_position(contents, step, SPLITS[0], dropout=0.2)
        for index, caption, values in whole.values():
            assert values[1] == (-1 if caption == "" else 100 + int(caption.split()[1]))
            found[several[index].index(caption) if caption else -1] += 1
    assert 20 < found[-1] < 60
    assert all(35 < found[i] < 75 for i in range(3))
    for split in SPLITS[1:]:
        assert by_position(contents, 49, split, dropout=0.2) == whole


def test_one_of_several_variants_is_drawn_by_step_and_position(tmp_path: Path) -> None:
    cache, entries, captions, keys = filled(tmp_path)
    varied = []
    for index, entry in enumerate(entries):
        others = []
        for number in (1, 2):
            key = cache.key("other", index=index, number=number)
            cache.put(key, {"latents": cache.get(entry.key)["latents"] + 10 * number}, {})
            others.append(replace(entry, key=key))
        varied.append(replace(entry, others=tuple(others)))
    contents = cache, varied, captions, keys
    found: Counter[int] = Counter()
    for step in range(40):
        whole = by_position(contents, step, SPLITS[0], dropout=0)
        found += Counter(int(values[0]) // 10 for _, _, values in whole.values())
    assert all(30 < found[i] < 80 for i in range(3))
    for split in SPLITS[1:]:
        assert by_position(contents, 39, split, dropout=0) == whole


def test_weights_reach_the_sampler(tmp_path: Path) -> None:
    loader = Loader(*filled(tmp_path), batch_size=2, seed=0, weights=[1, 0, 3, 0, 0, 0])
    seen = Counter(index for step in range(8) for index in loader.micro_batches(step)[0].indices)
    assert seen == {0: 4, 2: 12}


def test_references_are_dropped_for_a_whole_step_in_all_processes(tmp_path: Path) -> None:
    contents = filled(tmp_path)
    loaders = [
        Loader(*contents, batch_size=1, num_processes=2, process_index=process, seed=0, reference_dropout=0.4)
        for process in (0, 1)
    ]
    dropped = []
    for step in range(120):
        batches = [loader.micro_batches(step)[0] for loader in loaders]
        given = {len(batch.references) for batch in batches if batch.indices[0] % 3 == 2}  # those that have one
        assert len(given) <= 1
        dropped += [not count for count in given]
    assert 0.2 < sum(dropped) / len(dropped) < 0.6
    for rate, count in ((0.0, 1), (1.0, 0)):
        loader = Loader(*contents, batch_size=2, seed=0, reference_dropout=rate)
        batches = [loader.micro_batches(step)[0] for step in range(6)]
        assert {len(batch.references) for batch in batches if batch.indices[0] % 3 == 2} == {count}


def test_dropping_references_that_no_sample_has_is_refused(tmp_path: Path) -> None:
    cache, entries, captions, keys = filled(tmp_path, 2)
    with pytest.raises(ValueError, match=r"reference_dropout=0\.5\b"):
        Loader(cache, entries, captions, keys, batch_size=1, seed=0, reference_dropout=0.5)


def test_masks_are_shares_and_a_sample_without_one_counts_everywhere(tmp_path: Path) -> None:
    cache, entries, captions, keys = filled(tmp_path)
    mask = torch.tensor([[[0, 51], [255, 102]]], dtype=torch.uint8)
    cache.put("ab" * 32, {"mask": mask}, {})
    masked = [replace(entry, mask_key="ab" * 32 if index == 0 else None) for index, entry in enumerate(entries)]
    loader = Loader(cache, masked, captions, keys, batch_size=3, seed=0)
    with_mask = 0
    for step in range(12):
        (batch,) = loader.micro_batches(step)
        if 0 not in batch.indices:
            assert batch.mask is None
            continue
        with_mask += 1
        assert batch.mask is not None
        assert batch.mask.shape == (3, 1, 2, 2)
        for index, found in zip(batch.indices, batch.mask, strict=True):
            torch.testing.assert_close(found, mask / 255 if index == 0 else torch.ones(1, 2, 2))
        assert batch.to("meta", torch.bfloat16).mask.device.type == "meta"  # type: ignore[union-attr]
    assert 0 < with_mask < 12


def test_packed_embeddings_are_unpacked(tmp_path: Path) -> None:
    cache, entries, captions, _ = filled(tmp_path, 2)
    plan = plan_embeddings(cache, [caption for (caption,) in captions], "text", fp8=True)
    plan.fill(lambda prompts: torch.full((1, 2, 3), 100.0 + int(prompts[0][-1])))
    loader = Loader(cache, entries, captions, plan.keys, batch_size=2, seed=0)
    (batch,) = loader.micro_batches(0)
    torch.testing.assert_close(batch.embeddings[:, 0, 0], 100.0 + torch.tensor(batch.indices), atol=0, rtol=1e-6)


def varied(folder: Path, count: int = 8) -> tuple[Cache, list[LatentEntry], list[tuple[str, ...]], dict[str, str]]:
    """Samples of one target size, each with a reference of another size, the last without."""
    cache, entries, captions, keys = filled(folder, count)
    for index in range(count):
        sizes = ((16, 16 * (index + 1)),) * (index < count - 1)
        key = cache.key("varied", index=index)
        cache.put(key, {"latents": torch.full((128, index + 1, 1), 50.0 + index)}, {})
        target = cache.key("target", index=index)
        cache.put(target, {"latents": torch.full((128, 2, 2), float(index))}, {})
        entries[index] = LatentEntry((32, 32), target, sizes, (key,) * len(sizes))
    return cache, entries, captions, keys


@pytest.mark.parametrize("dropout", [0.0, 1.0])
def test_samples_with_references_of_other_sizes_share_a_step(tmp_path: Path, dropout: float) -> None:
    loader = Loader(*varied(tmp_path), batch_size=4, seed=0, reference_dropout=dropout)
    seen = Counter()
    for step in range(8):
        batches = loader.micro_batches(step)
        assert sorted(position for batch in batches for position in batch.positions) == [0, 1, 2, 3]
        assert len(batches) == (1 if dropout else 4)
        assert len({index for batch in batches for index in batch.indices}) == 4
        for batch in batches if not dropout else []:
            (index,) = batch.indices
            assert [tuple(one.shape) for one in batch.references] == [(1, 128, index + 1, 1)] * (index < 7)
        seen.update(index for batch in batches for index in batch.indices)
    assert seen == dict.fromkeys(range(8), 4)


def test_all_processes_have_as_many_batches_and_together_the_same_samples(tmp_path: Path) -> None:
    cache, entries, captions, keys = varied(tmp_path)
    entries[:5] = [replace(entry, reference_sizes=(), reference_keys=()) for entry in entries[:5]]
    whole = Loader(cache, entries, captions, keys, batch_size=6, seed=0)
    halves = [
        Loader(cache, entries, captions, keys, batch_size=3, num_processes=2, process_index=process, seed=0)
        for process in range(2)
    ]
    uneven = 0
    for step in range(8):
        one, other = (half.micro_batches(step) for half in halves)
        assert len(one) == len(other)  # a sharded base waits for ever for a process that calls it less often
        uneven += len({batch.references[0].shape if batch.references else None for batch in one}) < len(one)
        pairs = [(p, i) for batch in (*one, *other) for p, i in zip(batch.positions, batch.indices, strict=True)]
        expected = [(p, i) for b in whole.micro_batches(step) for p, i in zip(b.positions, b.indices, strict=True)]
        assert sorted(pairs) == sorted(expected)
    assert uneven  # a process with fewer shapes was split too
