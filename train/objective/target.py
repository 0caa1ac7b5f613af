"""What a prediction is compared to: the group `target`.

Usually it is the flow v = e - x (train/objective/noise.py). With contrastive guidance it is the flow as classifier-free
guidance changes it: with the model's own prediction u for the empty prompt, from the same noisy latents and without a
gradient, the target is

    alpha u + g (v - alpha u),

so the adapter learns the guided prediction, and is sampled with one prediction per step instead of two. (ai-toolkit,
`do_guidance_loss`; alpha as in "CFG-Zero*", Fan et al. 2025.)

A slider learns a direction between two prompts from the base alone. With the base's predictions P, N, Z for a positive,
a negative and a neutral prompt from the same noisy latents, the target of the neutral prompt is

    Z + g (P - N) at scale 1 of the adapter,        Z - g (P - N) at scale -1,

each brought to the mean and standard deviation of Z, so that images keep their contrast. (Concept Sliders, Gandikota et
al. 2023; in this form in ai-toolkit, ConceptSliderTrainer.)

A slider from pairs of images learns the flow of the one image at scale 1, and that of the other at scale -1, with the
same noise at the same timestep, so that the two differ in what the pair differs in. (Concept Sliders, "visual sliders";
ai-toolkit, ImageReferenceSliderTrainer.)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import ClassVar

import torch
from torch import Tensor

from data.loader import Batch
from data.sources.captions import PLACEHOLDER
from flux2.models.variants import Variant
from flux2.utils.checks import MAX_GUIDANCE
from train.utils.checks import is_number

SCHEDULES = ("constant", "sigma")
CAPTION = "{caption}"  # stands for the sample's caption
GUIDANCES = (0.01, 100.0)  # of a slider


@dataclass(frozen=True)
class Flow:
    """The flow, on which the model was trained.

    Attributes:
        name: Its choice in conf/target.
        scales: Scales of the adapter at which it is trained.
        uses_pairs: Whether it needs a rejected image for every sample.
    """

    name: ClassVar[str] = "flow"
    scales: ClassVar[Sequence[float]] = (1.0,)
    uses_pairs: ClassVar[bool] = False

    def check(self, variant: Variant, keep_best: int) -> None:
        """Raise ValueError if this target does not suit the model, or checkpoints that are kept by validation loss."""

    def prompts_for(self, captions: Sequence[str]) -> list[list[str]]:
        """Return lists of a prompt for each sample, whose predictions the target is made of."""
        return []

    def all_prompts(self, captions: Iterable[str]) -> Iterable[str]:
        """Return every prompt that `prompts_for` may return, to be encoded."""
        return []

    def at_scales(self, batch: Batch, step: int) -> list[tuple[Batch, float]]:
        """Return what a step trains for a batch: batches of its size, and the scale of the adapter for each."""
        return [(batch, 1.0)]

    def warnings(self, sample_guidance: float) -> list[str]:
        """Return warnings about the guidance scale of sample grids."""
        return []


@dataclass(frozen=True)
class ContrastiveGuidance(Flow):
    """The flow with classifier-free guidance.

    Attributes:
        scale: Guidance scale g that the adapter learns.
        schedule: `constant`, or `sigma`: 1 + (g - 1) t at timestep t, the full scale at the noise and none at the
            image.
        optimized_scale: Use alpha = <v, u> / |u|^2 of each sample, the multiple of u that is closest to v, instead of
            1.
    """

    name: ClassVar[str] = "contrastive"
    scale: float = 3.0
    schedule: str = "constant"
    optimized_scale: bool = False

    def __post_init__(self) -> None:
        if not is_number(self.scale, 1, MAX_GUIDANCE) or self.scale == 1:
            raise ValueError(
                f"target.scale={self.scale!r} must be a number above 1, up to {MAX_GUIDANCE:g}. Without guidance, set "
                "target=flow"
            )
        if self.schedule not in SCHEDULES:
            raise ValueError(f"target.schedule={self.schedule!r} must be one of {', '.join(SCHEDULES)}")
        if not isinstance(self.optimized_scale, bool):
            raise ValueError(f"target.optimized_scale={self.optimized_scale!r} must be true or false")

    def check(self, variant: Variant, keep_best: int) -> None:
        if variant.transformer.guidance or variant.guidance == 1:
            why = (
                "takes the guidance scale as an input"
                if variant.transformer.guidance
                else "is distilled to a few steps"
            )
            raise ValueError(
                f"target=contrastive with model={variant.name}, which {why} and is sampled without classifier-free "
                "guidance already. Set target=flow, or a klein base model, such as model=klein_base_4b"
            )

        if keep_best:
            raise ValueError(
                f"keep_best={keep_best} with target=contrastive: the validation loss compares to the flow without "
                "guidance, and is higher the more guidance is learned. Set keep_best=0"
            )

    def warnings(self, sample_guidance: float) -> list[str]:
        if sample_guidance == 1:
            return []
        return [
            f"target=contrastive trains an adapter that is sampled without classifier-free guidance, and sample grids "
            f"have a guidance scale of {sample_guidance:g}, which guides twice: set sample.guidance=1"
        ]

    def guided(self, flow: Tensor, unconditional: Tensor, times: Tensor, has_caption: Tensor) -> Tensor:
        """Return the target (B, n, C) for flow and unconditional prediction (B, n, C) at timesteps (B,).

        A sample without a caption (False in `has_caption`, (B,)) has the flow as its target: u is learned from it.
        """
        u, g = unconditional, self.scale
        scale = 1 + (g - 1) * times[:, None, None] if self.schedule == "sigma" else g
        if self.optimized_scale:
            u = u * ((flow * u).sum((1, 2), keepdim=True) / u.square().sum((1, 2), keepdim=True))
        return torch.where(has_caption[:, None, None], u + scale * (flow - u), flow)


@dataclass(frozen=True)
class Slider(Flow):
    """A direction between two prompts, in which {caption} stands for the sample's caption.

    Even steps train the adapter at scale 1, odd ones at -1.

    Attributes:
        positive, negative: Prompts at the ends.
        neutral: Prompt that is moved.
        guidance: Factor g of the difference.
    """

    name: ClassVar[str] = "slider"
    scales: ClassVar[Sequence[float]] = (1.0, -1.0)
    positive: str
    negative: str
    neutral: str = CAPTION
    guidance: float = 3.0

    def __post_init__(self) -> None:
        for key in ("positive", "negative", "neutral"):
            if not isinstance(value := getattr(self, key), str):
                raise ValueError(f"target.{key}={value!r} must be a prompt, in which {CAPTION} is the sample's caption")
            if others := PLACEHOLDER.findall(value.replace(CAPTION, "")):
                raise ValueError(
                    f"target.{key}={value!r} has {', '.join(others)}, and the only placeholder is {CAPTION}. Write the "
                    "text itself"
                )
        if self.positive.strip() == self.negative.strip():
            raise ValueError(
                f"target.positive={self.positive!r} and target.negative are the same, so there is no direction between "
                "them. Give the two ends"
            )
        low, high = GUIDANCES
        if not is_number(self.guidance, low, high):
            raise ValueError(f"target.guidance={self.guidance!r} must be a number from {low:g} to {high:g}")

    def check(self, variant: Variant, keep_best: int) -> None:
        if keep_best:
            raise ValueError(
                f"keep_best={keep_best} with target=slider: the validation loss compares to the flow of the images, "
                "which a slider does not learn. Set keep_best=0"
            )

    def prompts_for(self, captions: Sequence[str]) -> list[list[str]]:
        """Return the positive, the negative and the neutral prompts."""
        forms = self.positive, self.negative, self.neutral
        return [[form.replace(CAPTION, caption) for caption in captions] for form in forms]

    def all_prompts(self, captions: Iterable[str]) -> Iterable[str]:
        return chain.from_iterable(self.prompts_for([*captions, ""]))

    def at_scales(self, batch: Batch, step: int) -> list[tuple[Batch, float]]:
        return [(batch, self.scales[step % 2])]

    def moved(self, positive: Tensor, negative: Tensor, neutral: Tensor, scale: float) -> Tensor:
        """Return the target (B, n, C) at a scale of the adapter, 1 or -1, for predictions (B, n, C)."""
        moved = neutral + scale * self.guidance * (positive - negative)
        ends = (1, 2)
        off = moved - moved.mean(ends, keepdim=True)
        return neutral.mean(ends, keepdim=True) + off * (neutral.std(ends, keepdim=True) / off.std(ends, keepdim=True))


@dataclass(frozen=True)
class SliderImages(Flow):
    """The flow of the chosen image of a pair at scale 1 of the adapter, and that of the rejected one at scale -1.

    Every step trains both scales. Class images, which are no pairs, are trained at both too.
    """

    name: ClassVar[str] = "slider_images"
    scales: ClassVar[Sequence[float]] = (1.0, -1.0)
    uses_pairs: ClassVar[bool] = True

    def at_scales(self, batch: Batch, step: int) -> list[tuple[Batch, float]]:
        ends = batch.latents, batch.latents if batch.rejected is None else batch.rejected
        return [
            (replace(batch, latents=latents, rejected=None), scale)
            for latents, scale in zip(ends, self.scales, strict=True)
        ]
