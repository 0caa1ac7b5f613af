"""Activations that wait in host memory for the backward: what flux2/memory/block_offload.py sends there, and fetches
again.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flux2.memory.ring_buffer import Copier


class OffloadedActivation:
    """A block's input on its way to host memory and back."""

    def __init__(self, tensor: Tensor, memory: Tensor, away: ActivationPool) -> None:
        self.memory, self.away = memory, away
        self.shape, self.dtype = tensor.shape, tensor.dtype
        away.copier.start(tensor.contiguous(), self.view(self.memory))
        self.returned: Tensor | None = None
        self.ticket: Any = None

    def view(self, memory: Tensor) -> Tensor:
        return memory.view(self.dtype).view(self.shape)

    def fetch(self) -> None:
        """Begin the copy back, if it has not begun."""
        if self.returned is None:
            self.returned = self.view(self.away.copier.device(self.memory.nbytes))
            self.ticket = self.away.copier.start(self.view(self.memory), self.returned)

    def get(self) -> Tensor:
        self.fetch()
        assert self.returned is not None
        self.away.copier.wait(self.ticket)
        return self.returned

    def __del__(self) -> None:
        self.away.give(self.memory)


class ActivationPool:
    """Host memory for activations; what is given back is used again, as pinning takes long."""

    def __init__(self, copier: Copier) -> None:
        self.copier = copier
        self.free: dict[int, list[Tensor]] = {}
        self.held = self.most = self.copied = 0  # bytes: now, at most, and sent in all

    def take(self, size: int) -> Tensor:
        self.held += size
        self.copied += size
        self.most = max(self.most, self.held)
        free = self.free.get(size)
        return free.pop() if free else self.copier.host(size)

    def give(self, memory: Tensor) -> None:
        self.held -= memory.nbytes
        self.free.setdefault(memory.nbytes, []).append(memory)
