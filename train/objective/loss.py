"""What is learned: the flow at a random time, and (if asked) nothing new on plain prompts.

A picture x and noise e of the same shape are mixed at a time s in [0, 1],

    x_s = (1 - s) x + s e,        target = e - x,        loss = mean (model(x_s, s) - target)^2

as in rectified flow (Liu et al. 2022; Esser et al. 2024). Where samples have masks, the mean over each sample's tokens
is weighted by its mask, and the mean over samples is plain: how much is masked does not change what a sample counts,
nor does it matter which samples are in a micro-batch together. Which times are drawn is in
train/objective/timesteps.py, and how much a sample counts by its time in train/objective/weighting.py. Noise and time
of a sample depend on (seed, step, its position in the global batch) alone, so a loss curve is the same after a resume
and however a batch is cut.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.loader import Batch, onto
from data.sampler import derived_generator
from flux2.adapters import adapters_disabled
from flux2.models.positions import positions_with_references, text_positions, to_tokens, with_references
from train.objective.timesteps import Uniform

# ------------------------------------------------------------------ inputs and targets


@dataclass(frozen=True)
class Noised:
    """A batch as the model sees it.

    Attributes:
        tokens: (B, N, 128); the noisy pictures' n tokens, then the references'.
        positions: (N, 4); text_at: (T, 4).
        times: (B,).
        target: (B, n, 128) flow.
        mask: (B, n, 1), how much each of the pictures' tokens counts, from 0 to 1; None: all the same.
    """

    tokens: Tensor
    positions: Tensor
    text_at: Tensor
    times: Tensor
    target: Tensor
    mask: Tensor | None = None

    def predict(self, model: nn.Module, text: Tensor, guidance: float | None, rows: slice = slice(None)) -> Tensor:
        """(B, n, 128) float32 prediction for the chosen rows, given their embeddings `text`."""
        times = self.times[rows]
        value = None if guidance is None else torch.full_like(times, guidance)
        tokens = self.tokens[rows]
        return model(tokens, self.positions, text, self.text_at, times, value, keep=self.target.shape[1]).float()


def noise_at(batch: Batch, times: Tensor, noise: Tensor) -> Noised:
    """Mix a batch with given noise (B, 128, h, w) at given times (B,)."""
    latents = batch.latents
    at = times[:, None, None, None]
    noisy = (1 - at) * latents + at * noise
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
    """What chance gives a batch, on the CPU: `times` (B,) and `noise` (B, 128, h, w), float32."""

    times: Tensor
    noise: Tensor


def draw(batch: Batch, timesteps: Uniform, seed: int, step: int) -> NoiseDraw:
    """The noise and the times that (seed, step, position) give."""
    shape = batch.latents.shape[1:]
    noise = torch.empty(len(batch.positions), *shape)
    for own, p in zip(noise, batch.positions, strict=True):
        own.normal_(generator=derived_generator(seed, "noise", step, p))
    tokens = shape[1] * shape[2]
    times = [timesteps.draw(derived_generator(seed, "time", step, p), tokens) for p in batch.positions]
    return NoiseDraw(torch.stack(times), noise)


def add_noise(batch: Batch, drawn: NoiseDraw) -> Noised:
    """Mix a batch, float32 on any device, with what was drawn for it."""
    device = batch.latents.device
    return noise_at(batch, onto(drawn.times, device), onto(drawn.noise, device))


def flow_loss(prediction: Tensor, target: Tensor, mask: Tensor | None, weights: Tensor | None = None) -> Tensor:
    """Mean squared difference, shape (), of (B, n, C) tokens, those of each sample weighted by its mask (B, n, 1).

    Of a sample: sum(mask * mean over C of the squares) / sum(mask); of the batch: the mean over samples, each times its
    weight (B,). One whose mask is 0 everywhere, as in a crop of what is masked out, counts as 0. None is 1 everywhere.
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
    """`total` is what is differentiated; the parts are detached, `preservation` before its weight (0 without any).

    `prior`, of a whole step, is that of the class pictures (train/objective/prior.py), with its weight.
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
    """The loss of one micro-batch.

    Args:
        model: the transformer with its adapter, or a wrapper around it.
        text: (B, T, text_width) embeddings of the captions.
        plain: (P, T, text_width) embeddings of plain prompts for the first P samples, if their predictions are held to
            the base's.
        weight: of that part.
        weights: (B,) of the samples, by their times; the plain part has none.
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
