"""data.cache.store: entries are whole or absent, found by content, and computed once."""

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cache_helpers import SAMPLES, encode_images, encode_prompts, files, picture, plan, refuse
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import data.cache.latents
from data.buckets import Buckets
from data.cache import Cache, MemoryCache
from data.cache.embeddings import plan_embeddings
from data.sources import Sample


def test_an_entry_comes_back_with_its_values_shape_and_dtype(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    key = cache.key("test", number=1)
    tensors = {"a": torch.randn(3, 4).T, "b": torch.randn(2, 5).bfloat16()[1:]}
    assert not cache.path(key).exists()
    cache.put(key, tensors, {"note": "x"})
    assert cache.path(key).exists()
    assert cache.path(key) == tmp_path / key[:2] / f"{key}.safetensors"
    found = cache.get(key)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_a_key_depends_on_kind_and_recipe_but_not_on_the_order_of_arguments() -> None:
    key = Cache.key("latents", size=(64, 32), encoder="vae")
    assert key == Cache.key("latents", encoder="vae", size=(64, 32))
    assert len({key, Cache.key("other", size=(64, 32), encoder="vae"), Cache.key("latents", size=(64, 32))}) == 3
    # Fixed: a cache made yesterday, or on another machine, must be found.
    assert Cache.key("a", c="x", b=(1, 2)) == hashlib.sha256(b'["a",{"b":[1,2],"c":"x"}]').hexdigest()


@pytest.mark.parametrize("text", ["a", 'q"\\', "é\n", "\0", ""])
def test_keys_that_differ_in_one_field_are_those_of_the_whole_recipes(text: str) -> None:
    key_of = Cache.keys("latents", "picture", encoder='"', size=(64, 32))
    assert key_of(text) == Cache.key("latents", encoder='"', picture=text, size=(64, 32))


def test_a_process_killed_while_writing_leaves_no_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = Cache(tmp_path)
    child = os.fork()  # a fresh interpreter would spend seconds importing torch
    if child == 0:
        monkeypatch.setattr(os, "replace", lambda *_: os._exit(9))
        try:
            cache.put("ab" * 32, {"x": torch.ones(1000)}, {})
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert [path.suffix for path in files(cache)] == [".tmp"]
    assert not cache.path("ab" * 32).exists()


def test_a_failed_write_leaves_nothing_and_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    cache = Cache(tmp_path)
    with pytest.raises(
        ValueError, match=rf"{cache.path('ab' * 32)} cannot be written \(no space left on device\)\. .*cache_dir"
    ):
        cache.put("ab" * 32, {"x": torch.ones(3)}, {})
    assert files(cache) == []


def test_a_truncated_entry_is_named_with_its_remedy(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    key = "ab" * 32
    cache.put(key, {"x": torch.ones(100)}, {})
    content = cache.path(key).read_bytes()
    for length in (0, 4, len(content) // 2, len(content) - 1):
        cache.path(key).write_bytes(content[:length])
        with pytest.raises(ValueError, match=rf"{cache.path(key)}\b.*(deleted|removed)"):
            cache.get(key)
        assert not cache.path(key).exists()


def test_getting_what_is_not_there_says_to_fill(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{tmp_path}"):
        Cache(tmp_path).get("ab" * 32)


def test_planning_gives_sizes_and_writes_nothing(tmp_path: Path) -> None:
    planned = plan(Cache(tmp_path))
    assert planned.missing == 4
    assert [entry.size for entry in planned.entries] == [(64, 64), (64, 64), (80, 48)]
    assert [entry.reference_sizes for entry in planned.entries] == [((32, 16),), (), ()]
    assert planned.entries[0].bucket != planned.entries[1].bucket
    assert files(planned.cache) == []


def test_latents_are_filled_in_sample_order_and_keep_their_dtype(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    planned = plan(cache)
    seen: list[tuple[int, int]] = []
    planned.fill(encode_images, progress=lambda done, total, _: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert planned.missing == 0
    for sample, entry in zip(SAMPLES, planned.entries, strict=True):
        latents = cache.get(entry.key)["latents"]
        assert latents.shape == (128, entry.size[1] // 16, entry.size[0] // 16)
        assert torch.equal(latents, encode_images([sample.target.load().resize(entry.size)])[0])
    reference = cache.get(planned.entries[0].reference_keys[0])["latents"]
    assert reference.shape == (128, 1, 2)
    assert reference.dtype == torch.bfloat16


def test_a_second_fill_calls_no_encoder(tmp_path: Path) -> None:
    plan(Cache(tmp_path)).fill(encode_images)
    again = plan(Cache(tmp_path))
    assert again.missing == 0
    again.fill(refuse)
    prompts = plan_embeddings(Cache(tmp_path), ["a", "b"], "text")
    prompts.fill(encode_prompts)
    prompts = plan_embeddings(Cache(tmp_path), ["b", "a"], "text")
    assert prompts.missing == 0
    prompts.fill(refuse)


def test_an_interruption_keeps_what_was_computed(tmp_path: Path) -> None:
    calls = 0

    def stopped(images: list[Image.Image]) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return encode_images(images)

    with pytest.raises(KeyboardInterrupt):
        plan(Cache(tmp_path)).fill(stopped)
    assert plan(Cache(tmp_path)).missing == 2


def test_equal_content_under_another_name_is_one_entry(tmp_path: Path) -> None:
    twins = [Sample(picture("red", name="x.png"), ("",)), Sample(picture("red", name="y.png"), ("",))]
    planned = plan(Cache(tmp_path), twins)
    assert planned.missing == 1
    assert planned.entries[0].key == planned.entries[1].key


@pytest.mark.parametrize("changes", [{"encoder_id": "other"}, {"buckets": Buckets(32, upscale=True)}])
def test_another_encoder_or_size_is_another_entry(tmp_path: Path, changes: dict) -> None:
    cache = Cache(tmp_path)
    plan(cache, SAMPLES[1:]).fill(encode_images)
    assert plan(cache, SAMPLES[1:], **changes).missing == 2


def test_another_fit_version_is_another_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan(Cache(tmp_path)).fill(encode_images)
    monkeypatch.setattr(data.cache.latents, "FIT_VERSION", -1)
    assert plan(Cache(tmp_path)).missing == 4


def test_shares_of_processes_cover_everything_once_whenever_each_looks(tmp_path: Path) -> None:
    encoded: list[str] = []

    def counting(prompts: list[str]) -> Tensor:
        encoded.extend(prompts)
        return encode_prompts(prompts)

    prompts = [f"prompt {i}" for i in range(10)]
    # Process 1 plans only after process 0 has filled its share, as happens when it starts late.
    for process in range(3):
        plan_embeddings(Cache(tmp_path), prompts, "text").fill(counting, process, 3)
    assert sorted(encoded) == prompts
    assert plan_embeddings(Cache(tmp_path), prompts, "text").missing == 0


def test_embeddings_are_found_by_prompt_and_encoder(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    planned = plan_embeddings(cache, ["", "a cat", "a cat"], "text")
    assert list(planned.keys) == ["", "a cat"]
    assert planned.missing == 2
    planned.fill(encode_prompts)
    assert torch.equal(cache.get(planned.keys["a cat"])["embeddings"], torch.full((4, 6), 5.0))
    assert plan_embeddings(cache, ["a cat"], "another encoder").missing == 1


def test_values_that_are_not_finite_are_named_and_not_stored(tmp_path: Path) -> None:
    def broken(encode: Callable[[list], Tensor], value: float) -> Callable[[list], Tensor]:
        def encoder(items: list) -> Tensor:
            result = encode(items)
            result.view(-1)[-1] = value
            return result

        return encoder

    planned = plan(Cache(tmp_path), SAMPLES[1:2])
    with pytest.raises(ValueError, match=r"lime.*NaN"):
        planned.fill(broken(encode_images, float("nan")))
    prompts = plan_embeddings(Cache(tmp_path), ["a cat"], "text")
    with pytest.raises(ValueError, match=r"'a cat'.*NaN"):
        prompts.fill(broken(encode_prompts, float("inf")))
    assert files(Cache(tmp_path)) == []


def test_an_encoder_that_returns_another_shape_is_caught(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"\(1, 128, 5, 3\).*\(1, 128, 3, 5\)"):
        plan(Cache(tmp_path), SAMPLES[2:]).fill(lambda images: encode_images(images).mT)


def test_metadata_says_what_an_entry_is(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    planned = plan_embeddings(cache, ["a cat"], "text")
    planned.fill(encode_prompts)
    content = cache.path(planned.keys["a cat"]).read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert header["__metadata__"].keys() == {"prompt", "xxh3_64"}
    assert header["__metadata__"]["prompt"] == "a cat"


def test_an_entry_that_is_not_whole_or_another_thing_counts_as_missing_and_is_computed_again(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    planned = plan(cache)
    planned.fill(encode_images)
    assert planned.missing == 0
    first, second, *_ = planned.work
    content = cache.path(first).read_bytes()
    wrong: list[bytes] = [b"", content[:5], content[:-1], content + b"x", b"\xff" * 100, b"no safetensors at all"]
    for bad in wrong:
        cache.path(first).write_bytes(bad)
        assert planned.missing == 1, bad[:10]
    cache.put(first, {"embeddings": torch.ones(2, 3)}, {})
    cache.put(second, {"latents": torch.ones(128, 9, 9)}, {})
    assert planned.missing == 2
    planned.fill(encode_images)
    assert planned.missing == 0
    assert cache.path(first).read_bytes() == content


def test_embeddings_that_are_something_else_count_as_missing(tmp_path: Path) -> None:
    planned = plan_embeddings(Cache(tmp_path), ["a"], "encoder")
    for tensors in ({"x": torch.ones(2, 3)}, {"embeddings": torch.ones(3)}, {"embeddings": torch.ones(0, 3)}):
        planned.cache.put(planned.keys["a"], tensors, {})
        assert planned.missing == 1
    planned.fill(encode_prompts)
    assert planned.missing == 0
    assert planned.cache.get(planned.keys["a"])["embeddings"].shape == (4, 6)


def test_a_tensor_of_another_name_or_shape_is_an_error_that_names_the_entry(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.put("ab" * 32, {"x": torch.ones(2, 3)}, {})
    for name, shape in (("latents", (2, 3)), ("x", (128, 2, 3)), ("x", (2, 4))):
        with pytest.raises(ValueError, match=rf"{cache.path('ab' * 32)}\b.* x \(2, 3\).* {name} "):
            cache.pick("ab" * 32, cache.get("ab" * 32), name, shape)


def test_filling_removes_what_was_left_half_written_long_ago(tmp_path: Path) -> None:
    (tmp_path / "ab").mkdir()
    old, new = tmp_path / "ab" / ".abc.1.tmp", tmp_path / "ab" / ".abc.2.tmp"
    for unfinished in (old, new):
        unfinished.write_bytes(b"half")
    os.utime(old, (0, 0))
    planned = plan(Cache(tmp_path))
    assert old.exists(), "planning writes nothing"
    planned.fill(encode_images)
    assert (old.exists(), new.exists()) == (False, True)


def test_pictures_that_are_scaled_up_are_counted_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    samples = [Sample(picture("red", size, f"{size}"), ("",)) for size in ((1, 1), (20000, 2), (64, 64), (90, 70))]
    plan(Cache(tmp_path), samples)
    (record,) = caplog.records
    assert re.match(r"2 of 4 .*\(1, 1\).*\b1 x 1\b", record.getMessage())
    caplog.clear()
    plan(Cache(tmp_path), samples[2:])
    assert not caplog.records


def test_several_workers_have_as_many_prompts_under_way_and_store_what_one_stores(tmp_path: Path) -> None:
    together = threading.Barrier(3, timeout=30)  # broken, unless three prompts are under way at once

    def waiting(prompts: list[str]) -> Tensor:
        together.wait()
        return encode_prompts(prompts)

    prompts = ["", "b", "cc", "ddd", "eeee", "fffff"]
    planned, seen = plan_embeddings(Cache(tmp_path / "many"), prompts, "text"), []
    planned.fill(waiting, progress=lambda done, total, _: seen.append((done, total)), workers=3)
    assert seen == [(done, 6) for done in range(1, 7)]
    alone = plan_embeddings(Cache(tmp_path / "one"), prompts, "text")
    alone.fill(encode_prompts)
    for prompt, key in alone.keys.items():
        assert planned.cache.path(planned.keys[prompt]).read_bytes() == alone.cache.path(key).read_bytes()


def test_an_error_of_one_worker_comes_at_once_begins_no_other_prompt_and_keeps_what_is_under_way(
    tmp_path: Path,
) -> None:
    prompts = ["wait", "fail", *(f"later {i}" for i in range(20))]
    planned = plan_embeddings(Cache(tmp_path), prompts, "text")
    raised, begun = threading.Event(), []

    def encode(given: list[str]) -> Tensor:
        begun.append(given[0])
        if given == ["fail"]:
            raise ValueError("no answer")
        assert raised.wait(30), "the error was held back by a prompt that is under way"
        return encode_prompts(given)

    with pytest.raises(ValueError, match="no answer"):
        planned.fill(encode, workers=2)
    raised.set()
    deadline = time.monotonic() + 30
    while planned.cache.path(planned.keys["wait"]) not in files(planned.cache) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert planned.cache.path(planned.keys["wait"]).exists()
    assert len(begun) <= 3, "one more may have begun before the error was seen"
    assert planned.missing >= 19


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize("place", ["data", "header"])
def test_content_that_changed_on_the_disk_is_seen_when_read_and_computed_again(tmp_path: Path, place: str) -> None:
    cache = Cache(tmp_path)
    planned = plan(cache)
    planned.fill(encode_images)
    key = next(iter(planned.work))
    content = cache.path(key).read_bytes()
    swapped = content.replace(b"[128,4,4]", b"[4,128,4]")  # two sides that change places hold as many numbers
    damaged = flipped(content, len(content) - 100) if place == "data" else swapped
    assert damaged != content
    cache.path(key).write_bytes(damaged)
    with pytest.raises(ValueError, match=rf"{cache.path(key)}\b.*checksum.*(deleted|removed)"):
        cache.get(key)
    assert planned.missing == 1
    planned.fill(encode_images)
    assert cache.path(key).read_bytes() == content


def test_an_entry_of_an_earlier_version_is_read_and_told_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = Cache(tmp_path)
    for key in ("ab" * 32, "cd" * 32):
        cache.path(key).parent.mkdir()
        save_file({"x": torch.arange(3)}, cache.path(key), {"picture": "a.png"})
        assert cache.get(key)["x"].tolist() == [0, 1, 2]
    (record,) = caplog.records
    assert re.search(rf"{tmp_path}\b.*checksum", record.getMessage())


def test_a_cache_in_memory_holds_what_it_is_given_and_shares_nothing(tmp_path: Path) -> None:
    cache = MemoryCache()
    planned = plan(cache)
    seen: list[tuple[int, int]] = []
    planned.fill(encode_images, process_index=1, num_processes=2, progress=lambda *done: seen.append(done[:2]))
    assert seen[-1] == (4, 4), "no other process can compute a share for this one"
    assert planned.missing == 0
    disk = plan(Cache(tmp_path))
    disk.fill(encode_images)
    for key in planned.work:
        assert torch.equal(cache.get(key)["latents"], disk.cache.get(key)["latents"])
    with pytest.raises(ValueError, match="process"):
        cache.get("ab" * 32)
    key = next(iter(planned.work))
    assert cache.lacking([key], lambda _: ("latents", (1, 2, 3))) == [key]
    assert cache.free() > 0


def test_progress_counts_the_bytes_that_were_stored(tmp_path: Path) -> None:
    planned = plan(Cache(tmp_path))
    seen: list[int] = []
    planned.fill(encode_images, progress=lambda done, total, stored: seen.append(stored))
    assert seen == sorted(set(seen))
    assert seen[-1] == sum(path.stat().st_size for path in files(planned.cache))


def test_the_header_of_an_entry_with_long_metadata_is_read_whole(tmp_path: Path) -> None:
    cache, prompt = Cache(tmp_path), "a very long prompt " * 500
    planned = plan_embeddings(cache, [prompt], "text")
    planned.fill(encode_prompts)
    assert planned.missing == 0
