"""What the frozen encoders make of pictures and prompts, computed once and kept on disk.

The autoencoder and text encoder never change while an adapter trains, so their results are stored and both are freed; a
second run loads neither. An entry is found by its recipe, the sha256 of everything that determines it: picture content
(not its path), size, resize version, encoder fingerprint. So nothing is ever stale: another recipe is another entry,
equal pictures share one, and runs may share a folder. A manifest of paths and times would have to be kept in step, and
would be wrong after the first `cp -p`.

Filling takes two steps, since a text encoder may weigh 48 GB: `plan_latents` and `plan_embeddings` compute keys and say
how many entries are missing; only if some are need the caller load the encoder and hand it to `plan.fill`. Encoders
get ONE picture or prompt a call: with several, rounding depends on the neighbours, and what the cache holds must not
depend on what happened to be missing together.
"""

import hashlib
import json
import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from data.buckets import FIT_VERSION, PIXELS_PER_LATENT, Buckets, Size, fit, fit_reference, reference_size
from data.pictures import Picture, shortened
from data.samples import Sample

LATENT_CHANNELS = 128
MAX_HEADER = 1 << 20  # bytes; an entry's own is a few hundred
UNFINISHED_SECONDS = 24 * 3600.0  # what is older was left by a process that is no more
Shape = tuple[int | None, ...]  # of an entry's tensor; None is any number from 1
EMBEDDING_SHAPE: Shape = (None, None)
log = logging.getLogger(__name__)
Progress = Callable[[int, int], None]  # (entries done, entries to do), by this process


class Cache:
    """A folder of tensors, one safetensors file an entry at `folder/ab/abcdef....safetensors`.

    Files appear whole or not at all, so processes may share a folder and be killed at any time; what a killed one was
    writing is left as a `.tmp`, never read, and removed by `sweep` a day later.
    """

    def __init__(self, folder: str | Path) -> None:
        if not isinstance(folder, str | Path):
            raise ValueError(f"cache folder {folder!r} is {type(folder).__name__}: a path was expected")
        self.folder = Path(folder).expanduser()

    @staticmethod
    def key(kind: str, **recipe: object) -> str:
        """sha256, hexadecimal, of the recipe as canonical JSON: equal on all machines, in any order of arguments."""
        text = json.dumps([kind, recipe], sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.safetensors"

    def __contains__(self, key: str) -> bool:
        return self.path(key).is_file()

    def holds(self, key: str, name: str, shape: Shape) -> bool:
        """Whether there is an entry with a tensor `name` of `shape`, of full length: reads its header, no data."""
        try:
            with self.path(key).open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length)) if length <= MAX_HEADER else {}
                size = os.fstat(file.fileno()).st_size
            ends = [entry["data_offsets"][1] for tensor, entry in header.items() if tensor != "__metadata__"]
            return size == 8 + length + max(ends, default=0) and _fits(tuple(header[name]["shape"]), shape)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
            return False

    def tensor(self, key: str, name: str, shape: Shape) -> Tensor:
        """The tensor `name` of an entry, as `get`. ValueError, too, if the entry has none, or one of another shape."""
        return self.pick(key, self.get(key), name, shape)

    def pick(self, key: str, tensors: Mapping[str, Tensor], name: str, shape: Shape) -> Tensor:
        """`tensors[name]`. ValueError, naming the entry `key` that they were read from, unless it is of `shape`."""
        if name not in tensors or not _fits(tuple(tensors[name].shape), shape):
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
        """An entry, read into CPU memory in the dtypes it was stored in. ValueError if it is missing or damaged."""
        path = self.path(key)
        try:
            return load(path.read_bytes())  # not memory-mapped: reading ahead must really read
        except FileNotFoundError as error:
            raise ValueError(f"cache entry {path} does not exist (any more): fill the cache again") from error
        except (SafetensorError, OSError) as error:
            raise ValueError(f"cache entry {path} cannot be read ({error}): delete it and fill again") from error

    def put(self, key: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Stores an entry atomically: written beside its place, flushed to the disk, then renamed.

        `metadata` is for people who open the file; nothing here reads it.
        """
        path = self.path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{key}.{uuid.uuid4().hex}.tmp")
        content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, dict(metadata))
        try:
            with unfinished.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)


@dataclass(frozen=True)
class LatentEntry:
    """Sizes in pixels, (width, height), and cache keys of one sample's target and references."""

    size: Size
    key: str
    reference_sizes: tuple[Size, ...] = ()
    reference_keys: tuple[str, ...] = ()

    @property
    def bucket(self) -> tuple[Size, tuple[Size, ...]]:
        """Samples of equal buckets stack into one batch."""
        return self.size, self.reference_sizes


@dataclass(frozen=True)
class LatentPlan:
    """`entries` in sample order, and the pictures behind them."""

    cache: Cache
    entries: tuple[LatentEntry, ...]
    work: Mapping[str, tuple[Picture, Callable[[Image.Image], Image.Image]]]  # key -> what to encode, and how it is cut
    shapes: Mapping[str, Shape]  # key -> of its latents

    @property
    def missing(self) -> int:
        """How many entries are not in the cache now, or not whole, or not of their shape."""
        return sum(self.lacks(key) for key in self.work)

    def lacks(self, key: str) -> bool:
        return not self.cache.holds(key, "latents", self.shapes[key])

    def fill(
        self,
        encode: Callable[[list[Image.Image]], Tensor],
        process_index: int = 0,
        num_processes: int = 1,
        progress: Progress | None = None,
    ) -> None:
        """Computes this process's share of the missing entries, storing each as soon as it is there.

        `encode` takes one RGB picture, in a list, of width W and height H and returns (1, 128, H/16, W/16), any float
        dtype and device. Stored as "latents", (128, H/16, W/16). Raises ValueError, naming the picture, for one that
        cannot be read or whose latents are not finite.
        """
        self.cache.sweep()
        for key in _share(self.lacks, list(self.work), process_index, num_processes, progress):
            picture, cut = self.work[key]
            image = cut(picture.load())
            latents = encode([image])
            width, height = image.size
            expected = (1, LATENT_CHANNELS, height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT)
            assert tuple(latents.shape) == expected, f"encode returned {tuple(latents.shape)} for {expected}"
            _check_finite(latents, f"the autoencoder's latents of picture {picture.name}")
            self.cache.put(key, {"latents": latents[0]}, {"picture": picture.name})


@dataclass(frozen=True)
class EmbeddingPlan:
    """`keys` maps each prompt to its entry."""

    cache: Cache
    keys: Mapping[str, str]

    @property
    def missing(self) -> int:
        """How many entries are not in the cache now, or not whole."""
        return sum(self.lacks(key) for key in self.keys.values())

    def lacks(self, key: str) -> bool:
        return not self.cache.holds(key, "embeddings", EMBEDDING_SHAPE)

    def fill(
        self,
        encode: Callable[[list[str]], Tensor],
        process_index: int = 0,
        num_processes: int = 1,
        progress: Progress | None = None,
        workers: int = 1,
    ) -> None:
        """Computes this process's share of the missing entries, storing each as soon as it is there.

        `encode` takes one prompt, in a list, and returns (1, L, D), any float dtype and device. Stored as "embeddings",
        (L, D). Raises ValueError, naming the prompt, if it is not finite.

        With several `workers` it is called by as many threads at once, for encoders that wait for an answer. When one
        call raises, no other begins; those under way are stored if they end well, after this has raised.
        """
        prompts = {key: prompt for prompt, key in self.keys.items()}

        def compute(key: str) -> None:
            embeddings = encode([prompts[key]])
            shape = tuple(embeddings.shape)
            assert len(shape) == 3, f"encode returned {shape}, not (1, L, D)"
            assert shape[0] == 1, f"encode returned {shape} for one prompt"
            _check_finite(embeddings, f"the text encoder's embedding of prompt {prompts[key]!r}")
            self.cache.put(key, {"embeddings": embeddings[0]}, {"prompt": prompts[key]})

        self.cache.sweep()
        missing = _missing(self.lacks, list(prompts), process_index, num_processes)
        _each(compute, missing, workers, progress)


def plan_latents(
    cache: Cache, samples: Sequence[Sample], buckets: Buckets, encoder_id: str, reference_max_pixels: int
) -> LatentPlan:
    """Finds the bucket and key of every picture; reads headers and hashes contents, decodes nothing.

    Logs one warning, with their number, of pictures that are scaled up.

    `encoder_id` is a fingerprint of the autoencoder's weights and dtype. References keep their shape, up to
    `reference_max_pixels` each. Raises ValueError, naming the picture, for one whose header cannot be read.
    """
    work: dict[str, tuple[Picture, Callable[[Image.Image], Image.Image]]] = {}
    shapes: dict[str, Shape] = {}
    enlarged: dict[str, str] = {}

    def key(picture: Picture, before: Size, size: Size, is_reference: bool) -> str:
        recipe = {"picture": picture.digest(), "size": size, "fit": FIT_VERSION, "encoder": encoder_id}
        found = cache.key("latents", reference=is_reference, **recipe)
        cut = partial(fit_reference, max_pixels=reference_max_pixels) if is_reference else partial(fit, size=size)
        work.setdefault(found, (picture, cut))
        shapes[found] = latent_shape(size)
        if size[0] > before[0] or size[1] > before[1]:
            enlarged[found] = f"{shortened(picture.name)}, {before[0]} x {before[1]}"
        return found

    entries = []
    for sample in samples:
        before = sample.target.size
        size = buckets.assign(*before)
        references = [(picture, picture.size) for picture in sample.references]
        reference_sizes = tuple(reference_size(*own, reference_max_pixels) for _, own in references)
        reference_keys = tuple(
            key(picture, own, cap, is_reference=True)
            for (picture, own), cap in zip(references, reference_sizes, strict=True)
        )
        target_key = key(sample.target, before, size, is_reference=False)
        entries.append(LatentEntry(size, target_key, reference_sizes, reference_keys))
    if enlarged:
        log.warning(
            "%d of %d pictures are smaller than the size that they are trained at and are scaled up, such as %s",
            len(enlarged),
            len(work),
            next(iter(enlarged.values())),
        )
    return LatentPlan(cache, tuple(entries), work, shapes)


def plan_embeddings(cache: Cache, prompts: Sequence[str], encoder_id: str) -> EmbeddingPlan:
    """Finds the key of every distinct prompt.

    `encoder_id` is a fingerprint of all else that shapes an embedding: weights, dtype, template, length, layers read.
    """
    keys = {prompt: cache.key("embeddings", prompt=prompt, encoder=encoder_id) for prompt in prompts}
    return EmbeddingPlan(cache, keys)


def latent_shape(size: Size) -> Shape:
    """Of the latents of a picture of `size` pixels, (width, height)."""
    return LATENT_CHANNELS, size[1] // PIXELS_PER_LATENT, size[0] // PIXELS_PER_LATENT


def _fits(found: tuple[int, ...], wanted: Shape) -> bool:
    return len(found) == len(wanted) and all(a > 0 if b is None else a == b for a, b in zip(found, wanted, strict=True))


def _share(
    lacks: Callable[[str], bool],
    keys: Sequence[str],
    process_index: int,
    num_processes: int,
    progress: Progress | None,
) -> Iterator[str]:
    """The missing keys that this process is to fill, reporting progress after each."""
    missing = _missing(lacks, keys, process_index, num_processes)
    for done, key in enumerate(missing, start=1):
        yield key
        if progress is not None:
            progress(done, len(missing))


def _missing(lacks: Callable[[str], bool], keys: Sequence[str], process_index: int, num_processes: int) -> list[str]:
    """The missing keys that this process is to fill.

    Every n-th of *all* keys, not of the missing ones: another process may have begun to fill before this one looks, and
    shares of two different lists would leave entries that nobody computes.
    """
    assert 0 <= process_index < num_processes
    return [key for key in keys[process_index::num_processes] if lacks(key)]


def _each(work: Callable[[str], None], keys: Sequence[str], workers: int, progress: Progress | None) -> None:
    """`work` for every key, by this thread or by several others, reporting progress after each that is done.

    The first error is raised at once: the others may be waiting for an answer that never comes.
    """
    if workers == 1:  # models compute in the thread that loaded them
        for done, key in enumerate(keys, start=1):
            work(key)
            if progress is not None:
                progress(done, len(keys))
        return
    pool = ThreadPoolExecutor(workers)
    try:
        for done, future in enumerate(as_completed([pool.submit(work, key) for key in keys]), start=1):
            future.result()
            if progress is not None:
                progress(done, len(keys))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _check_finite(tensor: Tensor, what: str) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{what} has NaN or infinite values, not stored: run the encoder in bfloat16 or float32")
