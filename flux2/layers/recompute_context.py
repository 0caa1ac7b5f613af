"""What the first run of a block leaves for its recomputation in the backward, so that less is computed twice.

Recomputing a block gives autograd the values that it needs, and no block needs its own output. So in the second run

- outputs that no gradient reads (`unread`) are not computed; a placeholder without meaningful values stands for them;
- outputs that the first run saved are recalled (`kept`), and so is the attention (`keeps_attention`).

The policy (flux2/memory/activation_checkpointing.py) creates a `Replay` for each run of a block and makes it current
while the block runs. The linears (frozen_linear.py, fused_lora.py) and the attention (attention.py) look it up.
"""

import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

_thread = threading.local()  # autograd runs the backward in its own threads


def placeholder(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Return a tensor of this shape, with the dtype and device of `like`, whose values nothing may read."""
    return like.new_empty(()).expand(shape)


@dataclass
class Replay:
    """The memory of one run of a block."""

    unread: Collection[nn.Module] = ()  # linears whose output no gradient reads
    kept: dict[nn.Module, int | None] = field(default_factory=dict)  # linears whose output is saved, with its index
    keeps_attention: bool = False  # whether the output of the attention is saved
    attention: Any = None  # the record of the block's attention (`attention.AttentionRecord`)
    saved: list[Tensor] = field(default_factory=list)  # between the runs the policy hands them to autograd
    is_second_run: bool = False

    def save(self, tensor: Tensor) -> int:
        """Save a tensor and return its index in `saved`."""
        self.saved.append(tensor)
        return len(self.saved) - 1

    def output(self, linear: nn.Linear, x: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        """Return the output of `linear` for x: from `compute`, unless the second run skips or recalls it."""
        if not self.is_second_run:
            y = compute()
            if linear in self.kept:
                self.kept[linear] = self.save(y.detach())
            return y
        if linear in self.unread:
            return placeholder((*x.shape[:-1], linear.out_features), x)
        index = self.kept.get(linear)
        return compute() if index is None else self.saved[index].detach()


def current_replay() -> Replay | None:
    """Return the replay of the block that runs in this thread, if any; compiled blocks have none."""
    return None if torch.compiler.is_compiling() else getattr(_thread, "replay", None)


@contextmanager
def use_replay(replay: Replay) -> Iterator[None]:
    """Context manager that makes `replay` the current one of this thread."""
    before = current_replay()
    _thread.replay = replay
    try:
        yield
    finally:
        _thread.replay = before
