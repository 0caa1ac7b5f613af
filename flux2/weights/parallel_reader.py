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
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod

import torch
import xxhash
from torch import Tensor

from flux2.weights.safetensors_files import StoredTensor, damaged_file
from flux2.weights.sources import WeightsError

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
        return prod(self.shape) * self.dtype.itemsize


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

    def of(self, stored: StoredTensor) -> str:
        """Return the checksum of a tensor as 32 hexadecimal digits."""
        chunks = self._chunks.get(stored, {})
        return xxhash.xxh3_128_hexdigest(b"".join(chunks[offset] for offset in sorted(chunks)))

    def content(self) -> str:
        """Return a checksum of names, shapes, dtypes and bytes of all tensors, however they are spread over files."""
        lines = (f"{stored.key} {stored.dtype} {stored.shape} {self.of(stored)}" for stored in self._chunks)
        return xxhash.xxh3_128_hexdigest("\n".join(sorted(lines)).encode())


def chunks(size: int) -> Iterable[tuple[int, int]]:
    """Return start and stop of the chunks in which `size` bytes are read and summed up."""
    return ((start, min(start + CHUNK, size)) for start in range(0, size, CHUNK))


def checksum(data: memoryview) -> str:
    """Return what `Digests.of` returns for a tensor of these bytes that was read completely."""
    return xxhash.xxh3_128_hexdigest(
        b"".join(xxhash.xxh3_128_digest(data[start:stop]) for start, stop in chunks(len(data)))
    )


def needs_staging(memory: Tensor) -> bool:
    """Return whether a file cannot be read into `memory` directly."""
    return memory.device.type != "cpu"


@dataclass
class ReaderThreadState(threading.local):
    """A reading thread's pinned buffer, and the stream for its copies."""

    buffer: Tensor | None = None
    stream: torch.cuda.Stream | None = None


@dataclass
class Reader:
    """Reads chunks into memory on any device. Its methods run in threads."""

    digests: Digests | None = None
    thread_state: ReaderThreadState = field(default_factory=ReaderThreadState)

    def read_chunk(self, piece: Piece, start: int, stop: int, memory: Tensor, ready: torch.cuda.Event | None) -> None:
        """Read bytes `start` to `stop` of `piece` into `memory`, (stop - start,) uint8."""
        staged = needs_staging(memory)
        target = self.staging_buffer(memory.device)[: stop - start] if staged else memory
        view = target.numpy().data
        read_into(view, piece.stored, piece.offset + start)
        if self.digests is not None:
            self.digests.add(piece.stored, piece.offset + start, view)
        if staged:
            self.copy_to_device(target, memory, ready)

    def staging_buffer(self, device: torch.device) -> Tensor:
        if self.thread_state.buffer is None:
            self.thread_state.buffer = torch.empty(CHUNK, dtype=torch.uint8, pin_memory=device.type == "cuda")
        return self.thread_state.buffer

    def copy_to_device(self, source: Tensor, memory: Tensor, ready: torch.cuda.Event | None) -> None:
        """Copy to the device, and wait for it: the buffer is reused at once."""
        if ready is None:
            memory.copy_(source)
            return
        if self.thread_state.stream is None:
            self.thread_state.stream = torch.cuda.Stream(memory.device)
        with torch.cuda.stream(self.thread_state.stream):
            self.thread_state.stream.wait_event(ready)  # the memory may have been another tensor's that is still in use
            memory.copy_(source, non_blocking=True)
        self.thread_state.stream.synchronize()


def read_into(view: memoryview, stored: StoredTensor, offset: int) -> None:
    """Fill `view` with the bytes of a stored tensor, starting at `offset`."""
    done = 0
    try:
        with stored.file.open("rb", buffering=0) as handle:
            handle.seek(stored.start + offset)
            while done < len(view):
                count = handle.readinto(view[done:])
                if not count:
                    raise damaged_file(stored.file, f"it ends within {stored.key}")
                done += count
    except OSError as error:
        raise WeightsError(f"{stored.file}: {stored.key} cannot be read ({error.strerror})") from error


def group_by_module(jobs: Mapping[str, ReadTask], modules: Mapping[str, Callable[[], None]]) -> list[ReadTask]:
    """Return the tasks, keyed by the name of what they fill, with those of each of `modules` next to each other.

    `modules` maps a module's name (`double_blocks.0`) to a function that is called once the module is complete.
    """
    remaining, ordered = dict(jobs), []
    for module, ready in modules.items():
        of_module = [remaining.pop(name) for name in list(remaining) if name.startswith(f"{module}.")]
        last = of_module.pop()

        def use(tensors: dict[str, Tensor], last: ReadTask = last, ready: Callable[[], None] = ready) -> None:
            last.use(tensors)
            ready()

        ordered += [*of_module, ReadTask(last.reads, use)]
    return [*remaining.values(), *ordered]


def run_tasks(jobs: Sequence[ReadTask], digests: Digests | None = None) -> None:
    """Read the tensors of the tasks and call each task's `use` with new tensors, which it may keep, in order.

    `digests` receives the checksums of everything that is read.
    """
    budget = AHEAD * max((job.nbytes for job in jobs), default=0)
    reader = Reader(digests)
    waiting = deque(jobs)
    reading: deque[tuple[ReadTask, dict[str, Tensor], list[Future[None]]]] = deque()
    held_bytes = 0
    with ThreadPoolExecutor(THREADS, thread_name_prefix="weights") as pool:
        try:
            while waiting or reading:
                while waiting and (not reading or held_bytes + waiting[0].nbytes <= budget):
                    job = waiting.popleft()
                    held_bytes += job.nbytes
                    reading.append((job, *start_task(job, reader, pool)))
                job, tensors, futures = reading.popleft()
                for future in futures:
                    future.result()
                job.use(tensors)
                del tensors
                held_bytes -= job.nbytes
        finally:
            pool.shutdown(cancel_futures=True)


def start_task(job: ReadTask, reader: Reader, pool: ThreadPoolExecutor) -> tuple[dict[str, Tensor], list[Future[None]]]:
    """Allocate memory for a task's tensors and submit the reads."""
    tensors: dict[str, Tensor] = {}
    futures = []
    for name, read in job.reads.items():
        memory = torch.empty(read.nbytes, dtype=torch.uint8, device=read.device)
        ready = torch.cuda.current_stream(read.device).record_event() if read.device.type == "cuda" else None
        offset = 0
        for piece in read.pieces:
            for start, stop in chunks(piece.size):
                part = memory[offset + start : offset + stop]
                futures.append(pool.submit(reader.read_chunk, piece, start, stop, part, ready))
            offset += piece.size
        assert offset == read.nbytes, f"{name}: {offset} bytes for {read.nbytes}"
        tensors[name] = memory.view(read.dtype).reshape(read.shape)
    return tensors, futures
