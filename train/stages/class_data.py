"""The class images of a run (train/objective/prior.py): their source, cache request and loader."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

from torch import nn

from data.buckets import Size
from data.cache.latents import LatentEntry
from data.cache.prepared import CachedDataset
from data.files import user_path
from data.loader import Loader
from data.sources import Sample, Source
from flux2.models.transformer import Transformer
from flux2.pipeline import Pipeline
from flux2.weights.loading import load_autoencoder
from flux2.weights.sources import fingerprint
from train.config.instantiate import instantiate
from train.config.run_config import RunConfig
from train.encoding.class_pictures import ClassImageRecipe, ClassPictureFolder, draw, picture_file
from train.encoding.prepare import CacheRequest
from train.objective.prior import ClassPictures
from train.planner.from_config import references_of
from train.planner.workload import tokens

TEXT_SHARE = 1.25  # memory of a text token, whose embedding is kept as well, relative to an image token; rounded up


def class_dataset(config: RunConfig) -> Source | None:
    """Return the dataset of class images; None if the base draws them or there are none."""
    if config.prior is None or config.prior.dataset is None:
        return None
    return cast(Source, instantiate("preservation.dataset", config.prior.dataset))


def class_recipe(config: RunConfig) -> ClassImageRecipe:
    """Return what determines the class images that the base draws."""
    assert config.prior is not None
    prior, variant, size = config.prior, config.variant, config.class_image_size
    weights = " ".join(fingerprint(config.source, part) for part in ("transformer", "vae"))
    sampling = prior.steps or variant.steps, float(variant.guidance if prior.guidance is None else prior.guidance)
    return ClassImageRecipe(weights, config.precision.name, tuple(prior.prompts), prior.seed, *size, *sampling)


def draw_class_images(config: RunConfig, prepared: CachedDataset) -> Source:
    """Return the class images of the base, drawing the missing ones. `prepared` has the embeddings of their prompts."""
    assert config.prior is not None
    prior, device = config.prior, config.accelerator.device
    precision = replace(config.precision, cache_transposed_weights=False)  # there is no backward

    def load() -> Transformer:
        if config.processes.sharded:
            raise ValueError(
                "preservation.prompts: a sharded base cannot draw class images. Draw them in a run with shard=false "
                "(and memory.offload_blocks=1.0 if they do not fit); later runs reuse them."
            )
        blocks, devices = config.memory.offload_blocks, config.module_devices
        pipe = Pipeline(config.source, device, precision, False, blocks, config.copies, devices=devices)
        transformer = pipe.transformer
        if config.settings.embedding_storage.startswith("projected"):
            transformer.txt_in = nn.Identity()  # stored embeddings are its output
        return transformer

    decoder = partial(load_autoencoder, config.source, device)
    folder = user_path(prior.folder)
    return draw(folder, class_recipe(config), prior.count, config.accelerator, prepared, load, decoder, config.say)


def class_cache_requests(config: RunConfig, request: CacheRequest) -> list[CacheRequest]:
    """Return the cache request of the class images, if they exist."""
    if config.prior is None:
        return []
    source = class_dataset(config)
    if source is None:
        recipe = class_recipe(config)
        folder = user_path(config.prior.folder) / recipe.name
        if not all(picture_file(folder, index).exists() for index in range(config.prior.count)):
            return []
        source = ClassPictureFolder(folder, recipe, config.prior.count)
    return [replace(request, samples=source, prompts=[])]


def make_loader(
    samples: Sequence[Sample], entries: Sequence[LatentEntry], cached: CachedDataset, **settings: Any
) -> Loader:
    """Return a loader of `samples` with their `entries`; `settings` are those of `data.loader.Loader`."""
    captions, weights = [sample.captions for sample in samples], [sample.weight for sample in samples]
    loss_weights = [sample.loss_weight for sample in samples]
    return Loader(
        cached.cache, entries, captions, cached.prompts, weights=weights, loss_weights=loss_weights, **settings
    )


def batch_of(config: RunConfig, batch_size: int) -> Callable[[tuple[Size, Sequence[Size]]], int] | None:
    """Return the function of `Loader.batch_of` for batch_by=tokens: `batch_size` at the largest resolution.

    So activations take as much memory in all buckets. None for batch_by=images.
    """
    if config.settings.batch_by == "images":
        return None
    text = TEXT_SHARE * (config.text_encoder.length or config.variant.text.length)

    def count(size: Size, references: Sequence[Size]) -> float:
        return text + sum(map(tokens, (size, *references)))

    side, limit = config.buckets.largest, config.settings.reference_resolution
    most = count((side, side), [(limit, limit)] * references_of(config.composed["dataset"]))
    return lambda shape: max(batch_size, int(batch_size * most / count(*shape)))


def class_loader(
    config: RunConfig, classes: tuple[Source, CachedDataset] | None, **shards: int
) -> ClassPictures | None:
    """Return the class images for training; `shards` splits a step into processes and micro-batches."""
    if config.prior is None or classes is None:
        return None
    source, cached = classes
    size = config.prior.images_per_batch(config.settings.batch_size)
    make = partial(
        make_loader, source, cached.entries, cached, batch_size=size, batch_of=batch_of(config, size), **shards
    )
    return ClassPictures(make, config.settings.seed, config.prior.weight, [sample.name for sample in source])
