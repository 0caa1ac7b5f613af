"""The data of a run: its samples, the cache filled with what training reads of them, the split, and the loader."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from data.cache import Cache, MemoryCache
from data.cache.prepared import CachedDataset
from data.loader import Loader
from data.sources import Source
from train.checkpoints import checkpoint
from train.checkpoints.data_manifest import TrainedData
from train.checkpoints.resume import RunLocation
from train.config.run_config import RunConfig
from train.encoding.prepare import CacheRequest, prepare
from train.objective.objective import Objective
from train.objective.prior import ClassPictures
from train.stages.class_data import class_loader, drawn_classes, given_classes, manifest_of_classes
from train.sweeps.reuse import SHARED
from train.utils.network import is_offline
from train.validation.loss import FixedNoiseLoss, chosen_samples

# a later job of a sweep reuses the data of the job before if these are equal
DATA_GROUPS = ("model", "dataset", "text_encoder", "buckets", "sample", "preservation")
DATA_KEYS = ("cache_dir", "embedding_storage", "reference_resolution", "device")


@dataclass(frozen=True)
class PreparedData:
    """The samples of a run with their cache entries, and those of the class images, if there are any."""

    samples: Source
    cached: CachedDataset
    classes: tuple[Source, CachedDataset] | None = None

    @property
    def first_caption(self) -> str:
        return next((sample.caption for sample in self.samples if sample.caption), "")


@dataclass(frozen=True)
class TrainingData:
    """What one run trains and validates on.

    Attributes:
        prepared: All samples of the dataset.
        names: The name of each training sample, by the index that the loader gives it.
        manifest: Identifies the training samples by content, so that a resumed run notices others.
        loader: Gives this process's micro-batches of a step.
        prior: Likewise those of the class images; None without them.
        validator: The loss at fixed noise; None if no sample is validated.
    """

    prepared: PreparedData
    names: list[str]
    manifest: TrainedData
    loader: Loader
    prior: ClassPictures | None
    validator: FixedNoiseLoss | None

    def check_unchanged(self, config: RunConfig, location: RunLocation) -> None:
        """Raise ValueError if a resumed run would train on other samples than before, unless that is allowed."""
        if location.checkpoint is None:
            return
        changed = self.manifest.difference(location.origin, checkpoint.state(location.checkpoint).get("data", ""))
        if changed and not config.settings.allow_changed_data:
            raise ValueError(
                f"the samples are not those that {location.checkpoint} was trained on: {changed}. Give those again, "
                "start a new run, or go on with these: allow_changed_data=true"
            )
        if changed:
            config.say(f"resuming with other samples: {changed}")


def paths(dataset: Mapping[str, Any]) -> list[object]:
    """Return where the images are: a dataset's `path`, and those of the datasets that it mixes."""
    return [
        dataset.get("path"),
        *(path for source in (dataset.get("sources") or {}).values() for path in paths(source)),
    ]


def cache_request(config: RunConfig, samples: Source | None = None) -> CacheRequest:
    """Return what is to be cached of `samples`, by default those of the configuration."""
    cache = config.settings.cache_dir
    if cache is not None and Path(cache).expanduser().exists() and not Path(cache).expanduser().is_dir():
        raise ValueError(f"cache_dir={cache!r} is not a folder: give another")
    source = config.source
    if is_offline([*paths(config.config["dataset"]), source.path, source.autoencoder, source.text_encoder]):
        config.say(f"{constants.ENDPOINT} cannot be reached: going on with what was downloaded before")
    return CacheRequest(
        source,
        config.text_encoder,
        MemoryCache() if cache is None else Cache(cache),
        config.instantiate("dataset") if samples is None else samples,
        [*config.sample.prompts, *(config.prior or config.preservation).prompts],
        config.buckets,
        config.settings.reference_resolution**2,
        config.precision.dtype,
        config.settings.embedding_storage,
        before_loading=SHARED.free,  # what the previous job of a sweep left in memory
    )


def prepare_samples(config: RunConfig) -> PreparedData:
    """Fill the cache with all that training reads, class images included."""
    request, given = cache_request(config), given_classes(config)
    captions = [caption for sample in given or [] for caption in sample.captions]  # all are encoded in one pass
    cached = prepare(config.accelerator, replace(request, prompts=[*request.prompts, *captions]))
    if config.prior is None:
        return PreparedData(request.samples, cached)
    source = drawn_classes(config, cached) if given is None else given
    config.say(f"class pictures: {len(source)} of {source.where}")
    others = replace(request, samples=source, prompts=[], table="Buckets of the class pictures")
    return PreparedData(request.samples, cached, (source, prepare(config.accelerator, others)))


def prepare_data(config: RunConfig) -> TrainingData:
    """Prepare the samples, or take them over from the previous job of a sweep, and split them."""
    key = [config.precision.dtype, *(config.config[name] for name in (*DATA_GROUPS, *DATA_KEYS))]
    prepared: PreparedData = SHARED.take("data", key, lambda: prepare_samples(config), config.say, "prepared data")
    samples, cached, settings = prepared.samples, prepared.cached, config.settings
    training, held_out = config.validation.split(cached.contents)
    every_caption, every_weight = ([getattr(one, key) for one in samples] for key in ("captions", "weight"))
    captions, weights = ([every[i] for i in training] for every in (every_caption, every_weight))
    names, entries = [samples[i].name for i in training], [cached.entries[i] for i in training]
    manifest = TrainedData.from_samples(names, entries, captions, weights).followed_by(
        manifest_of_classes(prepared.classes)
    )
    shards = {
        "gradient_accumulation": settings.gradient_accumulation,
        "num_processes": config.accelerator.num_processes,
        "process_index": config.accelerator.process_index,
    }
    loader = Loader(
        cached.cache,
        entries,
        captions,
        cached.prompts,
        batch_size=settings.batch_size,
        **shards,
        seed=settings.seed,
        weights=weights,
        caption_dropout=settings.caption_dropout,
        reference_dropout=settings.reference_dropout,
    )
    chosen = chosen_samples(samples, cached, held_out)
    noise = config.validation.seed, config.validation.times
    validator = FixedNoiseLoss(cached, chosen, *noise, config.processes.map, settings.batch_size) if chosen else None
    return TrainingData(prepared, names, manifest, loader, class_loader(config, prepared.classes, **shards), validator)


def make_objective(config: RunConfig, data: TrainingData) -> Objective:
    """Return the loss of a run, with the embeddings of the prompts that it preserves."""
    prompts = list(config.preservation.prompts) if config.preservation.active else []
    return Objective(
        config.settings.seed,
        config.timesteps,
        config.weighting,
        config.preservation,
        dict(zip(prompts, data.prepared.cached.embeddings(prompts), strict=True)) if prompts else {},
        data.prior,
        config.guidance,
        config.autocast,
    )
