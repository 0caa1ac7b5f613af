"""Prior preservation: training on images of the class in addition to the dataset preserves the base's knowledge of it.

A LoRA of one dog makes all dogs look like it. So with every micro-batch another one of class images ("a photo of a
dog", without the trigger word) is trained, with a separate weight. (DreamBooth, Ruiz et al. 2023, section 3.2.) The
class images are a dataset, or drawn by the base before training.

They have a separate loader, so they need not have the shape of the other samples; their choice and their noise are
functions of (seed, step, position) like those of the samples.
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
from train.objective.preservation import WEIGHTS
from train.utils.checks import check_count, check_seed, is_count, is_number

MOST = 100_000  # maximum number of class images to draw


@dataclass(frozen=True)
class PriorPreservation:
    """Settings of prior preservation.

    Args:
        weight: Weight of the loss of the class images, relative to that of the samples.
        share: Number of class images for each sample, up to 1; a share, so that it is the same for every split of a
            step into micro-batches and processes.
        dataset: Settings of a dataset of class images; without it the base draws them.
        prompts: Prompts of the drawn images, in turn, and their captions.
        count: Number of images to draw.
        folder: Folder of the drawn images.
        seed: Seed of the first image, incremented for each further one.
        width, height: Size in pixels; None is the training resolution.
        steps, guidance: Sampling settings; None takes the model's own.
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

        if not is_number(self.weight, *WEIGHTS):
            low, high = WEIGHTS
            refuse("weight", f"a number from {low:g} to {high:g}. For no prior preservation, set preservation=none")
        if not is_number(self.share, low=0, high=1) or self.share == 0:
            refuse("share", "a number above 0, up to 1")
        check_seed("preservation.seed", self.seed)
        check_count("preservation.count", self.count, 1, MOST)
        if not isinstance(self.prompts, list | tuple) or not all(isinstance(prompt, str) for prompt in self.prompts):
            refuse("prompts", "a list of strings")
        if any(not prompt.strip() for prompt in self.prompts):
            refuse("prompts", "strings that are not empty: each names the class to draw")
        if len({prompt.strip() for prompt in self.prompts}) < len(self.prompts):
            refuse("prompts", "different strings: each is drawn equally often")
        if self.dataset is not None and not isinstance(self.dataset, Mapping):
            refuse("dataset", "the settings of a dataset, as with +dataset@preservation.dataset=folder")
        if (self.dataset is None) == (not self.prompts):
            raise ValueError(
                f"preservation.prompts={list(self.prompts)!r} with preservation.dataset="
                f"{'given' if self.dataset else None}: preservation=prior needs one of both. Give class images "
                "(+dataset@preservation.dataset=folder) or prompts for the base to draw (preservation.prompts)"
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
        if self.steps is not None:
            check_count("preservation.steps", self.steps, 1, MAX_STEPS)
        if self.guidance is not None and not is_number(self.guidance, 0, MAX_GUIDANCE):
            refuse("guidance", f"a number from 0 to {MAX_GUIDANCE:g}")

    def images_per_batch(self, samples: int) -> int:
        """Return the number of class images for `samples` samples. Raise ValueError if it is not an integer >= 1."""
        if not self.allows(samples):
            raise ValueError(
                f"preservation.share={self.share:g} of batch_size={samples} gives {self.share * samples:g} class "
                "images per batch; choose a share that gives an integer >= 1"
            )
        return round(self.share * samples)

    def allows(self, samples: int) -> bool:
        """Return whether `samples` samples have an integer number of class images."""
        count = self.share * samples
        return count > 0.5 and math.isclose(round(count), count, abs_tol=1e-6)

    @property
    def draws(self) -> bool:
        """Whether the base draws the class images."""
        return self.dataset is None


class ClassPictures:
    """Class images in training, with a loader whose draws are independent of those of the samples.

    Args:
        make: Function that returns the loader for a seed.
        names: Names of the images.
    """

    def __init__(self, make: Callable[..., Loader], seed: int, weight: float, names: Sequence[str]) -> None:
        self.seed = int(torch.randint(2**31, (), generator=derived_generator(seed, "class pictures")))
        self.weight, self.names = weight, names
        self.loader = make(seed=self.seed)

    def micro_batches(self, step: int) -> list[Batch]:
        """Return this process's micro-batches of a step."""
        return self.loader.micro_batches(step)

    def samples(self, step: int) -> list[str]:
        """Return the names of the class images of a step, in all processes."""
        return [self.names[index] for index in self.loader.sampler.batch(step)]
