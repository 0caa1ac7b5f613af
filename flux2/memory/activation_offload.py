"""Activations in host memory between forward and backward, as flux2/memory/block_offload.py sends and fetches them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flux2.memory.ring_buffer import Copier


class OffloadedActivation:
    """A block's input on its way to host memory and back."""

    def __init__(self, tensor: Tensor, memory: Tensor, pool: ActivationPool) -> None:
        self.memory, self.pool = memory, pool
        self.shape, self.dtype = tensor.shape, tensor.dtype
        pool.copier.start(tensor.contiguous(), self.view(self.memory))
        self.returned: Tensor | None = None
        self.ticket: Any = None

    def view(self, memory: Tensor) -> Tensor:
        return memory.view(self.dtype).view(self.shape)

    def fetch(self) -> None:
        """Start the copy back to the device, unless it has started."""
        if self.returned is None:
            self.returned = self.view(self.pool.copier.device(self.memory.nbytes))
            self.ticket = self.pool.copier.start(self.view(self.memory), self.returned)

    def get(self) -> Tensor:
        self.fetch()
        assert self.returned is not None
        self.pool.copier.wait(self.ticket)
        return self.returned

    def __del__(self) -> None:
        self.pool.give(self.memory)


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
