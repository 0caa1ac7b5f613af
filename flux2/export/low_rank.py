"""Low-rank pairs as matrices: norms and distances, sums, and the nearest pair of a given rank.

A difference of products B A is as large as a layer, and cancels in float32 if both are nearly equal. Both are avoided:
B A has the norm of R_B R_A^T, with B = Q_B R_B and A^T = Q_A R_A (QR), small matrices of float64. The nearest matrix of
a rank is the truncated singular value decomposition (Eckart and Young, 1936); for a matrix as large as a layer only the
leading part is computed, by `torch.svd_lowrank` (arxiv.org/abs/0909.4061). Errors are Frobenius norms of the difference
relative to the norm of what is approximated.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flux2.adapters.formats import LoraPair

EXACT_SIDE = 1024  # a matrix with at most this shorter side is decomposed exactly
OVERSAMPLING = 8  # extra directions, which make the retained ones nearly exact
ITERATIONS = 4
NEGLIGIBLE = 1e-6  # relative to the largest singular value; smaller ones are rounding errors of zeros


def sum_pairs(pairs: Sequence[LoraPair]) -> LoraPair:
    """Return the sum of B A as one pair, whose rank is the sum of ranks."""
    if len(pairs) == 1:
        return pairs[0]
    return LoraPair(torch.cat([pair.a for pair in pairs]), torch.cat([pair.b for pair in pairs], dim=1))


def total_pair(pairs: Sequence[LoraPair]) -> LoraPair:
    """Return the sum as `sum_pairs` does, and zero of rank 1 if it cancels: what is left are errors of rounding."""
    total = sum_pairs(pairs)
    bound = float(total.b.double().norm() * total.a.double().norm())
    if norm(total) <= torch.finfo(torch.float32).eps * bound < float("inf"):  # false for values that are not finite
        return LoraPair(torch.zeros_like(total.a[:1]), torch.zeros_like(total.b[:, :1]))
    return total


def core(pair: LoraPair) -> tuple[Tensor, Tensor, Tensor]:
    """Return Q_B (out, r), R_B R_A^T (r, s), Q_A (in, s) in float64, with B A = Q_B R_B R_A^T Q_A^T."""
    q_b, r_b = torch.linalg.qr(pair.b.double())
    q_a, r_a = torch.linalg.qr(pair.a.double().T)
    return q_b, r_b @ r_a.T, q_a


def norm(pair: LoraPair) -> float:
    """Return the norm of B A."""
    return float(core(pair)[1].norm())


def ratio(error: float, size: float) -> float:
    """Return `error` / `size`, with 0 / 0 = 0."""
    return error / size if size else 0.0 if error == 0 else float("inf")


def distance(approximation: LoraPair, exact: LoraPair) -> float:
    """Return the relative error of one update as an approximation of the other."""
    return ratio(norm(sum_pairs([approximation, LoraPair(exact.a, -exact.b)])), norm(exact))


def rounding_bound(pair: LoraPair, dtype: torch.dtype) -> float:
    """Return the largest `distance` that rounding A and B to `dtype` can cause, except by underflow.

    Each number changes by at most u of itself, so each product by at most 2 u + u^2 of |B| |A|.
    """
    unit = torch.finfo(dtype).eps / 2
    a, b = pair.a.double().abs(), pair.b.double().abs()
    size = float(((b.T @ b) * (a @ a.T)).sum().sqrt())
    return ratio((2 * unit + unit**2) * size, norm(pair))


def choose_rank(values: Tensor, total: float, rank: int | None, max_error: float | None) -> int | None:
    """Return how many of the descending singular `values` to keep, at least one; None if these are not enough.

    They may be only the first ones; `total` is the norm of all. Either `rank` is the largest number to keep, or as few
    as possible are kept with at most the relative error `max_error`.
    """
    if rank is not None:
        return max(1, min(rank, int((values > NEGLIGIBLE * values[0]).sum())))
    assert max_error is not None
    remainder = total**2 - values.double().square().cumsum(0)
    sufficient = (remainder <= (max_error * total) ** 2).nonzero()
    return int(sufficient[0]) + 1 if len(sufficient) else None


def split(u: Tensor, s: Tensor, v: Tensor, rank: int) -> LoraPair:
    """Return u diag(s) v^T truncated to `rank`, the scale divided equally between B and A."""
    root = s[:rank].sqrt()
    return LoraPair((v[:, :rank] * root).T.float().contiguous(), (u[:, :rank] * root).float().contiguous())


def reduce_rank(
    pair: LoraPair, rank: int | None = None, max_error: float | None = None
) -> tuple[LoraPair, float, float]:
    """Return the nearest pair of `rank`, or of the smallest rank with at most `max_error`; `pair` itself if it has
    less.

    Also returns the norms of the difference and of what it approximates.
    """
    q_b, middle, q_a = core(pair)
    u, s, vh = torch.linalg.svd(middle)
    total = float(s.norm())
    kept_rank = choose_rank(s, total, rank, max_error) or len(s)
    if kept_rank >= pair.a.shape[0]:
        return pair, 0.0, total
    return split(q_b @ u, s, q_a @ vh.T, kept_rank), float(s[kept_rank:].norm()), total


def decompose(delta: Tensor, rank: int | None = None, max_error: float | None = None) -> tuple[LoraPair, float, float]:
    """Return a pair for a full matrix (out, in) of float32 as `reduce_rank` does, on the CPU. `delta` is overwritten.

    The difference is measured, not computed from singular values.
    """
    total, side = float(delta.norm()), min(delta.shape)
    if side <= EXACT_SIDE:
        u, s, vh = torch.linalg.svd(delta.double(), full_matrices=False)
        pair = split(u, s, vh.T, choose_rank(s, total, rank, max_error) or side)
    else:
        count = rank or 32
        while True:
            u, s, v = leading_vectors(delta, min(count + OVERSAMPLING, side))
            if (kept_rank := choose_rank(s, total, rank, max_error)) or len(s) == side:
                break
            count *= 2
        pair = split(u, s, v, kept_rank or side)
    delta.addmm_(pair.b, pair.a, alpha=-1)
    return LoraPair(pair.a.cpu(), pair.b.cpu()), float(delta.norm()), total


def leading_vectors(delta: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first `count` singular vectors and values, the same at every call."""
    devices = [delta.device] if delta.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(0)
        return torch.svd_lowrank(delta, q=count, niter=ITERATIONS)
