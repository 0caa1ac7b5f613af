"""Noisy latents at random timesteps, and the flow that they are trained on.

The latents x of an image and noise e of the same shape are mixed at a timestep s in [0, 1],

    x_s = (1 - s) x + s e,        flow = e - x,

as in rectified flow (Liu et al. 2022; Esser et al. 2024). Timesteps are drawn in train/objective/timesteps.py. Noise
and timestep of a sample depend only on (seed, step, its position in the global batch), so a loss curve is the same
after a resume and for every split of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from data.loader import Batch, copy_to_device
from data.sampler import derived_generator
from flux2.models.positions import positions_with_references, text_positions, to_tokens, with_references
from train.objective.timesteps import Uniform


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

    def predict(self, model: nn.Module, text: Tensor, guidance: float | None, *rows: slice) -> Tensor:
        """Return the float32 prediction (R, n, 128) for the chosen rows, given their embeddings `text` (R, T, D).

        Rows may be chosen several times, each time with other embeddings; the default is all rows once.
        """
        parts = rows or (slice(None),)
        times, tokens = (joined([tensor[part] for part in parts]) for tensor in (self.times, self.tokens))
        value = None if guidance is None else torch.full_like(times, guidance)
        return model(tokens, self.positions, text, self.text_at, times, value, keep=self.target.shape[1]).float()


def stacked(first: Noised, second: Noised) -> Noised:
    """Return the rows of two noisy batches of one shape as one batch."""
    mask = None if first.mask is None or second.mask is None else torch.cat([first.mask, second.mask])
    tokens, times, target = (
        torch.cat([getattr(one, key) for one in (first, second)]) for key in ("tokens", "times", "target")
    )
    return replace(first, tokens=tokens, times=times, target=target, mask=mask)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Return the rows of all parts as one tensor, without a copy if there is one part."""
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]


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
