"""Prior preservation: what the base knows of a class is kept by training on pictures of that class beside one's own.

A LoRA of one dog makes all dogs look like it. So beside every micro-batch another one of class pictures ("a photo of a
dog", without the trigger word) is trained, with a weight of its own. (DreamBooth, Ruiz et al. 2023, section 3.2.) The
class pictures are given as a dataset, or drawn by the base before training.

They have a loader of their own, so they need not have the shape of the other samples; which are trained, and with what
noise, is a function of (seed, step, position) as everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from data.loader import Batch, Loader
from data.sampler import derived_generator
from flux2.models.variants import PIXELS_PER_TOKEN
from flux2.utils.checks import MAX_GUIDANCE, MAX_PIXELS, MAX_STEPS
from train.utils.checks import check_seed, is_count, is_number

MOST = 100_000  # class pictures that are drawn


@dataclass(frozen=True)
class PriorPreservation:
    """The settings.

    Args:
        weight: of the class pictures' loss, beside that of the others.
        share: class pictures for each sample, up to 1; a share, so that they are the same however a step is cut into
            micro-batches and processes.
        dataset: the settings of a dataset of class pictures; without it they are drawn.
        prompts: of the pictures that are drawn, in turn; also their captions.
        count: how many are drawn.
        folder: where they are kept.
        seed: of the first, the next ones counting up.
        width, height: pixels; None: the training resolution.
        steps, guidance: of sampling; None takes the model's own.
    """

    weight: float = 1.0
    share: float = 1.0
    dataset: Mapping[str, Any] | None = None
    prompts: Sequence[str] = field(default_factory=list)
    count: int = 100
    folder: str = "outputs/class_pictures"
    seed: int = 0
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance: float | None = None

    def __post_init__(self) -> None:
        def refuse(key: str, what: str) -> None:
            raise ValueError(f"preservation.{key}={getattr(self, key)!r} must be {what}")

        if not is_number(self.weight, low=0) or self.weight == 0:
            refuse("weight", "a positive number (preservation=none is without)")
        if not is_number(self.share, low=0, high=1) or self.share == 0:
            refuse("share", "a number above 0, up to 1")
        check_seed("preservation.seed", self.seed)
        if not is_count(self.count, 1) or self.count > MOST:
            refuse("count", f"a whole number from 1 to {MOST}")
        if not isinstance(self.prompts, list | tuple) or not all(isinstance(prompt, str) for prompt in self.prompts):
            refuse("prompts", "a list of texts")
        if any(not prompt.strip() for prompt in self.prompts):
            refuse("prompts", "texts with words in them: each names the class that is drawn")
        if len({prompt.strip() for prompt in self.prompts}) < len(self.prompts):
            refuse("prompts", "different texts: they are drawn in turn, each as often as the others")
        if self.dataset is not None and not isinstance(self.dataset, Mapping):
            refuse("dataset", "the settings of a dataset: +dataset@preservation.dataset=folder")
        if (self.dataset is None) == (not self.prompts):
            raise ValueError(
                f"preservation=prior takes class pictures (+dataset@preservation.dataset=folder) or class prompts that "
                f"the base draws (preservation.prompts), one of them: prompts={list(self.prompts)!r}, "
                f"dataset={'given' if self.dataset else None}"
            )
        if not isinstance(self.folder, str) or not self.folder:
            refuse("folder", "a folder")
        for key in ("width", "height"):
            value = getattr(self, key)
            if value is not None and (not is_count(value, PIXELS_PER_TOKEN) or value % PIXELS_PER_TOKEN):
                refuse(key, f"a multiple of {PIXELS_PER_TOKEN} pixels")
        if (self.width or 1) * (self.height or 1) > MAX_PIXELS:
            raise ValueError(
                f"preservation.width={self.width} with preservation.height={self.height} must be at most 8192 x 8192 "
                "pixels"
            )
        if self.steps is not None and (not is_count(self.steps, 1) or self.steps > MAX_STEPS):
            refuse("steps", f"a whole number from 1 to {MAX_STEPS}")
        if self.guidance is not None and not is_number(self.guidance, 0, MAX_GUIDANCE):
            refuse("guidance", f"a number from 0 to {MAX_GUIDANCE:g}")

    def images_per_batch(self, samples: int) -> int:
        """Return the number of class images for `samples` samples. Raise ValueError if it is not an integer >= 1."""
        count = round(self.share * samples)
        if not math.isclose(count, self.share * samples, abs_tol=1e-6) or not count:
            raise ValueError(
                f"preservation.share={self.share:g} of batch_size={samples} gives {self.share * samples:g} class "
                "images per batch; choose a share that gives an integer >= 1"
            )
        return count

    @property
    def draws(self) -> bool:
        """Whether the base draws them."""
        return self.dataset is None


class ClassPictures:
    """Class pictures in training: a loader, whose draws are others than those of the samples beside it.

    Args:
        make: `data.loader.Loader`, but for its seed.
        names: of the pictures.
    """

    def __init__(self, make: Callable[..., Loader], seed: int, weight: float, names: Sequence[str]) -> None:
        self.seed = int(torch.randint(2**31, (), generator=derived_generator(seed, "class pictures")))
        self.weight, self.names = weight, names
        self.loader = make(seed=self.seed)

    def micro_batches(self, step: int) -> list[Batch]:
        """This process's, of a step."""
        return self.loader.micro_batches(step)

    def samples(self, step: int) -> list[str]:
        """The names of those of a step, in all processes."""
        return [self.names[index] for index in self.loader.sampler.batch(step)]
