"""A folder of tensors: outputs of the frozen encoders for images and prompts, computed once and kept on disk.

The autoencoder and text encoder never change while an adapter trains, so their outputs are stored and both are freed; a
second run loads neither. The key of an entry is the sha256 of everything that determines it: image content (not its
path), size, resize version, encoder fingerprint. So no entry is ever stale: another recipe is another entry, equal
images share one, and runs may share a folder. A manifest of paths and times would have to be kept in sync, and would be
wrong after the first `cp -p`.

Filling takes two steps, since a text encoder may need 48 GB: `plan_latents` (data/cache/latents.py) and
`plan_embeddings` (data/cache/embeddings.py) compute keys and count the missing entries; the caller loads the encoder
and passes it to `plan.fill` only if there are any. Encoders get ONE image or prompt per call: with several, rounding
depends on the neighbors, and the cache must not depend on which entries happened to be missing together.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, suppress
from functools import cache as memoized
from itertools import accumulate
from json.encoder import encode_basestring_ascii
from pathlib import Path

import psutil
import torch
import xxhash
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from data.cache.packs import BINARY, MAX_HEADER, Packs, PackWriter, Place, form_of
from data.files import atomic_write, user_path
from data.memory import in_parts

PACK_ABOVE = 10_000  # entries of a plan from which on new ones go into packs
PACKS = "packs"  # folder of the packs in that of the cache
KEYS_AT_ONCE = 10_000  # that are looked up together
HEAD = 1 << 10  # bytes of the first read, which contain almost every header
UNFINISHED_SECONDS = 24 * 3600.0  # age from which a temporary file belongs to a process that has ended
CHECKSUM = "xxh3_64"  # key of the checksum in the metadata of an entry
CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)
Shape = tuple[int | None, ...]  # expected shape of a tensor; None is any side >= 1
log = logging.getLogger(__name__)
Progress = Callable[[int, int, int], None]  # (entries done, entries to do, bytes stored), by this process


class Cache:
    """A folder of tensors, with one safetensors file per entry at `folder/ab/abcdef....safetensors`, or in packs.

    Packs (data/cache/packs.py) hold the entries that are stored within `packing`, byte by byte as files would. Files
    are written atomically, so processes may share a folder and be killed at any time; a killed one leaves a `.tmp` file
    that is never read, and `sweep` deletes it a day later. A checksum detects later damage when an entry is read;
    entries of earlier versions have none and are read unchecked.
    """

    shared = True  # whether all processes see the entries that one stores

    def __init__(self, folder: str | Path) -> None:
        if not isinstance(folder, str | Path):
            raise ValueError(f"cache folder {folder!r} is {type(folder).__name__}: it must be a path")
        self.folder = user_path(folder)
        self._root = f"{self.folder}{os.sep}"
        self.packs = Packs(self.folder / PACKS)
        self._writer: PackWriter | None = None
        self._warned_unchecked = False

    @staticmethod
    def key(kind: str, **recipe: object) -> str:
        """Return the hexadecimal sha256 of the recipe as canonical JSON, whatever the order of its arguments."""
        return hashlib.sha256(CANONICAL.encode([kind, recipe]).encode()).hexdigest()

    @staticmethod
    def keys(kind: str, varying: str, **recipe: object) -> Callable[[str], str]:
        """Return a function from a text in the field `varying` to the key, for many keys of the same other fields."""
        # no value of a recipe is this character alone
        before, after = CANONICAL.encode([kind, recipe | {varying: "\0"}]).split(CANONICAL.encode("\0"))
        return lambda text: hashlib.sha256(f"{before}{encode_basestring_ascii(text)}{after}".encode()).hexdigest()

    def path(self, key: str) -> Path:
        """Return the path of an entry that is a file of its own."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def __str__(self) -> str:
        return str(self.folder)

    @contextmanager
    def packing(self, entries: int) -> Iterator[None]:
        """Context manager in which `put` adds to packs, if there are more than `PACK_ABOVE` entries in all."""
        self._writer = writer = PackWriter(self.folder / PACKS) if entries > PACK_ABOVE else None
        try:
            yield
        finally:
            self._writer = None
            if writer is not None:
                with writing(writer.folder):  # some network disks report a full disk only here
                    writer.close()

    def lacking(self, keys: Iterable[str], expected: Callable[[str], tuple[str, Shape]]) -> list[str]:
        """Return the keys without a complete entry that has the expected (name, shape) of a tensor.

        Packs that changed are read again, once for all keys.
        """
        self.packs.refresh()
        fits = memoized(lambda form, name, shape: is_in(self.packs.shapes(form), name, shape))
        return [
            key
            for part in in_parts(keys, KEYS_AT_ONCE)
            for key, form in zip(part, self.packs.forms(part), strict=True)
            if not (form is not None and fits(form, *expected(key))) and not self._has_file(key, *expected(key))
        ]

    def _has_file(self, key: str, name: str, shape: Shape) -> bool:
        """Return whether there is a complete file with a tensor `name` of `shape`; reads only its header."""
        try:  # system calls instead of pathlib: a start may check 100,000 entries
            file = os.open(f"{self._root}{key[:2]}{os.sep}{key}.safetensors", os.O_RDONLY | BINARY)
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
            return size == 8 + length + max(ends, default=0) and has_shape(tuple(header[name]["shape"]), shape)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
            return False
        finally:
            os.close(file)

    def pick(self, key: str, tensors: Mapping[str, Tensor], name: str, shape: Shape) -> Tensor:
        """Return `tensors[name]`. Raise ValueError, naming the entry `key`, unless it has `shape`."""
        if name not in tensors or not has_shape(tuple(tensors[name].shape), shape):
            found = ", ".join(f"{other} {tuple(tensor.shape)}" for other, tensor in tensors.items()) or "nothing"
            wanted = ", ".join("any" if side is None else str(side) for side in shape)
            raise ValueError(
                f"cache entry {self.place(key)} contains {found} instead of {name} ({wanted}). Delete it and rerun"
            )
        return tensors[name]

    def place(self, key: str) -> Path | Place:
        """Return where an entry is: in a pack, or in a file of its own."""
        return self.packs.find(key) or self.path(key)

    def sweep(self) -> None:
        """Delete incomplete files that processes left behind which were killed at least a day ago."""
        for unfinished in self.folder.glob("??/.*.tmp"):
            with suppress(FileNotFoundError):  # another process deleted it
                if time.time() - unfinished.stat().st_mtime > UNFINISHED_SECONDS:
                    unfinished.unlink()

    def get(self, key: str) -> dict[str, Tensor]:
        """Return an entry in CPU memory, in the dtypes that it was stored in.

        Raises ValueError if it is missing or damaged. A damaged entry is deleted, because `lacking`, which does not
        read the data, would accept it again.
        """
        place = self.place(key)
        try:  # not memory-mapped, so that prefetching really reads
            content = place.read() if isinstance(place, Place) else place.read_bytes()
            tensors = load(content)
        except FileNotFoundError as error:
            raise ValueError(f"cache entry {place} does not exist. Fill the cache again") from error
        except SafetensorError as error:
            raise ValueError(f"cache entry {place} is damaged ({error}): {self._remove(key, place)}") from error
        except OSError as error:
            raise ValueError(f"cache entry {place} cannot be read ({error}). Delete it and rerun") from error
        begin = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:begin])
        stored = header.pop("__metadata__", {}).get(CHECKSUM)
        if stored is None:
            if not self._warned_unchecked:
                log.warning("%s has entries of an earlier version, without a checksum: read unchecked", self.folder)
            self._warned_unchecked = True
        elif stored != checksum(header, memoryview(content)[begin:]):
            raise ValueError(f"cache entry {place} is damaged (wrong checksum): {self._remove(key, place)}")
        return tensors

    def put(self, key: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
        """Store an entry atomically and return its size in bytes.

        `metadata` is for people who open the file; only the checksum that is added to it is ever read.
        """
        path = self.path(key)
        stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        content = save(stored)
        begin = 8 + int.from_bytes(content[:8], "little")
        header, data = json.loads(content[8:begin]), memoryview(content)[begin:]
        # the header is written here, because the library orders the metadata differently each time
        described = {"__metadata__": {**metadata, CHECKSUM: checksum(header, data)}, **header}
        head = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
        head += b" " * (-len(head) % 8)
        writer = self._writer
        with writing(path if writer is None else writer.folder):
            if writer is not None:
                writer.append(key, form_of(header), b"".join((len(head).to_bytes(8, "little"), head, data)))
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                with atomic_write(path) as temporary, temporary.open("xb") as file:
                    file.write(len(head).to_bytes(8, "little") + head)
                    file.write(data)
        return 8 + len(head) + len(data)

    def _remove(self, key: str, place: Path | Place) -> str:
        """Delete a damaged entry; return what was done, or what to do."""
        try:
            if isinstance(place, Place):
                self.packs.remove(key)
            else:
                place.unlink(missing_ok=True)
        except OSError as error:
            whole = f"delete {place.pack}" if isinstance(place, Place) else "delete it"
            return f"{whole} ({error.strerror}) and rerun"
        return "it was deleted; rerun to recompute it"

    def free(self) -> int:
        """Return the number of bytes that can still be stored."""
        folder = self.folder.absolute()
        return shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free


class MemoryCache(Cache):
    """A cache in the memory of this process, for a run that leaves nothing on disk (`cache_dir: null`)."""

    shared = False

    def __init__(self) -> None:
        super().__init__("memory")
        self._entries: dict[str, dict[str, Tensor]] = {}

    def lacking(self, keys: Iterable[str], expected: Callable[[str], tuple[str, Shape]]) -> list[str]:
        return [key for key in keys if not self._has(key, *expected(key))]

    def _has(self, key: str, name: str, shape: Shape) -> bool:
        return name in self._entries.get(key, ()) and has_shape(tuple(self._entries[key][name].shape), shape)

    def get(self, key: str) -> dict[str, Tensor]:
        if key not in self._entries:
            raise ValueError(f"cache entry {key} was not computed by this process")
        return self._entries[key]

    def put(self, key: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> int:
        stored = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
        self._entries[key] = stored
        return sum(tensor.nbytes for tensor in stored.values())

    def sweep(self) -> None:
        """Do nothing: there are no files."""

    def free(self) -> int:
        return psutil.virtual_memory().available


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Context manager that turns an OSError while entries are written to `place` into a ValueError with a remedy."""
    try:
        yield
    except OSError as error:
        remedies = {
            errno.EFBIG: "Raise the limit on file sizes (ulimit -f)",
            errno.ENOSPC: "Make room there",
            errno.EDQUOT: "Make room there",
        }
        raise ValueError(
            f"the cache entry {place} cannot be written ({error.strerror or error}). "
            f"{remedies.get(error.errno or 0, 'Correct that')}, or give another cache_dir. "
            "Existing entries are kept, and the next start computes only the missing ones"
        ) from error


def checksum(header: Mapping[str, object], data: memoryview) -> str:
    """Return a checksum of an entry's names, dtypes, shapes and data; xxHash is as fast as a copy."""
    digest = xxhash.xxh3_64(json.dumps(header, sort_keys=True).encode())
    digest.update(data)
    return digest.hexdigest()


def has_shape(found: tuple[int, ...], wanted: Shape) -> bool:
    return len(found) == len(wanted) and all(a > 0 if b is None else a == b for a, b in zip(found, wanted, strict=True))


def is_in(shapes: Mapping[str, tuple[int, ...]], name: str, wanted: Shape) -> bool:
    """Return whether there is a tensor `name` of the wanted shape among `shapes`."""
    return name in shapes and has_shape(shapes[name], wanted)


def share_of(cache: Cache, keys: Sequence[str], process_index: int, num_processes: int) -> Sequence[str]:
    """Return the keys that a process fills: every n-th, or all if the cache is not shared.

    `keys` are *all* keys, not the missing ones: another process may fill entries before this one looks for them, and
    shares of two different lists could leave entries that no process computes.
    """
    assert 0 <= process_index < num_processes
    return keys[process_index::num_processes] if cache.shared else keys


def fill_share(
    cache: Cache,
    expected: Callable[[str], tuple[str, Shape]],
    keys: Sequence[str],
    work: Callable[[str], int],
    process_index: int,
    num_processes: int,
    progress: Progress | None,
    workers: int = 1,
) -> None:
    """Call `work` for the missing keys of this process's share, all if the cache is not shared; report progress.

    `work` stores an entry and returns its bytes. With several workers it runs in as many threads, and the first error
    is raised at once, without waiting for other threads, which may wait for an answer that never comes. Entries of
    more than `PACK_ABOVE` keys go into packs.
    """
    cache.sweep()
    missing = cache.lacking(share_of(cache, keys, process_index, num_processes), expected)
    pool = ThreadPoolExecutor(workers)
    sizes: Iterable[int] = map(work, missing)  # a single worker is this thread, which loaded the model
    if workers > 1:
        sizes = (future.result() for future in as_completed([pool.submit(work, key) for key in missing]))
    try:
        with cache.packing(len(keys)):
            for done, stored in enumerate(accumulate(sizes), start=1):
                if progress is not None:
                    progress(done, len(missing), stored)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def check_finite(tensor: Tensor, what: str) -> None:
    """Raise ValueError, beginning with `what`, if a tensor contains NaN or infinity."""
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{what} has NaN or infinite values. Run the encoder in bfloat16 or float32")
