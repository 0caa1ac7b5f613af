"""A few buffers on the device, and what is copied into them when.

Blocks of bytes lie in host memory and are used one at a time. A `Ring` holds some of them on the device: the one in use
and those that come next, as far as the order can be told,

    training   0, 1 ... n-1 forward, n-1 ... 1, 0 backward, and again
    sampling   0, 1 ... n-1, and again

so a copy has the compute of a whole block to hide behind, and where the order turns nothing is copied twice. A wrong
guess costs time and never a byte: `use` copies what is not there.

All of this is plain code. How bytes move is left to a `Copier`: `CpuCopier` between two places in host memory,
`CudaCopier` from pinned memory on a stream of its own, beside the compute.
"""

from __future__ import annotations

import contextlib
import mmap
import warnings
import weakref
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

RING = 2  # buffers: one block is used while the next one is copied
ALIGNMENT = 256  # bytes; what the device's own allocator gives, and more than any kernel asks

Order = Literal["forward", "backward", "sample"]


# ------------------------------------------------------------------ copying


class Copier(Protocol):
    """Where bytes lie and how they move."""

    def host(self, size: int) -> Tensor:
        """`size` bytes of host memory, (size,) uint8."""

    def device(self, size: int) -> Tensor:
        """`size` bytes on the device, (size,) uint8."""

    def start(self, source: Tensor, target: Tensor) -> Any:
        """Copy to `target`, of the same shape and dtype, after all that was asked of the device so far.

        Returns at once, with a ticket for `wait`.
        """

    def wait(self, ticket: Any) -> None:
        """Whatever the device is asked from here on comes after the copy of `ticket`."""


class CpuCopier:
    """Between two places in host memory, at once: what the tests run, and what training on a CPU gets."""

    def host(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def device(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8)

    def start(self, source: Tensor, target: Tensor) -> None:
        target.copy_(source)

    def wait(self, ticket: None) -> None:
        return None


class CudaCopier:
    """From and to pinned host memory on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self.place = device
        self.stream = torch.cuda.Stream(device)
        self.pins = True

    def host(self, size: int) -> Tensor:
        """Pinned, if the system allows it; the first time that it does not, a warning says what that costs."""
        # whole pages of its own: pinning goes by pages, and PyTorch's pinned allocator rounds up to a power of two
        memory = np.frombuffer(mmap.mmap(-1, max(size, 1)), np.uint8)
        if self.pins and not pin(memory, self.place):
            self.pins = False
            warnings.warn(
                f"{size / 1e9:.2f} GB of host memory could not be pinned, so blocks stream from ordinary memory: the "
                "device waits for each copy. A smaller memory.offload_blocks needs less, as does precision=fp8 or nf4; "
                "in a container, raise its memory limit.",
                stacklevel=2,
            )
        return torch.from_numpy(memory)[:size]

    def device(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.place)

    def start(self, source: Tensor, target: Tensor) -> torch.cuda.Event:
        self.stream.wait_stream(torch.cuda.current_stream(self.place))
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
        (source if source.is_cuda else target).record_stream(self.stream)  # it may be freed before the copy is over
        return self.stream.record_event()

    def wait(self, ticket: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.place).wait_event(ticket)


def pin(memory: np.ndarray, device: torch.device) -> bool:
    """Page-lock host memory where it is, for as long as it lives; False if the system refuses."""
    cudart = torch.cuda.cudart()
    address = memory.ctypes.data
    if int(cudart.cudaHostRegister(address, memory.nbytes, 0)) != 0:
        with contextlib.suppress(RuntimeError):  # CUDA keeps the refusal and would report it with the next kernel
            torch.zeros(1, device=device)
        return False
    weakref.finalize(memory, cudart.cudaHostUnregister, address).atexit = False
    return True


def copier_for(device: torch.device) -> Copier:
    return CudaCopier(device) if device.type == "cuda" else CpuCopier()


# ------------------------------------------------------------------ what comes when


def upcoming(index: int, order: Order, count: int) -> list[int]:
    """The uses expected after that of `index`, each block once."""
    after, before = range(index + 1, count), range(index - 1, -1, -1)
    if order == "backward":
        expected = [*before, *range(count)]
    elif order == "forward":
        expected = [*after, *range(count - 1, -1, -1)]
    else:
        expected = [*after, *range(count)]
    return list(dict.fromkeys(expected))


def slot_sizes(sizes: Sequence[int], ring: int = RING) -> list[int]:
    """Bytes of each buffer, the largest first, so that any `ring` neighbors of these sizes fit at the same time."""
    ring = min(ring, len(sizes))
    windows = [sorted((sizes[(i + j) % len(sizes)] for j in range(ring)), reverse=True) for i in range(len(sizes))]
    return [max(column) for column in zip(*windows, strict=True)]


@dataclass
class Slot:
    """A buffer on the device, the block that is in it or on its way, and the ticket of that copy."""

    buffer: Tensor
    holds: int | None = None
    ticket: Any = None


class Ring:
    """Holds the blocks that are used now and next on the device.

    Args:
        hosts: each block's bytes in host memory, (size,) uint8, in the order of the forward. They are only read.
        size: number of buffers, at least 1. With 1, nothing is copied ahead.

    Attributes:
        current: the block in use; its buffer is not written to until `done`.
        copies, copied: number and bytes of copies to the device so far.
    """

    def __init__(self, hosts: Sequence[Tensor], copier: Copier, size: int = RING) -> None:
        if size < 1:
            raise ValueError(f"ring={size} must be at least 1 buffer")
        self.hosts, self.copier = list(hosts), copier
        self.slots = [Slot(copier.device(nbytes)) for nbytes in slot_sizes([host.nbytes for host in hosts], size)]
        self.current: int | None = None
        self.expected: list[int] = list(range(len(self.hosts)))
        self.copies = self.copied = 0

    @property
    def resident(self) -> list[int]:
        """The blocks on the device or on their way."""
        return [slot.holds for slot in self.slots if slot.holds is not None]

    def slot(self, index: int) -> Slot | None:
        return next((slot for slot in self.slots if slot.holds == index), None)

    def use(self, index: int, order: Order) -> Tensor:
        """The buffer that begins with the bytes of block `index`, good until `done`; whatever was in use before is not.

        Copies of the blocks that `order` lets expect next begin.
        """
        self.current = index
        self.expected = upcoming(index, order, len(self.hosts))
        slot = self.slot(index) or self.load(index, self.wanted()) or self.load(index, ())
        assert slot is not None, f"no buffer is as large as block {index}"
        self.ahead()
        self.copier.wait(slot.ticket)
        return slot.buffer

    def done(self) -> None:
        """The block in use is not needed for now: its buffer may be written to."""
        self.current = None
        self.ahead()

    def wanted(self) -> list[int]:
        """What should be on the device: the block in use, then those expected, as many as there are buffers."""
        now = [] if self.current is None else [self.current]
        return list(dict.fromkeys(now + self.expected))[: len(self.slots)]

    def ahead(self) -> None:
        """Begin the copies of what is expected, into buffers that nothing wanted is in."""
        wanted = self.wanted()
        for index in wanted:
            if self.slot(index) is None:
                self.load(index, wanted)

    def load(self, index: int, keep: Collection[int]) -> Slot | None:
        """Begin the copy of a block into the smallest buffer that is large enough and holds none of `keep`."""
        host = self.hosts[index]
        slot = smallest(slot for slot in self.slots if slot.holds not in keep and slot.buffer.nbytes >= host.nbytes)
        if slot is not None:
            slot.holds = index
            slot.ticket = self.copier.start(host, slot.buffer[: host.nbytes])
            self.copies += 1
            self.copied += host.nbytes
        return slot


def smallest(slots: Iterable[Slot]) -> Slot | None:
    return min(slots, key=lambda slot: slot.buffer.nbytes, default=None)
