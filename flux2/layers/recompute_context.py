"""What the first run of a block leaves for its second one, in the backward, so that less of it is computed again.

Recomputing a block gives autograd the values that it needs, and no block needs its own output. So of a second run

- outputs that no gradient reads are never computed (`unread`), and stand for themselves as memory without meaning;
- outputs that were put aside in the first run are given back (`kept`), and so is the attention (`keeps_attention`).

The policy (flux2/memory/activation_checkpointing.py) makes a `Replay` for each run of a block, the current one while
the block runs. The linears (fused_lora.py) and the attention (attention.py) look whether there is one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

_thread = threading.local()  # the backward runs in threads of its own


def meaningless(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """A tensor of this shape, with the dtype and device of `like`, of which nothing may read the values."""
    return like.new_empty(()).expand(shape)


class Replay:
    """The memory of one run of a block.

    Args:
        unread: linears whose output no gradient reads.
        kept: linears whose output is put aside.
        keeps_attention: whether that of the attention is.

    Attributes:
        stored: what is put aside, in order. The policy takes it between the runs, to let autograd hold it.
        again: whether this is the second run.
    """

    def __init__(
        self, unread: Iterable[nn.Module] = (), kept: Iterable[nn.Module] = (), keeps_attention: bool = False
    ) -> None:
        self.unread = set(unread)
        self.kept: dict[nn.Module, int | None] = dict.fromkeys(kept)
        self.keeps_attention = keeps_attention
        self.attended: Any = None  # attention.py's memory of the block's attention
        self.stored: list[Tensor] = []
        self.again = False

    def put(self, tensor: Tensor) -> int:
        """Put a tensor aside; returns its place in `stored`."""
        self.stored.append(tensor)
        return len(self.stored) - 1

    def recall(self, linear: nn.Linear, x: Tensor) -> Tensor | None:
        """In a second run, the output of `linear` for x if it is not to be computed; else None."""
        if not self.again:
            return None
        if linear in self.unread:
            return meaningless((*x.shape[:-1], linear.out_features), x)
        place = self.kept.get(linear)
        return None if place is None else self.stored[place].detach()

    def remember(self, linear: nn.Linear, y: Tensor) -> None:
        """In a first run, put the output of `linear` aside if that is wanted."""
        if not self.again and linear in self.kept:
            self.kept[linear] = self.put(y.detach())


def current() -> Replay | None:
    """The replay of the block that runs in this thread, if there is one."""
    return getattr(_thread, "replay", None)


@contextmanager
def running(replay: Replay) -> Iterator[None]:
    """Within this context `replay` is the current one of this thread."""
    before = current()
    _thread.replay = replay
    try:
        yield
    finally:
        _thread.replay = before
