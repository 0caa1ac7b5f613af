"""Activations in host memory between forward and backward, as flux2/memory/block_offload.py sends and fetches them."""

from __future__ import annotations

import weakref
from collections import deque
from typing import Any

from torch import Tensor

from flux2.memory.ring_buffer import Copier

IN_FLIGHT = 2  # copies that compute need not wait for: those of the two inputs of a double block


class OffloadedActivation:
    """A block's input on its way to host memory and back."""

    def __init__(self, tensor: Tensor, pool: ActivationPool) -> None:
        self.pool, self.memory = pool, pool.take(tensor.nbytes)
        weakref.finalize(self, pool.give, self.memory).atexit = False
        self.values = self.memory.view(tensor.dtype).view(tensor.shape)
        pool.start(tensor.detach().contiguous(), self.values)  # kept for a while, without its history
        self.returned: tuple[Tensor, Any] | None = None

    def fetch(self) -> tuple[Tensor, Any]:
        """Start the copy back to the device, unless it has started; return the copy and its ticket."""
        if self.returned is None:
            memory = self.pool.copier.device(self.memory.nbytes)
            copy = memory.view(self.values.dtype).view(self.values.shape)
            self.returned = copy, self.pool.start(self.values, copy)
        return self.returned

    def get(self) -> Tensor:
        copy, ticket = self.fetch()
        self.pool.wait(ticket)
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
        self.in_flight: deque[tuple[Any, Tensor, Tensor]] = deque()
        weakref.finalize(self, wait_for, copier, self.in_flight, 0).atexit = False

    def take(self, size: int) -> Tensor:
        self.held += size
        self.copied += size
        self.most = max(self.most, self.held)
        free = self.free.get(size)
        return free.pop() if free else self.copier.host(size)

    def start(self, source: Tensor, target: Tensor) -> Any:
        """Start a copy and return its ticket; the tensors are kept until later work on the device waits for it."""
        ticket = self.copier.start(source, target)
        self.in_flight.append((ticket, source, target))
        wait_for(self.copier, self.in_flight, IN_FLIGHT)
        return ticket

    def wait(self, ticket: Any) -> None:
        """Let later work on the device wait for a copy, and forget its tensors."""
        self.copier.wait(ticket)
        for index in reversed(range(len(self.in_flight))):
            if self.in_flight[index][0] is ticket:
                del self.in_flight[index]

    def give(self, memory: Tensor) -> None:
        self.held -= memory.nbytes
        self.free.setdefault(memory.nbytes, []).append(memory)


def wait_for(copier: Copier, in_flight: deque[tuple[Any, Tensor, Tensor]], most: int) -> None:
    """Let the device wait for the oldest copies, and forget their tensors, until at most `most` are left."""
    while len(in_flight) > most:
        copier.wait(in_flight.popleft()[0])
