"""data.cache.embeddings: what is stored in 8 bits comes back nearly, whatever is beside it, and is another entry."""

from pathlib import Path

import pytest
import torch
from cache_helpers import encode_prompts

from data.cache import Cache
from data.cache.embeddings import pack, plan_embeddings, unpack


def states(tokens: int = 7, width: int = 384) -> torch.Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(0))


def restored(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return unpack(Cache("unused"), "ab" * 32, tensors)


def test_packed_embeddings_are_within_half_a_step_of_three_bits() -> None:
    given = states().bfloat16()
    tensors = pack(given)
    assert tensors["embeddings"].dtype == torch.float8_e4m3fn
    assert (tensors["embeddings"].shape, tensors["scales"].shape) == ((7, 384), (7, 3))
    found = restored(tensors)
    assert found.dtype == torch.float32
    largest = given.float().unflatten(1, (3, 128)).abs().amax(-1).repeat_interleave(128, 1)
    # e4m3 has 3 bits behind its leading one, and steps of 2^-9 below 2^-6, where 448 stands for the largest of a group
    limit = torch.maximum(given.float().abs() / 16, largest * 2**-10 / 448)
    assert ((found - given.float()).abs() <= limit * 1.001).all()
    assert (found != given.float()).any()


def test_an_outlier_spoils_its_own_group_alone() -> None:
    given = states()
    given[2, 5] = 1e6
    found = restored(pack(given))
    assert found[2, 5] == pytest.approx(1e6, rel=0.01)
    others = torch.ones_like(given, dtype=torch.bool)
    others[2, :128] = False
    assert torch.equal(found[others], restored(pack(states()))[others])


@pytest.mark.parametrize("width", [6, 100, 130])
def test_widths_that_are_no_multiple_of_a_group_and_zeros_come_back(width: int) -> None:
    given = states(3, width)
    given[1] = 0
    found = restored(pack(given))
    assert torch.equal(found[1], given[1])
    torch.testing.assert_close(found, given, atol=0.01, rtol=0.07)


def test_storage_in_fp8_is_an_entry_of_its_own_of_a_quarter_of_the_size(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    full, small = (plan_embeddings(cache, ["a cat"], "text", fp8) for fp8 in (False, True))
    assert full.keys["a cat"] != small.keys["a cat"]
    for plan in (full, small):
        assert plan.missing == 1
        plan.fill(encode_prompts)
        assert plan.missing == 0
        found = unpack(cache, plan.keys["a cat"], cache.get(plan.keys["a cat"]))
        assert torch.equal(found, torch.full((4, 6), 5.0))
    sizes = [plan.size(512, 15360, torch.bfloat16) for plan in (full, small)]
    assert sizes == [15_728_640, 512 * (15360 + 4 * 120)]
    tensors = cache.get(small.keys["a cat"])
    assert sum(tensor.nbytes for tensor in tensors.values()) == small.size(4, 6, torch.float32)


def test_a_packed_entry_without_its_scales_is_named(tmp_path: Path) -> None:
    cache, key = Cache(tmp_path), "ab" * 32
    tensors = pack(states())
    with pytest.raises(ValueError, match=rf"{cache.path(key)}\b.*\(7, 384\).* scales \(7, 3\)"):
        unpack(cache, key, {"embeddings": tensors["embeddings"]})
