"""flux2.memory.ring_buffer: what is copied when, how much, and that nothing is written over while it is used."""

import gc
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from offload_helpers import LateCopier
from torch import Tensor

from flux2.memory import ring_buffer as ring_module
from flux2.memory.ring_buffer import Copier, CudaCopier, Order, Ring, expected_blocks, slot_sizes


class Recorder(LateCopier):
    """Notes what was asked: `use 3` when block 3 is brought, `copy 4` when its copy begins."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[str] = []

    def start(self, source: Tensor, target: Tensor) -> int:
        self.log.append(f"copy {int(source[0])}")
        return super().start(source, target)


def made(sizes: list[int], size: int = 2) -> tuple[Ring, Recorder]:
    """A ring of blocks that are filled with their own number."""
    copier = Recorder()
    hosts = [torch.full((nbytes,), i, dtype=torch.uint8) for i, nbytes in enumerate(sizes)]
    return Ring(hosts, copier, size), copier


def visit(ring: Ring, copier: Recorder, index: int, order: Order) -> None:
    """Use a block and see that its bytes are there, and stay until it is done."""
    buffer = ring.use(index, order)
    copier.log.append(f"use {index}")
    nbytes = ring.hosts[index].nbytes
    assert torch.equal(buffer[:nbytes], ring.hosts[index])
    copier.wait(copier.asked)  # the copies ahead, as early as they can come
    assert torch.equal(buffer[:nbytes], ring.hosts[index])
    ring.release()


def step(ring: Ring, copier: Recorder) -> None:
    count = len(ring.hosts)
    for index in range(count):
        visit(ring, copier, index, "forward")
    for index in reversed(range(count)):
        visit(ring, copier, index, "backward")


def test_a_training_step_copies_each_block_ahead_of_its_use_and_nothing_twice_at_the_turn() -> None:
    ring, copier = made([8] * 4)
    step(ring, copier)
    assert copier.log == [
        "copy 0",  # asked for, and the next one begun while it is used
        "copy 1",
        "use 0",
        "copy 2",
        "use 1",
        "copy 3",
        "use 2",
        "use 3",
        "use 3",
        "copy 1",
        "use 2",
        "copy 0",
        "use 1",
        "use 0",
    ]
    copier.log.clear()
    step(ring, copier)
    assert copier.log[:4] == ["use 0", "copy 2", "use 1", "copy 3"]


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 5])
def test_every_byte_is_counted(count: int, size: int) -> None:
    ring, copier = made([16] * count, size)
    step(ring, copier)
    held = min(size, count)
    first = 2 * count - held  # forward all, backward those that are not there any more
    assert (ring.copies, ring.copied) == (first, 16 * first)
    for _ in range(2):
        step(ring, copier)
    assert ring.copied == 16 * (first + 2 * 2 * (count - held))
    assert sum(entry.startswith("copy") for entry in copier.log) == ring.copies


def test_sampling_goes_on_with_the_first_block_after_the_last() -> None:
    ring, copier = made([8] * 3)
    for index in [0, 1, 2, 0, 1, 2]:
        visit(ring, copier, index, "sample")
    # every copy begins before the block ahead of it is used
    order = [entry for entry in copier.log if entry != "use 0"]
    assert order[:8] == ["copy 0", "copy 1", "copy 2", "use 1", "copy 0", "use 2", "copy 1", "copy 2"]
    assert ring.copies == 6 + 2  # two of them for a pass that may come


def test_with_one_buffer_nothing_is_copied_while_a_block_is_used() -> None:
    ring, copier = made([8] * 3, size=1)
    ring.use(0, "forward")
    assert copier.log == ["copy 0"]
    ring.release()
    assert copier.log == ["copy 0", "copy 1"]


def test_a_use_that_was_not_expected_is_right_all_the_same() -> None:
    ring, copier = made([24, 8, 24, 8, 8])
    orders: list[Order] = ["forward", "backward", "sample"]
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        index, order = torch.randint(5, (), generator=generator), torch.randint(3, (), generator=generator)
        visit(ring, copier, int(index), orders[int(order)])


def test_the_block_in_use_is_never_written_over() -> None:
    ring, copier = made([8] * 5)
    buffer = ring.use(2, "forward")
    for _ in range(3):
        ring.prefetch()
        copier.wait(copier.asked)
    assert torch.equal(buffer, ring.hosts[2])
    assert {slot.holds for slot in ring.slots} == {2, 3}


@pytest.mark.parametrize(
    ("index", "order", "expected"),
    [
        (1, "forward", [2, 3, 1, 0]),
        (3, "forward", [3, 2, 1, 0]),
        (3, "backward", [2, 1, 0, 3]),
        (0, "backward", [0, 1, 2, 3]),
        (2, "sample", [3, 0, 1, 2]),
    ],
)
def test_what_comes_next(index: int, order: Order, expected: list[int]) -> None:
    assert expected_blocks(index, order, 4) == expected


@pytest.mark.parametrize("sizes", [[24, 24, 8, 8, 8], [8] * 5])
def test_a_step_after_an_interrupted_one_is_right(sizes: list[int]) -> None:
    class Interrupted(Copier):
        calls = at = 0

        def start(self, source: Tensor, target: Tensor) -> None:
            half = len(source) // 2
            target[:half] = source[:half]
            self.calls += 1
            if self.calls == self.at:
                raise KeyboardInterrupt
            super().start(source, target)

    blocks = range(len(sizes))
    hosts = [torch.full((size,), i, dtype=torch.uint8) for i, size in zip(blocks, sizes, strict=True)]
    order: list[tuple[int, Order]] = [(i, "forward") for i in blocks] + [(i, "backward") for i in reversed(blocks)]
    failed = 0
    for at in range(1, 15):
        copier = Interrupted()
        ring = Ring(hosts, copier)
        copier.at = at
        for _ in range(3):
            try:
                for index, direction in order:
                    assert torch.equal(ring.use(index, direction)[: sizes[index]], hosts[index])
                    ring.release()
            except KeyboardInterrupt:
                failed += 1
    assert failed == 14


def test_buffers_are_as_large_as_neighbors_need() -> None:
    assert slot_sizes([2, 2, 1, 1]) == [2, 2]
    assert slot_sizes([2, 1, 1, 1, 1]) == [2, 1]
    assert slot_sizes([1, 1, 1], ring=2) == [1, 1]
    assert slot_sizes([3, 1], ring=4) == [3, 1]


def test_a_ring_needs_a_buffer() -> None:
    with pytest.raises(ValueError, match=r"ring=0\b"):
        Ring([torch.zeros(4, dtype=torch.uint8)], Copier(), 0)


# ------------------------------------------------------------------ pinning


class Runtime:
    """Stands for the CUDA runtime: what is pinned, and a limit of bytes."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.pinned: dict[int, int] = {}

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if sum(self.pinned.values()) + size > self.limit:
            return 2
        self.pinned[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        del self.pinned[address]
        return 0


def cuda_copier(monkeypatch: pytest.MonkeyPatch, limit: int) -> tuple[CudaCopier, Runtime]:
    """As on a GPU, as far as host memory goes."""
    runtime = Runtime(limit)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(device=device))
    return CudaCopier(torch.device("cpu")), runtime


def test_memory_is_pinned_where_it_is_for_as_long_as_it_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    copier, runtime = cuda_copier(monkeypatch, limit=100_000)
    memory = copier.host(5000)
    assert (memory.shape, memory.dtype) == ((5000,), torch.uint8)
    address = memory.data_ptr()
    assert runtime.pinned == {address: 5000}
    assert address % 4096 == 0
    part = memory[100:200].view(torch.float32)
    part.fill_(3)
    del memory
    gc.collect()
    assert runtime.pinned == {address: 5000}, "a view of it lives"
    del part
    gc.collect()
    assert runtime.pinned == {}


def test_memory_that_cannot_be_pinned_is_used_as_it_is_and_that_is_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    copier, runtime = cuda_copier(monkeypatch, limit=6000)
    first = copier.host(5000)
    with pytest.warns(UserWarning, match=r"pinned.*memory\.") as caught:
        rest = [copier.host(5000) for _ in range(3)]
    assert len(caught) == 1
    assert len(runtime.pinned) == 1
    for i, memory in enumerate([first, *rest]):
        memory.fill_(i)
    assert [int(memory.sum()) for memory in [first, *rest]] == [0, 5000, 10000, 15000]


def test_what_a_failed_pin_leaves_behind_is_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA reports a refusal once more with the next kernel, which would be one of the training's."""
    copier, _ = cuda_copier(monkeypatch, limit=0)
    launched: list[Any] = []

    def zeros(*args: Any, **kwargs: Any) -> None:
        launched.append(kwargs["device"])
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "zeros", zeros)
    with pytest.warns(UserWarning, match="pinned"):
        copier.host(100)
    assert launched == [torch.device("cpu")]
    assert not ring_module.pin(np.zeros(4, np.uint8), torch.device("cpu"))
