"""The division of a model's blocks over several GPUs that needs the least memory of any of them."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

BALANCE = 1e6  # bytes; divisions whose largest peaks differ by less are equally good


@dataclass(frozen=True)
class Part:
    """The blocks on one device: from number `start`, counted from 0, up to `stop`."""

    start: int
    stop: int
    is_first: bool = True  # whether they begin the model, with the layers before the blocks
    is_last: bool = True  # whether they end it, with the final layer


def parts_of(split: Sequence[int]) -> list[Part]:
    """Return the parts of a model with these numbers of blocks."""
    cuts = [0, *accumulate(split)]
    return [Part(start, stop, start == 0, stop == cuts[-1]) for start, stop in pairwise(cuts)]


def divide(total: int, count: int, peak: Callable[[Part], float]) -> tuple[int, ...]:
    """Return the number of blocks of each of `count` parts whose largest peak is as small as possible.

    `peak` returns the bytes of a part, the more the more blocks it has. Raises ValueError for more parts than blocks.
    """
    low, high = 0.0, peak(Part(0, total))
    best = pack(total, count, peak, high)
    if best is None:
        raise ValueError(
            f"memory.split divides {total} blocks over {count} GPUs, which is less than one block for each. Make fewer "
            "GPUs visible (CUDA_VISIBLE_DEVICES), or give train/plan.py fewer, such as +cards=2."
        )
    while high - low > BALANCE:
        middle = (low + high) / 2
        found = pack(total, count, peak, middle)
        low, high, best = (middle, high, best) if found is None else (low, middle, found)
    return best


def pack(total: int, count: int, peak: Callable[[Part], float], limit: float) -> tuple[int, ...] | None:
    """Return the most blocks for each part in turn within `limit` bytes; None if some of the `total` are left."""
    split: list[int] = []
    for later in reversed(range(count)):  # parts after this one, which need a block each
        start = sum(split)
        stops = range(start + 1, total - later + 1) if later else range(total, total + 1)
        fitting = bisect_right(stops, limit, key=lambda stop: peak(Part(start, stop, start == 0, stop == total)))
        if not fitting:
            return None
        split.append(stops[fitting - 1] - start)
    return tuple(split)
