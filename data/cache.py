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
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from data.buckets import FIT_VERSION, PIXELS_PER_LATENT, Buckets, Size, fit, fit_reference, reference_size
from data.samples import Picture, Sample

LATENT_CHANNELS = 128
Progress = Callable[[int, int], None]  # (entries done, entries to do), by this process


class Cache:
    """A folder of tensors, one safetensors file an entry at `folder/ab/abcdef....safetensors`.

    Files appear whole or not at all, so processes may share a folder and be killed at any time; what a killed one was
    writing is left as a `.tmp`, never read.
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

    @property
    def missing(self) -> int:
        """How many entries are not in the cache now."""
        return sum(key not in self.cache for key in self.work)

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
        for key in _share(self.cache, list(self.work), process_index, num_processes, progress):
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
        """How many entries are not in the cache now."""
        return sum(key not in self.cache for key in self.keys.values())

    def fill(
        self,
        encode: Callable[[list[str]], Tensor],
        process_index: int = 0,
        num_processes: int = 1,
        progress: Progress | None = None,
    ) -> None:
        """Computes this process's share of the missing entries, storing each as soon as it is there.

        `encode` takes one prompt, in a list, and returns (1, L, D), any float dtype and device. Stored as "embeddings",
        (L, D). Raises ValueError, naming the prompt, if it is not finite.
        """
        prompts = {key: prompt for prompt, key in self.keys.items()}
        for key in _share(self.cache, list(prompts), process_index, num_processes, progress):
            embeddings = encode([prompts[key]])
            shape = tuple(embeddings.shape)
            assert len(shape) == 3, f"encode returned {shape}, not (1, L, D)"
            assert shape[0] == 1, f"encode returned {shape} for one prompt"
            _check_finite(embeddings, f"the text encoder's embedding of prompt {prompts[key]!r}")
            self.cache.put(key, {"embeddings": embeddings[0]}, {"prompt": prompts[key]})


def plan_latents(
    cache: Cache, samples: Sequence[Sample], buckets: Buckets, encoder_id: str, reference_max_pixels: int
) -> LatentPlan:
    """Finds the bucket and key of every picture; reads headers and hashes contents, decodes nothing.

    `encoder_id` is a fingerprint of the autoencoder's weights and dtype. References keep their shape, up to
    `reference_max_pixels` each. Raises ValueError, naming the picture, for one whose header cannot be read.
    """
    work: dict[str, tuple[Picture, Callable[[Image.Image], Image.Image]]] = {}

    def key(picture: Picture, size: Size, is_reference: bool) -> str:
        recipe = {"picture": picture.digest(), "size": size, "fit": FIT_VERSION, "encoder": encoder_id}
        found = cache.key("latents", reference=is_reference, **recipe)
        cut = partial(fit_reference, max_pixels=reference_max_pixels) if is_reference else partial(fit, size=size)
        work.setdefault(found, (picture, cut))
        return found

    entries = []
    for sample in samples:
        size = buckets.assign(*sample.target.size)
        reference_sizes = tuple(reference_size(*picture.size, reference_max_pixels) for picture in sample.references)
        pairs = zip(sample.references, reference_sizes, strict=True)
        reference_keys = tuple(key(picture, cap, is_reference=True) for picture, cap in pairs)
        target_key = key(sample.target, size, is_reference=False)
        entries.append(LatentEntry(size, target_key, reference_sizes, reference_keys))
    return LatentPlan(cache, tuple(entries), work)


def plan_embeddings(cache: Cache, prompts: Sequence[str], encoder_id: str) -> EmbeddingPlan:
    """Finds the key of every distinct prompt.

    `encoder_id` is a fingerprint of all else that shapes an embedding: weights, dtype, template, length, layers read.
    """
    keys = {prompt: cache.key("embeddings", prompt=prompt, encoder=encoder_id) for prompt in prompts}
    return EmbeddingPlan(cache, keys)


def _share(
    cache: Cache, keys: Sequence[str], process_index: int, num_processes: int, progress: Progress | None
) -> Iterator[str]:
    """The missing keys that this process is to fill, reporting progress after each.

    Every n-th of *all* keys, not of the missing ones: another process may have begun to fill before this one looks, and
    shares of two different lists would leave entries that nobody computes.
    """
    assert 0 <= process_index < num_processes
    missing = [key for key in keys[process_index::num_processes] if key not in cache]
    for done, key in enumerate(missing, start=1):
        yield key
        if progress is not None:
            progress(done, len(missing))


def _check_finite(tensor: Tensor, what: str) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{what} has NaN or infinite values, not stored: run the encoder in bfloat16 or float32")
