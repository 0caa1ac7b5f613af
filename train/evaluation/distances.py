"""Distances between images as vectors of a feature model (train/evaluation/features.py), and what they may mean.

Whether an image is memorized is judged relative to the data: it is suspicious if it is nearer to a training image than
training images are to one another. An absolute threshold would mean something else for each model and data set.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean
from typing import Self

import torch
from torch import Tensor

NEARER_THAN = 0.95  # share of the training images; an image is suspicious if it is nearer to one than this many are
MIN_PICTURES = 8  # with fewer training images such a share says nothing


@dataclass(frozen=True)
class Nearest:
    """The training image that is nearest to an image."""

    index: int
    distance: float
    nearer_than: float  # share of the training images whose own nearest other one is farther away than `distance`
    suspicious: bool  # whether that share suggests a copy


@dataclass(frozen=True)
class TrainingDistances:
    """The training images, all different."""

    vectors: Tensor  # (N, D)
    own: tuple[float, ...]  # distance of each to its nearest other one, ascending; empty for a single image

    @classmethod
    def from_vectors(cls, vectors: Sequence[Tensor]) -> Self:
        stacked = torch.stack(list(vectors))
        apart = distances(stacked, stacked).fill_diagonal_(float("inf"))
        own = apart.min(1).values.tolist() if len(stacked) > 1 else []
        return cls(stacked, tuple(sorted(own)))

    def nearest(self, vector: Tensor) -> Nearest:
        """Return the training image nearest to the vector (D,) of an image."""
        apart = distances(vector[None], self.vectors)[0]
        index = int(apart.argmin())
        found = float(apart[index])
        farther = (len(self.own) - bisect.bisect_right(self.own, found)) / len(self.own) if self.own else 0.0
        return Nearest(index, found, farther, len(self.own) >= MIN_PICTURES and farther >= NEARER_THAN)


def distances(one: Tensor, other: Tensor) -> Tensor:
    """(N, D), (M, D) -> (N, M) Euclidean, without the shortcut that loses small distances to rounding."""
    return torch.cdist(one.double(), other.double(), compute_mode="donot_use_mm_for_euclid_dist")


def mean_distance(pairs: Sequence[tuple[Tensor, Tensor]]) -> float | None:
    """Return the mean distance from the first to the second of each pair; None without pairs."""
    return fmean(float((a.double() - b.double()).norm()) for a, b in pairs) if pairs else None


def spread(vectors: Sequence[Tensor]) -> float | None:
    """Return the mean distance between two of the vectors, a measure of variety; None for fewer than two."""
    return mean_distance(list(combinations(vectors, 2)))
