"""Ring of buffers on the device for blocks of bytes that lie in host memory and are used one at a time.

A `Ring` holds the block in use and those expected next, in the orders

    training   0, 1 ... n-1 forward, n-1 ... 1, 0 backward, and again
    sampling   0, 1 ... n-1, and again

so a copy overlaps with the compute of a whole block, and nothing is copied twice where the order turns. A wrong guess
costs only time: `use` copies what is missing.

This logic does not depend on the device. A `Copier` moves the bytes within host memory, a `CudaCopier` from pinned
memory on its own stream, concurrently with the compute.
"""

import contextlib
import mmap
import sys
import warnings
import weakref
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

RING = 2  # buffers: one block is used while the next is copied
ALIGNMENT = 256  # bytes; the alignment of the CUDA allocator, which is enough for every kernel

Order = Literal["forward", "backward", "sample"]


class Copier:
    """Allocates memory on both sides and copies between them: here within host memory, at once."""

    def host(self, size: int) -> Tensor:
        """Return `size` bytes of host memory, (size,) uint8."""
        return torch.empty(size, dtype=torch.uint8)

    def device(self, size: int) -> Tensor:
        """Return `size` bytes on the device, (size,) uint8."""
        return torch.empty(size, dtype=torch.uint8)

    def start(self, source: Tensor, target: Tensor) -> Any:
        """Copy to `target`, of the same shape and dtype, after all work submitted to the device so far.

        Return at once, with a ticket for `wait`. The caller keeps both tensors until it has waited: memory on the
        device that is freed earlier can be given to other work while the copy runs. (`Tensor.record_stream` would keep
        it, but until the host notices that the copy has ended: a host that runs ahead would keep many.)
        """
        target.copy_(source)

    def wait(self, ticket: Any) -> None:
        """Make all work submitted to the device from now on wait for the copy of `ticket`."""


class CudaCopier(Copier):
    """Copies from and to pinned host memory on its own CUDA stream."""

    def __init__(self, device: torch.device) -> None:
        self.place, self.stream, self.pins = device, torch.cuda.Stream(device), True

    def host(self, size: int) -> Tensor:
        """Return host memory, pinned if the system allows it; the first refusal is reported as a warning."""
        # own pages, because memory is pinned by pages and PyTorch's pinned allocator rounds up to a power of two
        # and private, because containers limit shared memory
        private = {} if sys.platform == "win32" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
        pages = mmap.mmap(-1, max(size, 1), **private)
        memory = np.frombuffer(pages, np.uint8)
        if self.pins and not pin(memory, self.place):
            self.pins = False
            warnings.warn(
                f"{size / 1e9:.2f} GB of host memory could not be pinned, so blocks stream from ordinary memory: the "
                "device waits for each copy. Choose a smaller memory.offload_blocks, or precision=int8 or nf4; in a "
                "container, raise its memory limit.",
                stacklevel=2,
            )
        return torch.from_numpy(memory)[:size]

    def device(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.place)

    def start(self, source: Tensor, target: Tensor) -> torch.cuda.Event:
        self.stream.wait_stream(torch.cuda.current_stream(self.place))
        with torch.cuda.stream(self.stream):
            target.copy_(source, non_blocking=True)
        return self.stream.record_event()

    def wait(self, ticket: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self.place).wait_event(ticket)


def pin(memory: np.ndarray, device: torch.device) -> bool:
    """Page-lock host memory in place until it is freed. Return False if the system refuses."""
    cudart, address = torch.cuda.cudart(), memory.ctypes.data
    if int(cudart.cudaHostRegister(address, memory.nbytes, 0)) != 0:
        with contextlib.suppress(RuntimeError):  # CUDA stores the error and would raise it at the next kernel
            torch.zeros(1, device=device)
        return False
    weakref.finalize(memory, cudart.cudaHostUnregister, address).atexit = False
    return True


def copier_for(device: torch.device) -> Copier:
    return CudaCopier(device) if device.type == "cuda" else Copier()


def expected_blocks(index: int, order: Order, count: int) -> list[int]:
    """Return the blocks in the order in which they are expected after `index`, each once."""
    expected = {
        "forward": [*range(index + 1, count), *reversed(range(count))],
        "backward": [*reversed(range(index)), *range(count)],
        "sample": [*range(index + 1, count), *range(count)],
    }
    return list(dict.fromkeys(expected[order]))


def slot_sizes(sizes: Sequence[int], ring: int = RING) -> list[int]:
    """Return the bytes of each buffer, largest first, such that any `ring` neighbors of these sizes fit together."""
    ring = min(ring, len(sizes))
    windows = [sorted((sizes[(i + j) % len(sizes)] for j in range(ring)), reverse=True) for i in range(len(sizes))]
    return [max(column) for column in zip(*windows, strict=True)]


@dataclass
class Slot:
    """A buffer on the device, the block that it holds or receives, and the ticket of that copy."""

    buffer: Tensor
    holds: int | None = None
    ticket: Any = None


def finish(copier: Copier, slots: Sequence[Slot]) -> None:
    """Wait for the copies that run, so that the memory can be freed."""
    for slot in slots:
        if slot.holds is not None:
            copier.wait(slot.ticket)


class Ring:
    """Holds the blocks that are used now and next on the device.

    Args:
        hosts: Bytes of each block in host memory, (size,) uint8, in the order of the forward. They are only read.
        size: Number of buffers, >= 1. With 1, nothing is prefetched.

    Attributes:
        current: The block in use; its buffer is not overwritten until `release`.
        copies, copied: Number and bytes of copies to the device so far.
    """

    def __init__(self, hosts: Sequence[Tensor], copier: Copier, size: int = RING) -> None:
        if size < 1:
            raise ValueError(f"ring={size} must be an integer >= 1")
        self.hosts, self.copier = list(hosts), copier
        self.slots = [Slot(copier.device(nbytes)) for nbytes in slot_sizes([host.nbytes for host in hosts], size)]
        self.current: int | None = None
        self.expected = list(range(len(self.hosts)))
        self.copies = self.copied = 0
        weakref.finalize(self, finish, copier, self.slots).atexit = False

    def slot(self, index: int) -> Slot | None:
        return next((slot for slot in self.slots if slot.holds == index), None)

    def use(self, index: int, order: Order) -> Tensor:
        """Return the buffer that starts with the bytes of block `index`, and prefetch the blocks expected next.

        The buffer is valid until `release`; the block in use before is released.
        """
        self.current = index
        self.expected = expected_blocks(index, order, len(self.hosts))
        slot = self.slot(index) or self.load(index, self.wanted()) or self.load(index, ())
        assert slot is not None, f"no buffer is as large as block {index}"
        self.prefetch()
        self.copier.wait(slot.ticket)
        return slot.buffer

    def release(self) -> None:
        """Allow the buffer of the block in use to be overwritten."""
        self.current = None
        self.prefetch()

    def wanted(self) -> list[int]:
        """Return the blocks that should be on the device: the one in use, then as many expected ones as fit."""
        in_use = [] if self.current is None else [self.current]
        return list(dict.fromkeys(in_use + self.expected))[: len(self.slots)]

    def prefetch(self) -> None:
        """Start copies of the wanted blocks into buffers that hold no wanted block."""
        wanted = self.wanted()
        for index in wanted:
            if self.slot(index) is None:
                self.load(index, wanted)

    def load(self, index: int, keep: Collection[int]) -> Slot | None:
        """Start the copy of a block into the smallest buffer that is large enough and holds none of `keep`."""
        host = self.hosts[index]
        fitting = [slot for slot in self.slots if slot.holds not in keep and slot.buffer.nbytes >= host.nbytes]
        slot = min(fitting, key=lambda slot: slot.buffer.nbytes, default=None)
        if slot is not None:
            slot.holds = None  # if the copy is interrupted, it holds a part of one block and a part of another
            slot.ticket = self.copier.start(host, slot.buffer[: host.nbytes])
            slot.holds = index
            self.copies += 1
            self.copied += host.nbytes
        return slot
