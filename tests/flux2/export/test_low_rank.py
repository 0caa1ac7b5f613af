"""flux2.export.low_rank: norms without the matrices, the nearest pair of a rank, and errors that are what they say."""

import pytest
import torch

from flux2.adapters.formats import LoraPair
from flux2.export import low_rank


def pair(rank: int = 6, rows: int = 50, columns: int = 40, seed: int = 0) -> LoraPair:
    generator = torch.Generator().manual_seed(seed)
    return LoraPair(torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator))


def matrix(pair: LoraPair) -> torch.Tensor:
    return pair.b.double() @ pair.a.double()


def test_norms_and_distances_are_those_of_the_matrices() -> None:
    one, two = pair(seed=1), pair(rank=3, seed=2)
    assert low_rank.norm(one) == pytest.approx(float(matrix(one).norm()), rel=1e-12)
    wanted = float((matrix(one) - matrix(two)).norm() / matrix(two).norm())
    assert low_rank.distance(one, two) == pytest.approx(wanted, rel=1e-12)
    assert low_rank.distance(one, one) <= 1e-14
    near = LoraPair(one.a, one.b.double() * (1 + 2**-20))
    assert low_rank.distance(near, one) == pytest.approx(2**-20, rel=1e-4), "nothing cancels"


def test_a_sum_of_pairs_is_the_sum_of_their_matrices() -> None:
    one, two = pair(seed=1), pair(rank=3, seed=2)
    found = low_rank.sum_pairs([one, two])
    assert found.a.shape[0] == 9
    torch.testing.assert_close(matrix(found), matrix(one) + matrix(two))


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_a_reduced_pair_is_the_nearest_of_its_rank(rank: int) -> None:
    given = pair()
    values = torch.linalg.svdvals(matrix(given))
    found, error, size = low_rank.reduce_rank(given, rank)
    assert found.a.shape == (rank, 40)
    assert error == pytest.approx(float(values[rank:].norm()), rel=1e-9)
    assert float((matrix(found) - matrix(given)).norm()) == pytest.approx(error, rel=1e-5)
    assert size == pytest.approx(float(values.norm()))


def test_a_pair_of_no_more_than_the_rank_stays_as_it_is() -> None:
    given = pair()
    assert low_rank.reduce_rank(given, 6)[0] is given
    assert low_rank.reduce_rank(given, 60)[0] is given


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "leading"])
@pytest.mark.parametrize("rank", [2, 10])
def test_a_matrix_becomes_the_nearest_pair_and_the_error_is_measured(
    rank: int, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(low_rank, "EXACT_SIDE", 1024 if exact else 0)
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(60, 44, generator=generator) @ torch.diag(0.8 ** torch.arange(44.0))
    values = torch.linalg.svdvals(delta.double())
    found, error, size = low_rank.decompose(delta.clone(), rank)
    assert found.a.shape[0] == rank
    assert float((matrix(found) - delta).norm()) == pytest.approx(error, rel=1e-4)
    assert error == pytest.approx(float(values[rank:].norm()), rel=1e-5 if exact else 0.01)
    assert size == pytest.approx(float(values.norm()))
    again = low_rank.decompose(delta.clone(), rank)[0]
    assert torch.equal(again.a, found.a), "the same at every call"


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "leading"])
def test_max_error_takes_the_smallest_rank_that_meets_it(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank, "EXACT_SIDE", 1024 if exact else 0)
    delta = torch.linalg.qr(torch.randn(60, 50, generator=torch.Generator().manual_seed(0)))[0]
    delta = delta @ torch.diag(0.9 ** torch.arange(50.0))
    values = 0.9 ** torch.arange(50.0)
    for limit in (0.5, 0.1, 0.03):
        found, error, size = low_rank.decompose(delta.clone(), None, limit)
        rank = found.a.shape[0]
        assert error / size <= limit
        assert float(values[rank - 1 :].norm() / values.norm()) > limit, "one less would not do"


def test_directions_that_are_nothing_are_left_out() -> None:
    given = pair(rank=4)
    found, error, size = low_rank.decompose(matrix(given).float(), 32)
    assert found.a.shape[0] == 4
    assert error / size <= 1e-6
    zero, error, size = low_rank.decompose(torch.zeros(9, 7), 4)
    assert (zero.a.shape[0], error, size) == (1, 0.0, 0.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_stays_below_its_bound(dtype: torch.dtype) -> None:
    for seed in range(5):
        given = pair(seed=seed)
        rounded = LoraPair(given.a.to(dtype).float(), given.b.to(dtype).float())
        error = low_rank.distance(rounded, given)
        assert 0.05 * low_rank.rounding_bound(given, dtype) < error <= low_rank.rounding_bound(given, dtype)
