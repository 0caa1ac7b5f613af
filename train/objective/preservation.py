"""Base preservation: on plain prompts, the adapter is to predict what the base predicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from data.sampler import derived_generator
from train.utils.checks import is_count, is_number


@dataclass(frozen=True)
class Preservation:
    """Hold the adapter to the base on prompts that are not what it is for.

    The first `samples` of each micro-batch are predicted once more, at the same noisy latents, with one of `prompts`;
    the mean squared difference to the base's own prediction (adapter off) is added with `weight`. The base is its own
    reference, so no further pictures are needed, unlike for DreamBooth's prior preservation (train/objective/prior.py).
    """

    weight: float = 0.0
    prompts: Sequence[str] = field(default_factory=list)
    samples: int = 0

    def __post_init__(self) -> None:
        if not is_number(self.weight, low=0):
            raise ValueError(f"preservation.weight={self.weight!r} must be a number from 0")
        if not is_count(self.samples):
            raise ValueError(f"preservation.samples={self.samples!r} must be a whole number from 0")
        if not isinstance(self.prompts, list | tuple) or not all(isinstance(prompt, str) for prompt in self.prompts):
            raise ValueError(f"preservation.prompts={self.prompts!r} must be a list of texts")
        if self.weight > 0 and not self.prompts:
            raise ValueError(
                f"preservation.weight={self.weight} has no preservation.prompts: give some, or preservation=none"
            )
        if self.weight > 0 and not self.samples:
            raise ValueError(f"preservation.weight={self.weight} holds no samples: preservation.samples=1 or more")

    @property
    def active(self) -> bool:
        return self.weight > 0

    def choose(self, seed: int, step: int, positions: Sequence[int]) -> list[str]:
        """The prompts for these positions of the global batch."""
        generators = [derived_generator(seed, "preservation", step, position) for position in positions]
        return [self.prompts[int(torch.randint(len(self.prompts), (), generator=g))] for g in generators]
