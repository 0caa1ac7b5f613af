"""Activations in host memory between forward and backward, as flux2/memory/block_offload.py sends and fetches them."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor

from flux2.memory.ring_buffer import Copier


class OffloadedActivation:
    """A block's input on its way to host memory and back."""

    def __init__(self, tensor: Tensor, pool: ActivationPool) -> None:
        self.pool, self.memory = pool, pool.take(tensor.nbytes)
        weakref.finalize(self, pool.give, self.memory).atexit = False
        self.values = self.memory.view(tensor.dtype).view(tensor.shape)
        pool.copier.start(tensor.contiguous(), self.values)
        self.returned: tuple[Tensor, Any] | None = None

    def fetch(self) -> tuple[Tensor, Any]:
        """Start the copy back to the device, unless it has started; return the copy and its ticket."""
        if self.returned is None:
            memory = self.pool.copier.device(self.memory.nbytes)
            copy = memory.view(self.values.dtype).view(self.values.shape)
            self.returned = copy, self.pool.copier.start(self.values, copy)
        return self.returned

    def get(self) -> Tensor:
        copy, ticket = self.fetch()
        self.pool.copier.wait(ticket)
        return copy


class ActivationPool:
    """Host memory for activations; returned memory is reused, because pinning is slow.

    Attributes:
        held, most, copied: Bytes in use now, bytes in use at most, bytes copied in total.
    """

    def __init__(self, copier: Copier) -> None:
        self.copier = copier
        self.free: dict[int, list[Tensor]] = {}
        self.held = self.most = self.copied = 0

    def take(self, size: int) -> Tensor:
        self.held += size
        self.copied += size
        self.most = max(self.most, self.held)
        free = self.free.get(size)
        return free.pop() if free else self.copier.host(size)

    def give(self, memory: Tensor) -> None:
        self.held -= memory.nbytes
        self.free.setdefault(memory.nbytes, []).append(memory)
