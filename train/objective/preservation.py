"""Base preservation: on plain prompts, the adapter should predict the same as the base."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from data.sampler import derived_generator
from train.utils.checks import check_count, is_number

WEIGHTS = (1e-6, 1e6)  # with less a loss has no effect, and with more nothing else has
MOST_SAMPLES = 1 << 20  # the largest micro-batch


@dataclass(frozen=True)
class Preservation:
    """Loss that keeps the adapter's predictions for unrelated prompts close to the base's.

    The first `samples` of each micro-batch are predicted again, from the same noisy latents, with one of `prompts`; the
    mean squared difference to the base's prediction (adapter disabled) is added with `weight`. The base is its own
    reference, so unlike DreamBooth's prior preservation (train/objective/prior.py) this needs no further images.
    """

    weight: float = 0.0
    prompts: Sequence[str] = field(default_factory=list)
    samples: int = 0

    def __post_init__(self) -> None:
        if not is_number(self.weight, *WEIGHTS) and not is_number(self.weight, 0, 0):
            low, high = WEIGHTS
            raise ValueError(f"preservation.weight={self.weight!r} must be 0, or a number from {low:g} to {high:g}")
        check_count("preservation.samples", self.samples, 0, MOST_SAMPLES)
        if not isinstance(self.prompts, list | tuple) or not all(isinstance(prompt, str) for prompt in self.prompts):
            raise ValueError(f"preservation.prompts={self.prompts!r} must be a list of strings")
        if self.weight > 0 and not self.prompts:
            raise ValueError(
                f"preservation.weight={self.weight}: there are no preservation.prompts. Set some, or preservation=none"
            )
        if self.weight > 0 and not self.samples:
            raise ValueError(
                f"preservation.weight={self.weight} has no effect with preservation.samples=0. Set samples >= 1"
            )

    @property
    def active(self) -> bool:
        return self.weight > 0

    def choose(self, seed: int, step: int, positions: Sequence[int]) -> list[str]:
        """Draw the prompts for these positions of the global batch."""
        generators = [derived_generator(seed, "preservation", step, position) for position in positions]
        return [self.prompts[int(torch.randint(len(self.prompts), (), generator=g))] for g in generators]
