"""data.cache.pruning: what nobody uses goes, all else stays, and nothing goes while a run uses the cache."""

import os
from pathlib import Path

import pytest
import torch
from cache_helpers import encode_images, encode_prompts, files, plan

from data.cache import Cache, MemoryCache
from data.cache.embeddings import plan_embeddings
from data.cache.pruning import Lease, prune


def test_what_is_not_used_is_removed_and_counted_by_kind(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    latents, prompts = plan(cache), plan_embeddings(cache, ["a", "b", "c"], "text")
    latents.fill(encode_images)
    prompts.fill(encode_prompts)
    used = {*list(latents.work)[:3], prompts.keys["b"]}
    sizes = {path.stem: path.stat().st_size for path in tmp_path.rglob("*.safetensors")}
    gone = set(latents.work) - used, set(prompts.keys.values()) - used
    removed = prune(cache, used)
    assert {path.stem for path in tmp_path.rglob("*.safetensors")} == used
    assert removed == {
        "latents": (1, sum(sizes[key] for key in gone[0])),
        "embeddings": (2, sum(sizes[key] for key in gone[1])),
    }
    assert prune(cache, used) == {}


def test_files_that_are_no_entries_stay(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    foreign = [
        "weights/model.safetensors",
        "ab/model.safetensors",
        f"cd/{'ab' * 32}.safetensors",
        f"{'ab' * 32}.safetensors",
        "ab/.abc.tmp",
        "pictures.json",
    ]
    for name in foreign:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"mine")
    cache.path("ab" * 32).write_bytes(b"no safetensors")
    assert prune(cache, set()) == {"damaged": (1, 14)}
    assert {str(path.relative_to(tmp_path)) for path in files(cache)} == {*foreign, ".lock"}


def test_nothing_is_removed_while_another_process_reads_or_fills(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.put("ab" * 32, {"latents": torch.ones(3)}, {})
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        lease = Lease(cache)
        os.write(ready[1], b"x")
        os.read(go[0], 1)
        os._exit(lease._file is None)
    os.read(ready[0], 1)
    try:
        with pytest.raises(ValueError, match=rf"{cache.folder}\b.*\brun\b"):
            prune(cache, set())
        assert cache.path("ab" * 32).exists()
    finally:
        os.write(go[1], b"x")  # it ends without letting go, as after kill -9
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert prune(cache, set())["latents"][0] == 1


def test_several_runs_share_a_cache_and_a_closed_lease_holds_nothing(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    cache.put("ab" * 32, {"latents": torch.ones(3)}, {})
    leases = [Lease(cache), Lease(cache)]
    for lease in leases:
        with pytest.raises(ValueError, match=rf"{cache.folder}\b.*\brun\b"):
            prune(cache, set())
        lease.close()
    assert prune(cache, set())["latents"][0] == 1


def test_a_lease_on_what_is_not_there_makes_nothing(tmp_path: Path) -> None:
    Lease(Cache(tmp_path / "none")).close()
    Lease(MemoryCache()).close()
    assert list(tmp_path.iterdir()) == []
    assert prune(Cache(tmp_path / "none"), set()) == {}
