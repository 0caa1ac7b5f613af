"""Base preservation: with some prompts, the adapter should predict the same as the base.

The first samples of each micro-batch are predicted again, from the same noisy latents, with other prompts; the mean
squared difference to the base's prediction (adapter disabled) is added to the loss. The base is its own reference, so
unlike DreamBooth's prior preservation (train/objective/prior.py) this needs no further images. The prompts are plain
ones, the empty prompt, or the samples' own captions without the trigger word.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch

from data.sampler import derived_generator
from train.utils.checks import check_count, is_number

WEIGHTS = (1e-6, 1e6)  # with less a loss has no effect, and with more nothing else has
MOST_SAMPLES = 1 << 20  # the largest micro-batch


@dataclass(frozen=True)
class Preservation:
    """Preservation on unrelated prompts: the first `samples` of each micro-batch with one of `prompts` each."""

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

    def rows(self, samples: int) -> int:
        """Return how many of the samples of a micro-batch are predicted again."""
        return min(self.samples, samples) if self.active else 0

    def prompts_for(self, captions: Sequence[str], seed: int, step: int, positions: Sequence[int]) -> list[str]:
        """Return the prompt of each sample that is predicted again, of the samples of a micro-batch."""
        return self.choose(seed, step, positions[: self.rows(len(captions))])

    def all_prompts(self, captions: Iterable[str]) -> Iterable[str]:
        """Return every prompt that `prompts_for` may return, to be encoded."""
        return self.prompts

    def weights(self, captions: Sequence[str], prompts: Sequence[str]) -> list[float] | None:
        """Return the weight of each prompt in the mean over the samples; None is 1 for all."""
        return None


@dataclass(frozen=True)
class BlankPreservation:
    """Preservation on the empty prompt: what the adapter adds should depend on its prompt.

    A sample that trains with the very prompt, as with `caption_dropout`, is not held on it.

    Attributes:
        weight: Weight of the mean squared difference.
        samples: Number of samples of each micro-batch that are predicted again; None is all.
    """

    weight: float = 1.0
    samples: int | None = None

    def __post_init__(self) -> None:
        if not is_number(self.weight, *WEIGHTS):
            low, high = WEIGHTS
            raise ValueError(
                f"preservation.weight={self.weight!r} must be a number from {low:g} to {high:g}. For no preservation, "
                "set preservation=none"
            )
        if self.samples is not None:
            check_count("preservation.samples", self.samples, 1, MOST_SAMPLES)

    @property
    def active(self) -> bool:
        return True

    def replaced(self, caption: str) -> str:
        """Return the prompt for a sample with this caption."""
        return ""

    def rows(self, samples: int) -> int:
        """Return how many of the samples of a micro-batch are predicted again."""
        return samples if self.samples is None else min(self.samples, samples)

    def prompts_for(self, captions: Sequence[str], seed: int, step: int, positions: Sequence[int]) -> list[str]:
        """Return the prompt of each sample that is predicted again, of the samples of a micro-batch."""
        return [self.replaced(caption) for caption in captions[: self.rows(len(captions))]]

    def all_prompts(self, captions: Iterable[str]) -> Iterable[str]:
        """Return every prompt that `prompts_for` may return, to be encoded."""
        return [""]

    def weights(self, captions: Sequence[str], prompts: Sequence[str]) -> list[float] | None:
        """Return the weight of each prompt in the mean over the samples: 0 for a sample that trains with it."""
        return [float(prompt != caption) for prompt, caption in zip(prompts, captions, strict=False)]


@dataclass(frozen=True)
class ClassPreservation(BlankPreservation):
    """Preservation on the sample's own caption, in which a class word replaces the trigger word.

    What is not of the trigger word keeps its look at the very prompts and noisy latents of the dataset. A caption
    without the trigger word is not held: the dataset trains it. (ai-toolkit, `diff_output_preservation`.)

    Attributes:
        trigger: The trigger word in the captions.
        word: The class word, such as "dog"; "" takes the trigger word out.
    """

    trigger: str | None = None
    word: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.trigger, str) or not self.trigger.strip():
            raise ValueError(
                f"preservation.trigger={self.trigger!r} must be the trigger word of the captions. Set it, or "
                "dataset.captions.trigger, which is its default"
            )
        if not isinstance(self.word, str):
            raise ValueError(f"preservation.word={self.word!r} must be a string, or '' to take the trigger word out")
        if self._pattern.search(self.word):
            raise ValueError(
                f"preservation.word={self.word!r} contains the trigger word {self.trigger!r}, which it should replace. "
                "Name the class without it"
            )

    @property
    def _pattern(self) -> re.Pattern[str]:
        assert self.trigger is not None
        return re.compile(rf"(?<!\w){re.escape(self.trigger)}(?!\w)")  # as data/sources/captions.py adds it

    def replaced(self, caption: str) -> str:
        text = self._pattern.sub(lambda found: self.word, caption)
        if self.word or text == caption:
            return text
        text = re.sub(r"\s+(?=[,.;:!?]|$)|\s+(?=\s)", "", text)  # what surrounded the word that is gone
        return re.sub(",{2,}", ",", text).strip(" ,;:")

    def all_prompts(self, captions: Iterable[str]) -> Iterable[str]:
        found = {caption: self.replaced(caption) for caption in captions}
        if all(caption == prompt for caption, prompt in found.items()):
            raise ValueError(
                f"preservation.trigger={self.trigger!r}: no caption contains it, so nothing would be preserved. Set "
                "the word that the captions have, or dataset.captions.trigger, which adds it to each"
            )
        return found.values()
