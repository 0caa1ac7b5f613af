"""Read tensors from files into memory ahead of their use, with several threads and little extra memory.

A tensor is read to its final place: on the CPU straight into its memory, on a GPU through a small pinned buffer per
thread. A tensor of ours that is several tensors in the file, or halves in another order, is read as pieces into one
memory. While a tensor is used (quantized, for example), the next ones are read, as long as all together are at most
`AHEAD` times the largest. Files are not memory-mapped: copying out of a mapping is no faster here, and its pages count
as memory of the process.

Checksums are XXH3 of 128 bits, over chunks of `CHUNK` bytes: they detect damage, not manipulation.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

import torch
import xxhash
from torch import Tensor

from flux2.weights.safetensors_files import StoredTensor

CHUNK = 16 << 20  # bytes that a thread reads at once
THREADS = 4
AHEAD = 1.5  # times the largest: a block's second linear is read while its first, the largest, is quantized


@dataclass(frozen=True)
class Piece:
    """`size` bytes of a stored tensor, starting at byte `offset` of it."""

    stored: StoredTensor
    offset: int
    size: int


@dataclass(frozen=True)
class TensorRead:
    """A tensor to be read: consecutive pieces of stored tensors, and the device to read it to."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    device: torch.device

    @property
    def nbytes(self) -> int:
        return sum(piece.size for piece in self.pieces)


def read_of(stored: StoredTensor, device: torch.device) -> TensorRead:
    """Return the read of a stored tensor as it is."""
    return TensorRead(stored.dtype, stored.shape, (Piece(stored, 0, stored.size),), device)


@dataclass
class ReadTask:
    """Tensors that are used together, and the function that uses them once they are read."""

    reads: Mapping[str, TensorRead]
    use: Callable[[dict[str, Tensor]], None]

    @property
    def nbytes(self) -> int:
        return sum(read.nbytes for read in self.reads.values())


class Digests:
    """Checksums of the tensors that were read, each over its chunks in order."""

    def __init__(self) -> None:
        self._chunks: dict[StoredTensor, dict[int, bytes]] = {}
        self._lock = threading.Lock()

    def add(self, stored: StoredTensor, offset: int, chunk: memoryview) -> None:
        digest = xxhash.xxh3_128_digest(chunk)
        with self._lock:
            self._chunks.setdefault(stored, {})[offset] = digest

    def checksum(self, stored: StoredTensor) -> str:
        """Return the checksum of a tensor as 32 hexadecimal digits."""
        chunks = self._chunks.get(stored, {})
        return xxhash.xxh3_128_hexdigest(b"".join(chunks[offset] for offset in sorted(chunks)))

    def content(self) -> str:
        """Return a checksum of names, shapes, dtypes and bytes of all tensors, however they are spread over files."""
        lines = (f"{stored.key} {stored.dtype} {stored.shape} {self.checksum(stored)}" for stored in self._chunks)
        return xxhash.xxh3_128_hexdigest("\n".join(sorted(lines)).encode())


def checksum(data: memoryview) -> str:
    """Return what `Digests.checksum` returns for a tensor of these bytes that was read completely."""
    chunks = (data[start : start + CHUNK] for start in range(0, len(data), CHUNK))
    return xxhash.xxh3_128_hexdigest(b"".join(map(xxhash.xxh3_128_digest, chunks)))


def needs_staging(memory: Tensor) -> bool:
    """Return whether a file cannot be read into `memory` directly."""
    return memory.device.type != "cpu"


class Reader(threading.local):
    """Reads chunks into memory on any device. Each thread has its own staging buffer, and a stream for each device."""

    def __init__(self, digests: Digests | None) -> None:  # called in each thread
        self.digests = digests
        self.streams: dict[torch.device, torch.cuda.Stream] = {}

    @cached_property
    def buffer(self) -> Tensor:
        if torch.cuda.is_available():
            with suppress(RuntimeError):  # the system has no memory to pin: copies from other memory are slower
                return torch.empty(CHUNK, dtype=torch.uint8, pin_memory=True)
        return torch.empty(CHUNK, dtype=torch.uint8)

    def read_chunk(self, stored: StoredTensor, offset: int, memory: Tensor, ready: torch.cuda.Event | None) -> None:
        """Fill `memory`, uint8, with the bytes of `stored` from `offset`."""
        staged = needs_staging(memory)
        target = self.buffer[: len(memory)] if staged else memory
        view = target.numpy().data
        stored.read_into(view, offset)
        if self.digests is not None:
            self.digests.add(stored, offset, view)
        if staged:
            self.copy_to_device(target, memory, ready)

    def copy_to_device(self, source: Tensor, memory: Tensor, ready: torch.cuda.Event | None) -> None:
        """Copy to the device, and wait for it: the buffer is reused at once."""
        if ready is None:
            memory.copy_(source)
            return
        stream = self.streams.get(memory.device)
        if stream is None:
            stream = self.streams[memory.device] = torch.cuda.Stream(memory.device)
        with torch.cuda.stream(stream):
            stream.wait_event(ready)  # the memory may have been another tensor's that is still in use
            memory.copy_(source, non_blocking=True)
        stream.synchronize()


def group_by_module(tasks: Mapping[str, ReadTask], modules: Mapping[str, Callable[[], None]]) -> list[ReadTask]:
    """Return the tasks, keyed by the name of what they fill, with those of each of `modules` next to each other.

    `modules` maps a module's name (`double_blocks.0`) to a function that is called once the module is complete.
    """
    remaining, ordered = dict(tasks), []
    for module, ready in modules.items():
        ordered += [remaining.pop(name) for name in list(remaining) if name.startswith(f"{module}.")]
        ordered.append(ReadTask({}, lambda tensors, ready=ready: ready()))  # type: ignore[misc]
    return [*remaining.values(), *ordered]


def run_tasks(tasks: Sequence[ReadTask], digests: Digests | None = None) -> None:
    """Read the tensors of the tasks and call each task's `use` with new tensors, which it may keep, in order.

    `digests` receives the checksums of everything that is read.
    """
    budget = AHEAD * max((task.nbytes for task in tasks), default=0)
    reader = Reader(digests)
    waiting = deque(tasks)
    reading: deque[tuple[ReadTask, dict[str, Tensor], list[Future[None]]]] = deque()
    held_bytes = 0
    with ThreadPoolExecutor(THREADS, thread_name_prefix="weights") as pool:
        try:
            while waiting or reading:
                while waiting and (not reading or held_bytes + waiting[0].nbytes <= budget):
                    task = waiting.popleft()
                    held_bytes += task.nbytes
                    reading.append((task, *start_task(task, reader, pool)))
                task, tensors, futures = reading.popleft()
                for future in futures:
                    future.result()
                task.use(tensors)
                del tensors
                held_bytes -= task.nbytes
        finally:
            pool.shutdown(cancel_futures=True)


def start_task(task: ReadTask, reader: Reader, pool: Executor) -> tuple[dict[str, Tensor], list[Future[None]]]:
    """Allocate memory for a task's tensors and submit the reads."""
    tensors: dict[str, Tensor] = {}
    futures = []
    for name, read in task.reads.items():
        memory = torch.empty(read.nbytes, dtype=torch.uint8, device=read.device)
        ready = torch.cuda.current_stream(read.device).record_event() if read.device.type == "cuda" else None
        for piece, target in zip(read.pieces, memory.split([piece.size for piece in read.pieces]), strict=True):
            for start in range(0, piece.size, CHUNK):
                part = target[start : start + CHUNK]
                futures.append(pool.submit(reader.read_chunk, piece.stored, piece.offset + start, part, ready))
        tensors[name] = memory.view(read.dtype).reshape(read.shape)
    return tensors, futures
