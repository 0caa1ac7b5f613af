"""What the frozen encoders make of pictures and prompts, computed once and kept on disk: a folder of tensors.

The autoencoder and text encoder never change while an adapter trains, so their results are stored and both are freed; a
second run loads neither. An entry is found by its recipe, the sha256 of everything that determines it: picture content
(not its path), size, resize version, encoder fingerprint. So nothing is ever stale: another recipe is another entry,
equal pictures share one, and runs may share a folder. A manifest of paths and times would have to be kept in step, and
would be wrong after the first `cp -p`.

Filling takes two steps, since a text encoder may weigh 48 GB: `plan_latents` (data/cache/latents.py) and
`plan_embeddings` (data/cache/embeddings.py) compute keys and say how many entries are missing; only if some are need
the caller load the encoder and hand it to `plan.fill`. Encoders get ONE picture or prompt a call: with several,
rounding depends on the neighbors, and what the cache holds must not depend on what happened to be missing together.
"""

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import psutil
import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from data.files import atomic_write

MAX_HEADER = 1 << 20  # bytes; an entry's own is a few hundred
HEAD = 1 << 10  # bytes that are read at once to see a header
UNFINISHED_SECONDS = 24 * 3600.0  # what is older was left by a process that is no more
CHECKSUM = "xxh3_64"  # its name in an entry's metadata
Shape = tuple[int | None, ...]  # of an entry's tensor; None is any number from 1
log = logging.getLogger(__name__)
Progress = Callable[[int, int, int], None]  # (entries done, entries to do, bytes stored), by this process


class Cache:
    """A folder of tensors, one safetensors file an entry at `folder/ab/abcdef....safetensors`.

    Files appear whole or not at all, so processes may share a folder and be killed at any time; what a killed one was
    writing is left as a `.tmp`, never read, and removed by `sweep` a day later. What the disk does to a file later is
    seen by its checksum when it is read; entries of earlier versions have none, and are read as they are.
    """

    shared = True  # what one process stores, all have

    def __init__(self, folder: str | Path) -> None:
        if not isinstance(folder, str | Path):
            raise ValueError(f"cache folder {folder!r} is {type(folder).__name__}: a path was expected")
        self.folder = Path(folder).expanduser()
        self._root = f"{self.folder}{os.sep}"
        self._told_unchecked = False

    @staticmethod
    def key(kind: str, **recipe: object) -> str:
        """sha256, hexadecimal, of the recipe as canonical JSON: equal on all machines, in any order of arguments."""
        text = json.dumps([kind, recipe], sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def __contains__(self, key: str) -> bool:
        return self.path(key).is_file()

    def __str__(self) -> str:
        return str(self.folder)

    def holds(self, key: str, name: str, shape: Shape) -> bool:
        """Whether there is an entry with a tensor `name` of `shape`, of full length: reads its header, no data."""
        try:  # in calls of the system, not of pathlib: at a start this is asked 100,000 times
            file = os.open(f"{self._root}{key[:2]}{os.sep}{key}.safetensors", os.O_RDONLY)
        except OSError:
            return False
        try:
            size = os.fstat(file).st_size
            head = os.read(file, HEAD)
            length = int.from_bytes(head[:8], "little")
            if HEAD - 8 < length <= MAX_HEADER:
                head += os.read(file, length)
            header = json.loads(head[8 : 8 + length]) if length <= MAX_HEADER else {}
            ends = [entry["data_offsets"][1] for tensor, entry in header.items() if tensor != "__metadata__"]
            return size == 8 + length + max(ends, default=0) and fits(tuple(header[name]["shape"]), shape)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
            return False
        finally:
            os.close(file)

    def tensor(self, key: str, name: str, shape: Shape) -> Tensor:
        """The tensor `name` of an entry, as `get`. ValueError, too, if the entry has none, or one of another shape."""
        return self.pick(key, self.get(key), name, shape)

    def pick(self, key: str, tensors: Mapping[str, Tensor], name: str, shape: Shape) -> Tensor:
        """`tensors[name]`. ValueError, naming the entry `key` that they were read from, unless it is of `shape`."""
        if name not in tensors or not fits(tuple(tensors[name].shape), shape):
            found = ", ".join(f"{other} {tuple(tensor.shape)}" for other, tensor in tensors.items()) or "nothing"
            wanted = ", ".join("any" if side is None else str(side) for side in shape)
            raise ValueError(
                f"cache entry {self.path(key)} holds {found} instead of {name} ({wanted}): delete it and fill again"
            )
        return tensors[name]

    def sweep(self) -> None:
        """Removes what processes that were killed a day ago or earlier left half written."""
        for unfinished in self.folder.glob("??/.*.tmp"):
            try:
                if time.time() - unfinished.stat().st_mtime > UNFINISHED_SECONDS:
                    unfinished.unlink()
            except FileNotFoundError:
                continue  # another process swept it

    def get(self, key: str) -> dict[str, Tensor]:
        """An entry, read into CPU memory in the dtypes it was stored in.

        ValueError if it is missing or damaged. One whose content is not what its checksum says is removed, because
        `holds`, which reads no content, would find it good again.
        """
        path = self.path(key)
        try:
            content = path.read_bytes()  # not memory-mapped: reading ahead must really read
            tensors = load(content)
        except FileNotFoundError as error:
            raise ValueError(f"cache entry {path} does not exist (any more): fill the cache again") from error
        except SafetensorError as error:
            raise ValueError(f"cache entry {path} is damaged ({error}): {_removed(path)}") from error
        except OSError as error:
            raise ValueError(f"cache entry {path} cannot be read ({error}): delete it and fill again") from error
        begin = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:begin])
        stored = header.pop("__metadata__", {}).get(CHECKSUM)
        if stored is None:
            self._tell_unchecked()
        elif stored != checksum(header, memoryview(content)[begin:]):
            raise ValueError(f"cache entry {path} is damaged, its checksum differs: {_removed(path)}")
        return tensors

    def put(self, key: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
        """Stores an entry atomically: written beside its place, flushed to the disk, then renamed; returns its bytes.

        `metadata` is for people who open the file; nothing here reads it but the checksum that is added.
        """
        path = self.path(key)
        stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        content = save(stored)
        begin = 8 + int.from_bytes(content[:8], "little")
        header, data = json.loads(content[8:begin]), memoryview(content)[begin:]
        # written here, because the library would put the metadata in another order each time
        described = {"__metadata__": {**metadata, CHECKSUM: checksum(header, data)}, **header}
        head = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
        head += b" " * (-len(head) % 8)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as temporary, temporary.open("xb") as file:
                file.write(len(head).to_bytes(8, "little") + head)
                file.write(data)
        except OSError as error:
            raise ValueError(
                f"the cache {self.folder} cannot be written ({error.strerror or error}): make room there, or give "
                "another cache_dir. What is in it stays, and the next start goes on from there"
            ) from error
        return 8 + len(head) + len(data)

    def free(self) -> int:
        """Bytes that can still be stored."""
        place = self.folder.absolute()
        while not place.exists():
            place = place.parent
        return shutil.disk_usage(place).free

    def _tell_unchecked(self) -> None:
        if not self._told_unchecked:
            log.warning("%s has entries of an earlier version, without a checksum: read unchecked", self.folder)
        self._told_unchecked = True


class MemoryCache(Cache):
    """Entries of this process alone, in memory, for a run that is to leave nothing on disk (`cache_dir: null`)."""

    shared = False

    def __init__(self) -> None:
        super().__init__("memory")
        self._entries: dict[str, dict[str, Tensor]] = {}

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def holds(self, key: str, name: str, shape: Shape) -> bool:
        return name in self._entries.get(key, ()) and fits(tuple(self._entries[key][name].shape), shape)

    def get(self, key: str) -> dict[str, Tensor]:
        if key not in self._entries:
            raise ValueError(f"cache entry {key} was not computed by this process")
        return self._entries[key]

    def put(self, key: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
        stored = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
        self._entries[key] = stored
        return sum(tensor.nbytes for tensor in stored.values())

    def sweep(self) -> None:
        """There is nothing half written."""

    def free(self) -> int:
        return psutil.virtual_memory().available


def checksum(header: Mapping[str, object], data: memoryview) -> str:
    """Of an entry's names, dtypes, shapes and content; xxHash takes as long as copying them would."""
    digest = xxhash.xxh3_64(json.dumps(header, sort_keys=True).encode())
    digest.update(data)
    return digest.hexdigest()


def _removed(path: Path) -> str:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        return f"delete it ({error.strerror}) and start again"
    return "it was removed, start again and it is computed anew"


def fits(found: tuple[int, ...], wanted: Shape) -> bool:
    return len(found) == len(wanted) and all(a > 0 if b is None else a == b for a, b in zip(found, wanted, strict=True))


def share(
    cache: Cache, lacks: Callable[[str], bool], keys: Sequence[str], process_index: int, num_processes: int
) -> list[str]:
    """The missing keys that this process is to fill.

    Every n-th of *all* keys, not of the missing ones: another process may have begun to fill before this one looks, and
    shares of two different lists would leave entries that nobody computes. Of a cache that is not shared, all.
    """
    assert 0 <= process_index < num_processes
    own = keys[process_index::num_processes] if cache.shared else keys
    return [key for key in own if lacks(key)]


def each(work: Callable[[str], int], keys: Sequence[str], workers: int, progress: Progress | None) -> None:
    """`work` for every key, by this thread or by several others, reporting progress after each that is done.

    `work` returns the bytes that it stored. The first error is raised at once: the others may be waiting for an answer
    that never comes.
    """
    stored = 0
    if workers == 1:  # models compute in the thread that loaded them
        for done, key in enumerate(keys, start=1):
            stored += work(key)
            if progress is not None:
                progress(done, len(keys), stored)
        return
    pool = ThreadPoolExecutor(workers)
    try:
        for done, future in enumerate(as_completed([pool.submit(work, key) for key in keys]), start=1):
            stored += future.result()
            if progress is not None:
                progress(done, len(keys), stored)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def check_finite(tensor: Tensor, what: str) -> None:
    """ValueError, beginning with `what`, for NaN and infinity."""
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{what} has NaN or infinite values, not stored: run the encoder in bfloat16 or float32")
