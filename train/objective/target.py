"""What a prediction is compared to: the group `target`.

Usually it is the flow v = e - x (train/objective/noise.py). With contrastive guidance it is the flow as classifier-free
guidance changes it: with the model's own prediction u for the empty prompt, from the same noisy latents and without a
gradient, the target is

    alpha u + g (v - alpha u),

so the adapter learns the guided prediction, and is sampled with one prediction per step instead of two. (ai-toolkit,
`do_guidance_loss`; alpha as in "CFG-Zero*", Fan et al. 2025.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flux2.models.variants import Variant
from flux2.utils.checks import MAX_GUIDANCE
from train.utils.checks import is_number

SCHEDULES = ("constant", "sigma")


@dataclass(frozen=True)
class Flow:
    """The flow, on which the model was trained."""

    def check(self, variant: Variant, keep_best: int) -> None:
        """Raise ValueError if this target does not suit the model, or checkpoints that are kept by validation loss."""

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
