"""What the first run of a block leaves for its recomputation in the backward, so that less is computed twice.

Recomputing a block gives autograd the values that it needs, and no block needs its own output. So in the second run

- outputs that no gradient reads (`unread`) are not computed; a placeholder without meaningful values stands for them;
- outputs that the first run saved are recalled (`kept`), and so is the attention (`keeps_attention`).

The policy (flux2/memory/activation_checkpointing.py) creates a `Replay` for each run of a block and makes it current
while the block runs. The linears (frozen_linear.py, fused_lora.py) and the attention (attention.py) look it up.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

_thread = threading.local()  # autograd runs the backward in its own threads


def placeholder(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return a tensor of this shape, with the dtype and device of `like`, whose values nothing may read."""
    return like.new_empty(()).expand(shape)


class Replay:
    """The memory of one run of a block.

    Args:
        unread: Linears whose output no gradient reads.
        kept: Linears whose output is saved.
        keeps_attention: Whether the output of the attention is saved.

    Attributes:
        attention: The record of the block's attention (`attention.AttentionRecord`).
        saved: Saved tensors, in order. Between the runs the policy hands them to autograd.
        is_second_run: Whether the block is being recomputed.
    """

    def __init__(
        self, unread: Iterable[nn.Module] = (), kept: Iterable[nn.Module] = (), keeps_attention: bool = False
    ) -> None:
        self.unread = set(unread)
        self.kept: dict[nn.Module, int | None] = dict.fromkeys(kept)
        self.keeps_attention = keeps_attention
        self.attention: Any = None
        self.saved: list[Tensor] = []
        self.is_second_run = False

    def save(self, tensor: Tensor) -> int:
        """Save a tensor and return its index in `saved`."""
        self.saved.append(tensor)
        return len(self.saved) - 1

    def recall(self, linear: nn.Linear, x: Tensor) -> Tensor | None:
        """Return the output of `linear` for x in a second run, or None if it must be computed."""
        if not self.is_second_run:
            return None
        if linear in self.unread:
            return placeholder((*x.shape[:-1], linear.out_features), x)
        index = self.kept.get(linear)
        return None if index is None else self.saved[index].detach()

    def remember(self, linear: nn.Linear, y: Tensor) -> None:
        """Save the output of `linear` in a first run, if `linear` is in `kept`."""
        if not self.is_second_run and linear in self.kept:
            self.kept[linear] = self.save(y.detach())


def current_replay() -> Replay | None:
    """Return the replay of the block that runs in this thread, if any."""
    return getattr(_thread, "replay", None)


@contextmanager
def use_replay(replay: Replay) -> Iterator[None]:
    """Context manager that makes `replay` the current one of this thread."""
    before = current_replay()
    _thread.replay = replay
    try:
        yield
    finally:
        _thread.replay = before
