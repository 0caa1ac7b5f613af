"""How far pictures are from each other, as vectors of a feature model (train/evaluation/features.py), and what that may
mean.

The question of memorization is asked relative to the data: a sample is suspicious if it is nearer to a training picture
than training pictures are to one another. An absolute threshold would mean another thing for each model and data set.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean, median

import torch
from torch import Tensor

NEARER_THAN = 0.95  # of the training pictures: a sample that is nearer to one than so many are to their nearest
FEWEST = 8  # training pictures, below which such a share says nothing


@dataclass(frozen=True)
class Nearest:
    """The training picture that is nearest to a sample.

    Attributes:
        index: of the training picture; `distance` to it.
        nearer_than: the share of the training pictures whose own nearest other one is farther away than that.
    """

    index: int
    distance: float
    nearer_than: float
    suspicious: bool


@dataclass(frozen=True)
class Training:
    """The vectors (N, D) of training pictures, all different.

    Attributes:
        own: for each the distance to its nearest other one, ascending; empty for a single picture.
    """

    vectors: Tensor
    own: tuple[float, ...]

    @classmethod
    def of(cls, vectors: Sequence[Tensor]) -> Training:
        stacked = torch.stack(list(vectors))
        apart = distances(stacked, stacked).fill_diagonal_(float("inf"))
        own = apart.min(1).values.tolist() if len(stacked) > 1 else []
        return cls(stacked, tuple(sorted(own)))

    def nearest(self, vector: Tensor) -> Nearest:
        """To the vector (D,) of a sample."""
        apart = distances(vector[None], self.vectors)[0]
        index = int(apart.argmin())
        found = float(apart[index])
        farther = (len(self.own) - bisect.bisect_right(self.own, found)) / len(self.own) if self.own else 0.0
        return Nearest(index, found, farther, len(self.own) >= FEWEST and farther >= NEARER_THAN)

    @property
    def median(self) -> float | None:
        """Of the distances of training pictures to their nearest others."""
        return median(self.own) if self.own else None


def distances(one: Tensor, other: Tensor) -> Tensor:
    """(N, D), (M, D) -> (N, M) Euclidean, without the shortcut that loses small ones to rounding."""
    return torch.cdist(one.double(), other.double(), compute_mode="donot_use_mm_for_euclid_dist")


def mean_distance(pairs: Sequence[tuple[Tensor, Tensor]]) -> float | None:
    """Of each first to its second; None of none."""
    return fmean(float((a.double() - b.double()).norm()) for a, b in pairs) if pairs else None


def spread(vectors: Sequence[Tensor]) -> float | None:
    """The mean distance between two of them, how varied they are; None for fewer than two."""
    return mean_distance(list(combinations(vectors, 2)))
