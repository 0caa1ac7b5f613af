"""Predict what a run writes to disk: entries of the cache, quantized copies of models, checkpoints.

Sizes follow from shapes. Equal images are counted for each name that they have, so a prediction is rather too large.
Sample grids, the report and what is downloaded are not counted.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from data.buckets import Buckets, Size, reference_size
from data.cache.embeddings import embedding_bytes
from data.cache.latents import latent_shape, mask_shape
from data.files import user_path
from data.sources import Sample
from data.sources.images import BadPicture
from flux2.adapters.files import PEFT_ALONE
from flux2.adapters.tuners import adapter_layers, kind_of
from flux2.utils.text import gigabytes
from train.config.run_config import RunConfig
from train.planner.predictor import Planner
from train.planner.workload import frozen
from train.utils.text import many

HEADER = 250  # bytes of an entry's header, without the name of its image or its prompt
LEAST = 5e4  # bytes of a file whose size is said
TENSOR, SAVED = 150, 270  # bytes that safetensors and torch.save add for each tensor, its name and padding included
COPIED = 330  # bytes for each tensor of a quantized copy, its checksum included
SHARED = "attn.qkv"  # layers of double blocks that diffusers has in three
STATES = 3  # tensors in the state of a parameter: two moments and a step
ADAPTER_FILES, CHECKPOINT_FILES = 2300, 3800  # bytes of an adapter's README and settings; of config.yaml and state.json
MOST_SIZES = 2000  # samples whose images are asked for their size; of more, as many at equal distances


@dataclass(frozen=True)
class Written:
    """Files of one kind that a run writes."""

    kind: str  # in the singular
    count: int
    size: float  # bytes of all of them
    folder: Path

    def __str__(self) -> str:
        size = f"{gigabytes(self.size / self.count)} each" if self.count > 1 else gigabytes(self.size)
        return f"{many(self.count, self.kind)}{f' of {size}' if self.size >= LEAST * self.count else ''}"


def latent_bytes(
    samples: Sequence[Sample], buckets: Buckets, reference_pixels: int, most: int = MOST_SIZES
) -> tuple[int, float]:
    """Return the number of cache entries of the samples' images, masks and references, and their bytes.

    The headers of at most `most` samples' images are read; what is unreadable or too small is left out, as in training.
    """
    every = max(1, -(-len(samples) // most))
    sizes: dict[object, int] = {}
    for sample in samples[::every]:
        try:
            sizes |= entries_of(sample, buckets, reference_pixels)
        except BadPicture:
            continue
    return len(sizes) * every, float(sum(sizes.values()) * every)


def entries_of(sample: Sample, buckets: Buckets, reference_pixels: int) -> dict[object, int]:
    """Return the bytes of the cache entries of a sample by what distinguishes them (data/cache/latents.py)."""
    original = sample.target.size
    if (size := buckets.assign(*original, sample.resolution)) is None:
        return {}
    cuts = set(buckets.cuts(original, size, sample.target.name))  # drawn otherwise, and as many
    if sample.references:  # which have the center alone
        cuts = {type(cut)(mirrored=cut.mirrored) for cut in cuts}
    images = [(sample.target, size), *((one, size) for one in (sample.rejected,) if one is not None)]
    images += [(one, reference_size(*one.size, reference_pixels)) for one in sample.references]
    found: dict[object, int] = {}
    for cut in cuts:
        for image, at in images:
            found[image.name, at, cut] = latent_entry(at, image.name)
        if sample.mask is not None:
            found["mask", sample.mask.name, size, cut.of_mask] = prod(mask_shape(size)) + HEADER
    return found


def latent_entry(size: Size, name: str = "") -> int:
    """Return the bytes of the entry of an image, whose latents are stored in float32."""
    return 4 * prod(latent_shape(size)) + HEADER + len(name.encode())


def prompt_entry(planner: Planner, storage: str, prompt: str = "") -> int:
    """Return the bytes of the entry of a prompt, with `storage` as in `embedding_storage`."""
    config = planner.job.model.config
    width = config.hidden if storage.startswith("projected") else config.text_width
    stored = embedding_bytes(planner.job.text_tokens, width, planner.job.dtype, storage.endswith("fp8"))
    return stored + HEADER + len(prompt.encode())


def checkpoint_bytes(planner: Planner) -> tuple[float, float]:
    """Return the bytes of (an adapter's folder, the rest of a checkpoint)."""
    model, kept, parameters = planner.job.model, planner.adapter, dict(planner.job.model.named_parameters())
    trained = {name: one for name, one in parameters.items() if one.requires_grad}
    kinds = {kind_of(layer) for layer in adapter_layers(model).values()}
    files = kept["adapter"] + TENSOR * len(trained)
    if not kinds & set(PEFT_ALONE):  # diffusers.safetensors as well, with a copy of what query, key and value share
        shared = sum(one.nbytes for name, one in trained.items() if SHARED in name and "lora_A" in name)
        files += files + 2 * shared
    averages = kept["its average"] + planner.swapped_of(planner.whole)
    tensors = STATES * len(trained) + len(trained) * ((kept["its average"] > 0) + (averages > 0))
    return files + ADAPTER_FILES, kept["optimizer"] + averages + SAVED * tensors + CHECKPOINT_FILES


def checkpoints_at_once(run: RunConfig) -> int:
    """Return the most checkpoints that a run has at a time: those that it keeps, and the one that it writes."""
    settings, kept = run.settings, run.settings.rotation
    if not settings.checkpoint_every:
        return 0
    all_of_them = -(-settings.steps // settings.checkpoint_every)
    if kept.last is None:
        return all_of_them
    return min(all_of_them, kept.last + kept.best + (settings.steps // kept.every if kept.every else 0) + 1)


def copy_bytes(run: RunConfig, planner: Planner) -> int:
    """Return the bytes of the quantized copies of the models of a run."""
    if planner.job.storage is None or run.copies is None:
        return 0
    models = 1 + (run.twin is not None and run.draws_samples)
    headers = COPIED * len(frozen(planner.job.model))
    return models * (sum(planner.weights) + sum(planner.outside.values()) + headers)


def written(
    run: RunConfig, planner: Planner, samples: Sequence[Sample] | None, prompts: Iterable[str]
) -> Iterator[Written]:
    """Yield what a run writes, without what its cache has already.

    Args:
        samples: All samples and class images; None if they are not on this machine, which then counts one.
        prompts: All distinct prompts, captions included.
    """
    settings = run.settings
    if settings.cache_dir is not None:
        folder = user_path(settings.cache_dir)
        texts = list(prompts)
        count, size = 1, float(latent_entry((run.buckets.largest,) * 2))
        if samples is not None:
            count, size = latent_bytes(samples, run.buckets, settings.reference_resolution**2)
        if run.prior is not None and run.prior.draws:
            count += run.prior.count
            size += run.prior.count * latent_entry(run.class_image_size)
        yield Written(
            "prompt", len(texts), sum(prompt_entry(planner, settings.embedding_storage, t) for t in texts), folder
        )
        yield Written("image", count, size, folder)
    if copy := copy_bytes(run, planner):
        assert run.copies is not None
        yield Written("quantized copy", 1, copy, run.copies)
    adapter, state = checkpoint_bytes(planner)
    folder = user_path(settings.output_dir or "outputs")
    yield Written("adapter", 1, adapter, folder)
    if kept := checkpoints_at_once(run):
        yield Written("checkpoint", kept, kept * (adapter + state), folder)


def free_space(folder: Path) -> tuple[int, int]:
    """Return the number of the disk that a folder is or will be on, and its free bytes."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    return there.stat().st_dev, shutil.disk_usage(there).free


def too_full(parts: Iterable[Written]) -> str:
    """Return a sentence about the disks that have no room for `parts`; empty if all have."""
    needed: dict[int, float] = {}
    free: dict[int, int] = {}
    folders: dict[int, str] = {}
    for part in parts:
        disk, room = free_space(part.folder)
        needed[disk], free[disk] = needed.get(disk, 0) + part.size, room
        folders.setdefault(disk, str(part.folder))
    short: Mapping[int, float] = {disk: size for disk, size in needed.items() if size > free[disk]}
    said = [f"{folders[disk]} has {gigabytes(free[disk])} free for {gigabytes(short[disk])}" for disk in short]
    remedy = "Make room, or set another cache_dir or output_dir, embedding_storage=fp8, or keep_last."
    return f"The disk may be too small: {'; '.join(said)}, unless it is cached already. {remedy}" if said else ""
