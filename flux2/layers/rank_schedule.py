"""The active rank of a LoRA by the timestep (T-LoRA, Soboleva et al. 2025, arxiv.org/abs/2507.05964).

    r(t) = floor(min_rank + (rank - min_rank) (1 - t)^exponent)        t from 0 (image) to 1 (noise)

At timestep t only the first r(t) directions of A and B are used, in training and in sampling alike. Noisy timesteps,
where an adapter memorizes its few images first, so have few directions, and detail at low noise has all.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class RankSchedule:
    """The schedule of one adapter, shared by its layers.

    It sees the timesteps of each forward of the transformer (`observe` is a forward pre-hook). The backward of a
    micro-batch follows its forward, so blocks that are recomputed find the same timesteps.
    """

    min_rank: int
    exponent: float
    times: Tensor | None = field(default=None, compare=False)  # (B,) of the current forward
    masks: dict[tuple[Any, ...], Tensor] = field(default_factory=dict, compare=False)

    def observe(self, _: nn.Module, args: Sequence[Any], given: Mapping[str, Any]) -> None:
        """Take the timesteps from the arguments of `Transformer.forward`."""
        self.times, self.masks = (given["timestep"] if "timestep" in given else args[4]).detach(), {}

    def active(self, rank: int) -> Tensor:
        """Return the number of active directions (B,) of a layer with `rank`, for the current timesteps."""
        assert self.times is not None
        share = (1 - self.times.float()).clamp(0, 1) ** self.exponent
        return torch.floor(self.min_rank + (rank - self.min_rank) * share)

    def mask(self, rank: int, like: Tensor) -> Tensor | None:
        """Return 1 for active directions and 0 for others, (B, rank), in the dtype and on the device of `like`.

        None before the first forward of the whole transformer, as when the planner counts single blocks.
        """
        if self.times is None:
            return None
        key = rank, like.dtype, like.device
        if key not in self.masks:
            active = self.active(rank).to(like.device)
            self.masks[key] = (torch.arange(rank, device=like.device) < active[:, None]).to(like.dtype)
        return self.masks[key]
