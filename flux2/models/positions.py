"""Latents as tokens, and the position of each token.

A position is four integers (t, h, w, l). Image tokens have their row and column at t = 0, the i-th reference image its
own rows and columns at t = 10 + 10 i, and text tokens their index as l. The image comes first in the sequence, then its
references; predictions for references are discarded.
Source: github.com/black-forest-labs/flux2, src/flux2/sampling.py.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

REFERENCE_SPACING = 10


def image_positions(height: int, width: int, t: int = 0, device: torch.device | None = None) -> Tensor:
    """Return the positions (height * width, 4) of a latent grid, row by row."""
    ranges = ((t, t + 1), (0, height), (0, width), (0, 1))
    return torch.cartesian_prod(*(torch.arange(start, stop, device=device) for start, stop in ranges))


def text_positions(length: int, device: torch.device | None = None) -> Tensor:
    """Return the positions (length, 4) of a prompt's tokens."""
    positions = torch.zeros(length, 4, dtype=torch.long, device=device)
    positions[:, 3] = torch.arange(length, device=device)
    return positions


def to_tokens(latents: Tensor) -> Tensor:
    """(B, C, h, w) -> (B, h * w, C)."""
    return latents.flatten(2).transpose(1, 2)


def from_tokens(tokens: Tensor, height: int, width: int) -> Tensor:
    """(B, height * width, C) -> (B, C, height, width): the inverse of `to_tokens`."""
    return tokens.transpose(1, 2).unflatten(2, (height, width))


def positions_with_references(latents: Tensor, references: Sequence[Tensor] = ()) -> Tensor:
    """Return the positions (N, 4) of the tokens of an image, followed by its references; all (B, C, h, w) latents."""
    grids = [
        image_positions(grid.shape[2], grid.shape[3], REFERENCE_SPACING * i, latents.device)
        for i, grid in enumerate([latents, *references])
    ]
    return torch.cat(grids)


def with_references(tokens: Tensor, references: Sequence[Tensor] = ()) -> Tensor:
    """Append the tokens of references (B, C, h, w) to image tokens (B, n, C): (B, N, C)."""
    return torch.cat([tokens, *(to_tokens(reference).to(tokens) for reference in references)], dim=1)
