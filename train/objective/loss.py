"""The flow loss at random timesteps, with base preservation on plain prompts.

The latents x of an image and noise e of the same shape are mixed at a timestep s in [0, 1],

    x_s = (1 - s) x + s e,        target = e - x,        loss = mean (model(x_s, s) - target)^2

as in rectified flow (Liu et al. 2022; Esser et al. 2024). If samples have masks, the mean over each sample's tokens is
weighted by its mask, and the mean over samples is not: the masked area does not change the weight of a sample, nor does
it matter which samples share a micro-batch. Timesteps are drawn in train/objective/timesteps.py, and weights of samples
by timestep are in train/objective/weighting.py. Noise and timestep of a sample depend only on (seed, step, its position
in the global batch), so a loss curve is the same after a resume and for every split of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.loader import Batch, copy_to_device
from data.sampler import derived_generator
from flux2.adapters import adapters_disabled
from flux2.models.positions import positions_with_references, text_positions, to_tokens, with_references
from train.objective.timesteps import Uniform

# ------------------------------------------------------------------ inputs and targets


@dataclass(frozen=True)
class Noised:
    """A noisy batch as input of the model.

    Attributes:
        tokens: (B, N, 128), the n tokens of the noisy images, then those of the references.
        positions: (N, 4) positions of `tokens`.
        text_at: (T, 4) positions of the text tokens.
        times: (B,) timesteps.
        target: (B, n, 128) flow.
        mask: (B, n, 1), weights of the images' tokens from 0 to 1; None is 1 for all.
    """

    tokens: Tensor
    positions: Tensor
    text_at: Tensor
    times: Tensor
    target: Tensor
    mask: Tensor | None = None

    def predict(self, model: nn.Module, text: Tensor, guidance: float | None, rows: slice = slice(None)) -> Tensor:
        """Return the float32 prediction (B, n, 128) for the chosen rows, given their embeddings `text`."""
        times = self.times[rows]
        value = None if guidance is None else torch.full_like(times, guidance)
        tokens = self.tokens[rows]
        return model(tokens, self.positions, text, self.text_at, times, value, keep=self.target.shape[1]).float()


def noise_at(batch: Batch, times: Tensor, noise: Tensor) -> Noised:
    """Mix a batch with given noise (B, 128, h, w) at given times (B,)."""
    latents = batch.latents
    s = times[:, None, None, None]
    noisy = (1 - s) * latents + s * noise
    return Noised(
        tokens=with_references(to_tokens(noisy), batch.references),
        positions=positions_with_references(latents, batch.references),
        text_at=text_positions(batch.embeddings.shape[1], latents.device),
        times=times,
        target=to_tokens(noise - latents),
        mask=None if batch.mask is None else to_tokens(batch.mask),
    )


@dataclass(frozen=True)
class NoiseDraw:
    """The random part of a batch, on the CPU: `times` (B,) and `noise` (B, 128, h, w), float32."""

    times: Tensor
    noise: Tensor


def draw(batch: Batch, timesteps: Uniform, seed: int, step: int) -> NoiseDraw:
    """Draw noise and timesteps as functions of (seed, step, position)."""
    shape = batch.latents.shape[1:]
    noise = torch.empty(len(batch.positions), *shape)
    for sample, p in zip(noise, batch.positions, strict=True):
        sample.normal_(generator=derived_generator(seed, "noise", step, p))
    tokens = shape[1] * shape[2]
    times = [timesteps.draw(derived_generator(seed, "time", step, p), tokens) for p in batch.positions]
    return NoiseDraw(torch.stack(times), noise)


def add_noise(batch: Batch, drawn: NoiseDraw) -> Noised:
    """Mix a batch, float32 on any device, with its noise at its timesteps."""
    device = batch.latents.device
    return noise_at(batch, copy_to_device(drawn.times, device), copy_to_device(drawn.noise, device))


def flow_loss(prediction: Tensor, target: Tensor, mask: Tensor | None, weights: Tensor | None = None) -> Tensor:
    """Return the mean squared difference, shape (), of (B, n, C) tokens.

    Per sample: sum(mask * mean over C of the squares) / sum(mask), with mask (B, n, 1). Over the batch: the mean of
    sample losses times weights (B,). A sample whose mask is 0 everywhere, as in a crop without unmasked pixels, has
    loss 0. None is 1 everywhere.
    """
    if mask is None and weights is None:
        return F.mse_loss(prediction, target)
    squares = (prediction - target).square().mean(-1, keepdim=True)  # (B, n, 1)
    if mask is None:
        losses = squares.mean((1, 2))
    else:
        counted = mask.sum((1, 2))
        losses = (squares * mask).sum((1, 2)) / torch.where(counted > 0, counted, 1)
    return (losses if weights is None else losses * weights).mean()


# ------------------------------------------------------------------ preservation


@dataclass(frozen=True)
class Losses:
    """Losses of a micro-batch or step.

    Attributes:
        total: Loss to differentiate; the others are detached.
        preservation: Preservation loss before its weight; 0 without preservation.
        prior: Weighted loss of the class images (train/objective/prior.py) of a whole step.
    """

    total: Tensor
    flow: Tensor
    preservation: Tensor
    prior: Tensor | None = None


def training_loss(
    model: nn.Module,
    noised: Noised,
    text: Tensor,
    guidance: float | None,
    weight: float = 0.0,
    plain: Tensor | None = None,
    weights: Tensor | None = None,
) -> Losses:
    """Return the losses of one micro-batch.

    Args:
        model: Transformer with its adapter, or a wrapper around it.
        text: (B, T, text_width) embeddings of the captions.
        weight: Weight of base preservation.
        plain: (P, T, text_width) embeddings of plain prompts, with which the predictions for the first P samples are
            compared to the base's.
        weights: (B,) weights of the samples by timestep, which do not apply to preservation.
    """
    if plain is None:
        flow = flow_loss(noised.predict(model, text, guidance), noised.target, noised.mask, weights)
        return Losses(flow, flow.detach(), torch.zeros_like(flow.detach()))
    batch, held = len(text), slice(0, len(plain))
    with torch.no_grad(), adapters_disabled(model):
        base = noised.predict(model, plain, guidance, held)
    together = Noised(
        torch.cat([noised.tokens, noised.tokens[held]]),
        noised.positions,
        noised.text_at,
        torch.cat([noised.times, noised.times[held]]),
        noised.target,
    )
    prediction = together.predict(model, torch.cat([text, plain]), guidance)
    flow = flow_loss(prediction[:batch], noised.target, noised.mask, weights)
    difference = F.mse_loss(prediction[batch:], base)
    return Losses(flow + weight * difference, flow.detach(), difference.detach())
