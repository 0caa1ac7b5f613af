"""data.cache.packs: entries in packs are those of files, and a pack is read as far as it is whole."""

import errno
import os
import re
import signal
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_helpers import encode_images, encode_prompts, files, plan, refuse

from data.cache import Cache, store
from data.cache import packs as packs_module
from data.cache.embeddings import EmbeddingPlan, plan_embeddings
from data.cache.packs import RECORD, Packs, PackWriter, packed_keys
from data.cache.pruning import Lease, prune

KEYS = [f"{number:02x}" * 32 for number in range(1, 9)]
PROMPTS = ["", "b", "cc", "ddd", "eeee"]


@pytest.fixture(autouse=True)
def packs_for_any_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "PACK_ABOVE", 0)


def endings(cache: Cache) -> list[str]:
    return sorted(path.suffix for path in files(cache))


def pack_of(cache: Cache) -> Path:
    (pack,) = cache.folder.glob("packs/*.pack")
    return pack


def filled(folder: Path, prompts: list[str] = PROMPTS) -> EmbeddingPlan:
    planned = plan_embeddings(Cache(folder), prompts, "text")
    planned.fill(encode_prompts)
    return planned


def test_a_pack_holds_the_bytes_of_the_files_and_a_few_entries_stay_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed, seen = plan(Cache(tmp_path / "packs")), []
    packed.fill(encode_images, progress=lambda done, total, stored: seen.append(stored))
    assert endings(packed.cache) == [".index", ".pack"]
    assert packed.missing == 0
    assert seen[-1] == pack_of(packed.cache).stat().st_size
    monkeypatch.setattr(store, "PACK_ABOVE", 4)
    single = plan(Cache(tmp_path / "files"))
    single.fill(encode_images)
    assert endings(single.cache) == [".safetensors"] * 4
    content = b"".join(single.cache.path(key).read_bytes() for key in single.work)
    assert pack_of(packed.cache).read_bytes() == content
    for key in single.work:
        assert torch.equal(packed.cache.get(key)["latents"], single.cache.get(key)["latents"])


def test_files_and_packs_complete_each_other_and_a_second_start_computes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "PACK_ABOVE", 10)
    filled(tmp_path, PROMPTS[:2])
    monkeypatch.setattr(store, "PACK_ABOVE", 4)
    planned = filled(tmp_path)
    assert endings(planned.cache) == [".index", ".pack", ".safetensors", ".safetensors"]
    assert planned.missing == 0
    again = plan_embeddings(Cache(tmp_path), PROMPTS, "text")
    again.fill(refuse)
    for prompt, key in again.keys.items():
        assert again.cache.get(key)["embeddings"].shape == (4, 6)
        assert again.cache.get(key)["embeddings"][0, 0] == len(prompt)


def test_what_another_process_adds_later_is_found(tmp_path: Path) -> None:
    early, late = Cache(tmp_path), Cache(tmp_path)
    planned = plan_embeddings(early, PROMPTS, "text")
    assert planned.missing == 5
    filled(tmp_path, PROMPTS[:3])
    key = planned.keys["cc"]
    assert early.get(key)["embeddings"][0, 0] == 2
    assert planned.missing == 2
    filled(tmp_path)
    assert planned.missing == 0
    assert len(list(tmp_path.glob("packs/*.pack"))) == 2
    assert late.get(planned.keys["eeee"])["embeddings"][0, 0] == 4


def test_two_writers_never_share_a_pack(tmp_path: Path) -> None:
    one, other = PackWriter(tmp_path), PackWriter(tmp_path)
    for number, key in enumerate(KEYS):
        (one, other)[number % 2].append(key, 5, bytes([number]) * 10)
    one.close()
    other.close()
    packs = Packs(tmp_path)
    assert packs.refresh()
    assert not packs.refresh()
    found = [packs.find(key) for key in KEYS]
    assert [place.read() for place in found if place] == [bytes([number]) * 10 for number in range(len(KEYS))]
    assert len({place.pack for place in found if place}) == 2
    assert packs.find("ff" * 32) is None


def test_a_lookup_while_another_thread_reads_the_records_again_finds_its_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writers = [PackWriter(tmp_path) for _ in range(2)]
    writers[0].append(KEYS[0], 5, b"first")
    packs = Packs(tmp_path)
    packs.refresh()
    before = set(tmp_path.iterdir())
    writers[1].append(KEYS[1], 5, b"other")
    for file in set(tmp_path.iterdir()) - before:  # of a machine whose clock is behind: before the others
        file.rename(tmp_path / f"0{file.suffix}")
    found: list[bytes] = []
    thread = threading.Thread(target=lambda: found.append(packs.find(KEYS[0]).read()))  # type: ignore[union-attr]
    read = packs_module.read_records

    def slow(pack: Path) -> np.ndarray:
        if thread.ident is None:
            thread.start()
        thread.join(0.2)
        return read(pack)

    monkeypatch.setattr(packs_module, "read_records", slow)
    assert packs.find(KEYS[1]).read() == b"other"  # type: ignore[union-attr]
    thread.join()
    assert found == [b"first"]
    for writer in writers:
        writer.close()


def test_a_pack_that_is_deleted_while_packs_are_listed_hides_no_other(tmp_path: Path) -> None:
    planned = filled(tmp_path)
    (tmp_path / "packs/gone.index").symlink_to(tmp_path / "gone")  # whose stat fails as that of a deleted file does
    assert plan_embeddings(Cache(tmp_path), PROMPTS, "text").missing == 0
    assert planned.cache.get(planned.keys["b"])["embeddings"][0, 0] == 1


def test_a_full_pack_is_followed_by_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.cache.packs.PACK_BYTES", 2 * 200)
    assert len(list(filled(tmp_path).cache.folder.glob("packs/*.pack"))) == 3


def test_keys_that_begin_alike_are_told_apart_and_of_equal_ones_the_newest_counts(tmp_path: Path) -> None:
    alike = ["ab" * 8 + f"{number:02x}" * 24 for number in (3, 1, 2)]
    writer = PackWriter(tmp_path)
    for number, key in enumerate([*alike, alike[0]]):
        writer.append(key, 5, bytes([number]))
    packs = Packs(tmp_path)
    assert [packs.find(key).read() for key in alike] == [b"\3", b"\1", b"\2"]  # type: ignore[union-attr]
    assert packs.find("ab" * 8 + "00" * 24) is None
    assert packs.forms([alike[1], "ab" * 8 + "99" * 24]) == [5, None]
    writer.close()


@pytest.mark.parametrize("written", [0, 7, RECORD.itemsize])
def test_a_process_killed_while_appending_leaves_whole_entries_alone(tmp_path: Path, written: int) -> None:
    child = os.fork()
    if child == 0:
        write = os.write

        def dying(file: int, content: bytes) -> int:
            if os.path.samefile(f"/proc/self/fd/{file}", next(tmp_path.glob("packs/*.index"))) and done == [1] * 3:
                write(file, content[:written])
                os.kill(os.getpid(), signal.SIGKILL)
            return write(file, content)

        done: list[int] = []
        os.write = dying  # type: ignore[assignment]
        planned = plan_embeddings(Cache(tmp_path), PROMPTS, "text")
        planned.fill(encode_prompts, progress=lambda *_: done.append(1))
        os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    planned = plan_embeddings(Cache(tmp_path), PROMPTS, "text")
    assert planned.missing == (1 if written == RECORD.itemsize else 2)
    planned.fill(encode_prompts)
    assert planned.missing == 0
    assert [planned.cache.get(key)["embeddings"][0, 0].item() for key in planned.keys.values()] == [0, 1, 2, 3, 4]


def test_a_truncated_pack_loses_only_the_entries_behind_its_end(tmp_path: Path) -> None:
    planned = filled(tmp_path)
    pack = pack_of(planned.cache)
    sizes = [len(planned.cache.place(key).read()) for key in planned.keys.values()]  # type: ignore[union-attr]
    os.truncate(pack, sum(sizes[:3]) + 5)
    again = plan_embeddings(Cache(tmp_path), PROMPTS, "text")
    assert again.missing == 2
    pack.unlink()
    assert again.cache.lacking(KEYS[:1], lambda _: ("x", (1,))) == KEYS[:1]
    assert plan_embeddings(Cache(tmp_path), PROMPTS, "text").missing == 5
    again = filled(tmp_path)
    assert again.cache.get(again.keys["ddd"])["embeddings"][0, 0] == 3


def test_a_pack_truncated_under_a_run_is_damage_that_is_named(tmp_path: Path) -> None:
    planned = filled(tmp_path)
    key = planned.keys["eeee"]
    assert planned.missing == 0
    os.truncate(pack_of(planned.cache), 100)
    with pytest.raises(ValueError, match=rf"{re.escape(str(pack_of(planned.cache)))} at \d+ is damaged .*deleted"):
        planned.cache.get(key)


@pytest.mark.parametrize("place", [-1, -100])
def test_a_damaged_entry_is_named_and_computed_again_and_others_stay(tmp_path: Path, place: int) -> None:
    planned = filled(tmp_path)
    pack = pack_of(planned.cache)
    content = bytearray(pack.read_bytes())
    content[place] ^= 1
    pack.write_bytes(content)
    key = planned.keys["eeee"]
    with pytest.raises(ValueError, match=rf"{re.escape(str(pack))} at \d+ is damaged .*deleted"):
        planned.cache.get(key)
    for cache in (planned.cache, Cache(tmp_path)):
        assert plan_embeddings(cache, PROMPTS, "text").missing == 1
    planned.fill(encode_prompts)
    assert planned.cache.get(key)["embeddings"][0, 0] == 4


def test_damaged_records_count_as_missing(tmp_path: Path) -> None:
    planned = filled(tmp_path)
    index = pack_of(planned.cache).with_suffix(".index")
    whole = index.read_bytes()
    for number in (0, 17, 25, 35, 47):  # key, begin, size, form, check
        damaged = bytearray(whole)
        damaged[RECORD.itemsize + number] ^= 1
        index.write_bytes(damaged)
        assert plan_embeddings(Cache(tmp_path), PROMPTS, "text").missing == 1
    index.write_bytes(whole[: RECORD.itemsize] + bytes(3 * RECORD.itemsize) + b"\xff" * 60)
    assert plan_embeddings(Cache(tmp_path), PROMPTS, "text").missing == 4


def test_the_header_of_one_damaged_entry_does_not_hide_the_others(tmp_path: Path) -> None:
    planned = filled(tmp_path)
    pack = pack_of(planned.cache)
    pack.write_bytes(b"\xff" * 50 + pack.read_bytes()[50:])
    again = plan_embeddings(Cache(tmp_path), PROMPTS, "text")
    assert again.missing == 0  # what is damaged is found when it is read
    with pytest.raises(ValueError, match="damaged"):
        again.cache.get(again.keys[""])
    assert again.missing == 1


def test_another_shape_or_name_counts_as_missing_and_the_newer_entry_replaces_it(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    with cache.packing(1):
        cache.put(KEYS[0], {"x": torch.ones(2, 3)}, {})
    for name, shape in (("x", (2, 4)), ("x", (2,)), ("y", (2, 3))):
        assert cache.lacking(KEYS[:1], lambda _, found=(name, shape): found) == KEYS[:1]  # type: ignore[misc]
    assert cache.lacking(KEYS[:1], lambda _: ("x", (None, 3))) == []
    with pytest.raises(ValueError, match=rf"{tmp_path}.*packs.* x \(2, 3\).* y "):
        cache.pick(KEYS[0], cache.get(KEYS[0]), "y", (2, 3))
    with cache.packing(1):
        cache.put(KEYS[0], {"x": torch.ones(5)}, {})
    assert cache.lacking(KEYS[:1], lambda _: ("x", (5,))) == []
    assert cache.get(KEYS[0])["x"].shape == (5,)


def test_a_full_disk_is_said_and_keeps_what_was_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, calls = os.write, []

    def full(file: int, content: bytes) -> int:
        calls.append(len(content))
        if len(calls) == 5:  # the data of the third entry, of which a part fits
            write(file, content[:50])
            raise OSError("no space left on device")
        return write(file, content)

    planned = plan_embeddings(Cache(tmp_path), PROMPTS, "text")
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(ValueError, match=rf"{tmp_path}.*packs cannot be written \(no space left.*cache_dir"):
        planned.fill(encode_prompts)
    monkeypatch.undo()
    monkeypatch.setattr(store, "PACK_ABOVE", 0)
    assert planned.missing == 3
    assert planned.cache.get(planned.keys["b"])["embeddings"][0, 0] == 1


def test_a_disk_that_is_full_when_a_pack_is_closed_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    close = os.close

    def full(file: int) -> None:
        is_pack = os.readlink(f"/proc/self/fd/{file}").endswith(".pack")
        close(file)
        if is_pack:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")

    planned = plan_embeddings(Cache(tmp_path), PROMPTS, "text")
    monkeypatch.setattr(os, "close", full)
    message = rf"{tmp_path}.*packs cannot be written \(Disk quota exceeded\)\. Make room there.*cache_dir"
    with pytest.raises(ValueError, match=message):
        planned.fill(encode_prompts)


def test_a_full_disk_does_not_lose_entries_that_pruning_moves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    planned = filled(tmp_path)
    monkeypatch.setattr(packs_module, "_write", full)
    with pytest.raises(ValueError, match=r"packs cannot be written \(No space left on device\)\. Make room there"):
        prune(Cache(tmp_path), {planned.keys["b"]})
    assert plan_embeddings(Cache(tmp_path), PROMPTS, "text").missing == 0


def test_a_folder_of_packs_that_is_a_file_is_said(tmp_path: Path) -> None:
    (tmp_path / "packs").touch()
    with pytest.raises(ValueError, match=r"packs cannot be written \(File exists\)\. Correct that, or give another"):
        filled(tmp_path)


def test_after_a_part_was_written_the_next_entry_is_where_its_record_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def torn(file: int, content: bytes) -> int:
        monkeypatch.undo()
        os.write(file, content[:3])
        raise OSError("no space left on device")

    writer = PackWriter(tmp_path)
    writer.append(KEYS[0], 5, b"first")
    monkeypatch.setattr(os, "write", torn)
    with pytest.raises(OSError, match="space"):
        writer.append(KEYS[1], 5, b"second")
    writer.append(KEYS[2], 5, b"third")
    writer.close()
    packs = Packs(tmp_path)
    found = [packs.find(key) for key in KEYS[:3]]
    assert [place and place.read() for place in found] == [b"first", None, b"third"]


# ------------------------------------------------------------------ pruning


def test_packs_of_few_used_entries_are_rewritten_and_those_of_none_deleted(tmp_path: Path) -> None:
    one, two = filled(tmp_path, PROMPTS[:3]), filled(tmp_path)
    latents = plan(one.cache)
    latents.fill(encode_images)
    sizes = {key: len(one.cache.place(key).read()) for key in (*two.keys.values(), *latents.work)}  # type: ignore[union-attr]
    used = {two.keys["b"], two.keys["ddd"]}
    gone = [key for key in two.keys.values() if key not in used]
    removed = prune(Cache(tmp_path), used)
    assert removed == {
        "embeddings": (3, sum(sizes[key] for key in gone)),
        "latents": (len(latents.work), sum(sizes[key] for key in latents.work)),
    }
    again = plan_embeddings(Cache(tmp_path), PROMPTS, "text")
    assert again.missing == 3
    assert [again.cache.get(again.keys[prompt])["embeddings"][0, 0].item() for prompt in ("b", "ddd")] == [1, 3]
    assert sum(path.stat().st_size for path in tmp_path.glob("packs/*.pack")) == sum(sizes[key] for key in used)
    assert prune(Cache(tmp_path), used) == {}


def test_a_pack_that_is_mostly_used_stays_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    planned = filled(tmp_path)
    before = pack_of(planned.cache).read_bytes()
    assert prune(planned.cache, {planned.keys[prompt] for prompt in PROMPTS[:4]}) == {}
    assert pack_of(planned.cache).read_bytes() == before
    assert re.search("1 unused", caplog.text)
    assert planned.missing == 0


def test_copies_of_an_entry_are_pruned_to_one(tmp_path: Path) -> None:
    planned = filled(tmp_path)
    cache = planned.cache
    with cache.packing(1):  # as after a killed prune, or of two runs that filled at the same time
        for prompt, key in planned.keys.items():
            cache.put(key, {"embeddings": encode_prompts([prompt])[0]}, {"prompt": prompt})
    assert len(list(tmp_path.glob("packs/*.pack"))) == 2
    assert prune(Cache(tmp_path), set(planned.keys.values()))["embeddings"][0] == 5
    assert len(list(tmp_path.glob("packs/*.pack"))) == 1
    assert planned.missing == 0


def test_nothing_is_pruned_while_a_run_holds_a_lease(tmp_path: Path) -> None:
    planned = filled(tmp_path)
    lease = Lease(planned.cache)
    with pytest.raises(ValueError, match=rf"{planned.cache.folder}\b.*\brun\b"):
        prune(Cache(tmp_path), set())
    assert planned.missing == 0
    lease.close()
    assert prune(Cache(tmp_path), set())["embeddings"][0] == 5
    assert [path.name for path in files(planned.cache)] == [".lock"]


def test_a_key_is_packed_as_its_first_half() -> None:
    assert packed_keys(["0123456789abcdef" * 4]).tobytes().hex() == "0123456789abcdef" * 2
    assert packed_keys([]).shape == (0, 2)
