"""Batches and models for tests of the objective."""

from collections.abc import Sequence
from dataclasses import replace

import helpers
import torch

from data.loader import Batch
from train.objective.noise import Noised
from train.objective.objective import Inputs, Losses, training_loss


def batch_of(
    count: int,
    *,
    start: int = 0,
    references: Sequence[tuple[int, int]] = (),
    size: tuple[int, int] = (2, 3),
    kind: str = "dev",
) -> Batch:
    """Samples `start` to `start + count` of a global batch, each the same whatever it is cut with."""

    def draw(*shape: int, seed: int) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed))

    positions = list(range(start, start + count))
    width = helpers.TRANSFORMERS[kind].text_width
    return Batch(
        latents=torch.stack([draw(128, *size, seed=p) for p in positions]),
        references=[
            torch.stack([draw(128, *each, seed=100 * (r + 1) + p) for p in positions])
            for r, each in enumerate(references)
        ],
        embeddings=torch.stack([draw(5, width, seed=50 + p) for p in positions]),
        captions=[f"caption {p}" for p in positions],
        indices=positions,
        positions=positions,
    )


def stir(wrapped: torch.nn.Module) -> None:
    """Give every B, which starts at zero, values."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def masked(batch: Batch, seed: int = 0) -> Batch:
    shape = (len(batch.positions), 1, *batch.latents.shape[2:])
    return replace(batch, mask=torch.rand(shape, generator=torch.Generator().manual_seed(seed)))


def losses_of(
    model: torch.nn.Module,
    noised: Noised,
    text: torch.Tensor,
    guidance: float | None,
    weight: float = 0.0,
    preserved: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
) -> Losses:
    """The losses of a micro-batch with the mean squared error."""
    return training_loss(model, Inputs(noised, text, weights, preserved), guidance, weight=weight)
