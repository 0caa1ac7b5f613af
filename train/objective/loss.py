"""How far predictions are from their targets: the group `loss`, with masks and weights of samples.

A loss is the mean over each sample's tokens, and then over samples. If samples have masks, the first mean is weighted
by a sample's mask and the second is not: the masked area does not change the weight of a sample, nor does it matter
which samples share a micro-batch. Weights of samples by timestep are in train/objective/weighting.py.

Outside of a mask m a sample may still count: with m' = clamp(m, unmasked_weight, 1), the loss of a token is

    m' distance(prediction, target) + unmasked_prior (1 - m') distance(prediction, base),

and each of the two is a mean weighted by m' and by 1 - m'. The base is the model without its adapter, so what the mask
leaves out is held to what it was. (OneTrainer, modules/util/loss/masked_loss.py.)
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from data.loader import Batch
from data.sampler import derived_generator
from train.utils.checks import is_number

MOST_PRIOR = 1e6  # of `unmasked_prior`; with more nothing is learned inside the mask
DELTAS = (1e-6, 1e6)  # below, a Huber loss is the absolute error in float32; above, it is the squared error
BETAS = (1e-3, 1e9)
SCHEDULES = ("constant", "exponential")


@dataclass(frozen=True, kw_only=True)
class MSE:
    """The mean of `d^2` over differences d of prediction and target.

    Attributes:
        unmasked_weight: Least weight of a token in its sample's mask.
        unmasked_prior: Weight of the distance to the base's prediction outside of the mask.
        unmasked_probability: Share of samples that train without their mask.
    """

    unmasked_weight: float = 0.0
    unmasked_prior: float = 0.0
    unmasked_probability: float = 0.0

    def __post_init__(self) -> None:
        for key in ("unmasked_weight", "unmasked_probability"):
            value = getattr(self, key)
            if not is_number(value, 0, 1) or value == 1:
                raise ValueError(
                    f"loss.{key}={value!r} must be a number >= 0 and < 1. To train without masks, set dataset.mask=null"
                )
        if not is_number(self.unmasked_prior, 0, MOST_PRIOR):
            raise ValueError(f"loss.unmasked_prior={self.unmasked_prior!r} must be a number from 0 to {MOST_PRIOR:g}")

    @property
    def needs_base(self) -> bool:
        """Whether the base's predictions for the samples are needed, also for a micro-batch without masks: processes
        with a sharded base must call the model equally often."""
        return self.unmasked_prior > 0

    def check_masks(self, any_mask: bool) -> None:
        """Raise ValueError for settings of masks if no sample has a mask."""
        for key in ("unmasked_weight", "unmasked_prior", "unmasked_probability"):
            if getattr(self, key) and not any_mask:
                raise ValueError(
                    f"loss.{key}={getattr(self, key)} has no effect: no sample has a mask. Set dataset.mask, or "
                    f"loss.{key}=0"
                )

    def drops_mask(self, seed: int, step: int, position: int) -> bool:
        """Return whether the sample at a position of the global batch is trained without its mask in this step."""
        generator = derived_generator(seed, "unmasked", step, position)
        return bool(torch.rand((), generator=generator) < self.unmasked_probability)

    def token_weights(self, mask: Tensor) -> Tensor:
        """Return the weights of a mask in the loss, from 0 to 1."""
        return mask.clamp(min=self.unmasked_weight)

    def with_drawn_masks(self, batch: Batch, seed: int, step: int) -> Batch:
        """Return the batch in which samples that are drawn by (seed, step, position) have no mask."""
        if batch.mask is None or not self.unmasked_probability:
            return batch
        drawn = torch.tensor([self.drops_mask(seed, step, position) for position in batch.positions])
        return replace(batch, mask=torch.where(drawn[:, None, None, None], 1.0, batch.mask))

    def __call__(
        self,
        prediction: Tensor,
        target: Tensor,
        mask: Tensor | None = None,
        weights: Tensor | None = None,
        times: Tensor | None = None,
        base: Tensor | None = None,
    ) -> Tensor:
        """Return the loss, shape (), of (B, n, C) tokens at timesteps (B,), which only some losses use.

        `base` is the base's prediction, for `unmasked_prior`.

        Per sample: sum(mask * mean over C of the distances) / sum(mask), with mask (B, n, 1). Over the batch: the mean
        of sample losses times weights (B,). A sample whose mask is 0 everywhere, as in a crop without unmasked pixels,
        has loss 0. None is 1 everywhere.
        """
        if mask is None and weights is None:
            return self.mean(prediction, target, times)
        if mask is not None:
            mask = self.token_weights(mask)
        losses = mean_of_tokens(self.distances(prediction, target, times), mask)
        if mask is not None and base is not None:
            losses = losses + self.unmasked_prior * mean_of_tokens(self.distances(prediction, base, times), 1 - mask)
        return (losses if weights is None else losses * weights).mean()

    def mean(self, prediction: Tensor, target: Tensor, times: Tensor | None) -> Tensor:
        """Return the mean distance, shape (), of all numbers of all tokens."""
        return F.mse_loss(prediction, target)

    def distances(self, prediction: Tensor, target: Tensor, times: Tensor | None) -> Tensor:
        """Return the distance of each number, shape (B, n, C)."""
        return (prediction - target).square()


@dataclass(frozen=True)
class MAE(MSE):
    """The mean of `|d|`: a large difference has no more influence than a small one."""

    def mean(self, prediction: Tensor, target: Tensor, times: Tensor | None) -> Tensor:
        return self.distances(prediction, target, times).mean()

    def distances(self, prediction: Tensor, target: Tensor, times: Tensor | None) -> Tensor:
        return (prediction - target).abs()


@dataclass(frozen=True)
class Huber(MAE):
    """The mean of `d^2 / 2` up to |d| = delta, and of `delta (|d| - delta / 2)` beyond.

    Attributes:
        delta: Difference from which the loss grows linearly.
        delta_schedule: `constant`, or `exponential`: delta^t at timestep t, from 1 at the image to `delta` at the
            noise, as `huber_schedule` of kohya's scripts: outliers count less where there is more noise.
    """

    delta: float = 0.1
    delta_schedule: str = "constant"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.delta, *DELTAS):
            low, high = DELTAS
            raise ValueError(f"loss.delta={self.delta!r} must be a number from {low:g} to {high:g}")
        if self.delta_schedule not in SCHEDULES:
            raise ValueError(f"loss.delta_schedule={self.delta_schedule!r} must be one of {', '.join(SCHEDULES)}")
        if self.delta_schedule != "constant" and self.delta == 1:
            raise ValueError(
                f"loss.delta_schedule={self.delta_schedule} has no effect with loss.delta=1, whose powers are 1. Set "
                "another loss.delta, or loss.delta_schedule=constant"
            )

    def distances(self, prediction: Tensor, target: Tensor, times: Tensor | None) -> Tensor:
        d, delta = (prediction - target).abs(), self.delta_at(times)
        return torch.where(d <= delta, d.square() / 2, delta * (d - delta / 2))

    def delta_at(self, times: Tensor | None) -> float | Tensor:
        """Return `delta`, or with a schedule that of each timestep (B,), shape (B, 1, 1)."""
        if self.delta_schedule == "constant":
            return self.delta
        assert times is not None
        return self.delta ** times[:, None, None]


@dataclass(frozen=True)
class PseudoHuber(Huber):
    """The mean of `sqrt(d^2 + delta^2) - delta`: smooth, |d| - delta for large and d^2 / (2 delta) for small |d|."""

    delta: float = 0.01

    def distances(self, prediction: Tensor, target: Tensor, times: Tensor | None) -> Tensor:
        delta = self.delta_at(times)
        return ((prediction - target).square() + delta**2).sqrt() - delta


@dataclass(frozen=True)
class DPO(MSE):
    """The loss of preferring a chosen over a rejected image with the same caption, noise and timestep,

        -log sigmoid(margin),   margin = beta / 2 ((L_base(chosen) - L(chosen)) - (L_base(rejected) - L(rejected))),

    where L is the mean squared error of a sample's prediction and L_base that of the base, the model without its
    adapter. (Diffusion-DPO, Wallace et al. 2023, eq. 14, with the flow as the target.)

    Attributes:
        beta: How strongly the adapter is held to the base: the larger, the less it has to change for a low loss.
    """

    beta: float = 2000.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.beta, *BETAS):
            low, high = BETAS
            raise ValueError(f"loss.beta={self.beta!r} must be a number from {low:g} to {high:g}")
        if self.unmasked_prior:
            raise ValueError(
                f"loss.unmasked_prior={self.unmasked_prior} has no effect with loss=dpo, which compares to the base "
                "everywhere. Set loss.unmasked_prior=0"
            )

    @property
    def needs_base(self) -> bool:
        return True

    def margins(self, prediction: Tensor, target: Tensor, mask: Tensor | None, base: Tensor) -> Tensor:
        """Return the margins (B,) of (2 B, n, C) tokens: chosen samples, then rejected ones; `base` is the base's."""
        if mask is not None:
            mask = self.token_weights(mask)
        errors, base_errors = (mean_of_tokens((one - target).square(), mask) for one in (prediction, base))
        chosen, rejected = (base_errors - errors).chunk(2)
        return self.beta / 2 * (chosen - rejected)


def mean_of_tokens(distances: Tensor, mask: Tensor | None) -> Tensor:
    """Return each sample's mean (B,) of (B, n, C), its tokens weighted by mask (B, n, 1); 0 for a mask of zeros."""
    distances = distances.mean(-1, keepdim=True)  # (B, n, 1)
    if mask is None:
        return distances.mean((1, 2))
    counted = mask.sum((1, 2))
    return (distances * mask).sum((1, 2)) / torch.where(counted > 0, counted, 1)


flow_loss = MSE()  # of validation and preservation, which are the same in every run
