"""The data of a run: its samples, the filled cache, the validation split and the loader."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache as memoized
from pathlib import Path
from typing import Any, cast

from huggingface_hub import constants

from data.buckets import Size
from data.cache import Cache, MemoryCache
from data.cache.image_digests import Digests
from data.cache.prepared import CachedDataset
from data.files import user_path
from data.loader import Loader
from data.sources import Sample, Source
from data.sources.images import FileOpener, Picture
from flux2.utils.text import listed
from flux2.weights.sources import fingerprint
from train.checkpoints.checkpoint import read_state
from train.checkpoints.data_manifest import TrainedData
from train.checkpoints.resume import RunLocation
from train.config.run_config import RunConfig
from train.encoding.prepare import PICTURES, CacheRequest, missing_prompts, prepare
from train.objective.loss import MSE
from train.objective.objective import Objective, check_pairs
from train.objective.prior import ClassPictures
from train.objective.target import Flow
from train.stages.class_data import batch_of, class_dataset, class_loader, draw_class_images, make_loader
from train.sweeps.reuse import SHARED
from train.utils.console import phase
from train.utils.network import is_offline
from train.utils.text import many
from train.validation.loss import FixedNoiseLoss, chosen_samples

# a sweep job reuses the data of the previous job if these settings are equal
DATA_GROUPS = ("model", "dataset", "text_encoder", "buckets", "sample", "preservation", "target")
DATA_KEYS = ("cache_dir", "embedding_storage", "reference_resolution", "device")


@dataclass(frozen=True)
class PreparedData:
    """The samples of a run and the class images, if there are any, with their cache entries."""

    samples: Source
    cached: CachedDataset
    classes: tuple[Source, CachedDataset] | None = None

    @property
    def example(self) -> tuple[str, list[str]]:
        """The caption of the first sample that has one, and the files of what it edits."""
        found = first_captions(self.samples, 1)
        return found[0] if found else ("", [])


@dataclass(frozen=True)
class TrainingData:
    """The data that one run trains and validates on."""

    prepared: PreparedData  # all samples of the dataset
    samples: Sequence[Sample]  # that are trained, in the order of the loader's indices
    names: Sequence[str]  # of these samples
    manifest: TrainedData  # content digests of the training samples, so that a resumed run detects changes
    models: Mapping[str, str]  # digests of the models that are trained on, likewise
    loader: Loader  # of this process's micro-batches
    prior: ClassPictures | None  # class images and their loader
    validator: FixedNoiseLoss | None  # None without validation samples

    def check_unchanged(self, config: RunConfig, location: RunLocation) -> None:
        """Raise ValueError if a resumed run would train on other samples or models without allow_changed_data=true."""
        if location.checkpoint is None:
            return
        state = read_state(location.checkpoint)
        before = state["models"] if isinstance(state.get("models"), Mapping) else {}  # older versions kept none
        others = [what for what, digest in self.models.items() if before.get(what, digest) != digest]
        changes = {"samples": self.manifest.difference(location.origin, state.get("data", ""))}
        changes |= {"models": f"{' and '.join(others)} of model={config.variant.name} changed" if others else None}
        for what, changed in changes.items():
            if changed and not config.settings.allow_changed_data:
                raise ValueError(
                    f"the {what} differ from those that {location.checkpoint} was trained on: {changed}. Restore those "
                    f"{what}, start a new run, or set allow_changed_data=true."
                )
            if changed:
                config.say(f"resuming with changed {what}: {changed}")

    @property
    def shapes(self) -> int:
        """The number of token shapes in training, at most."""
        entries, prior = self.prepared.cached.entries, self.prepared.classes
        shapes = {entry.bucket for entry in (*entries, *(prior[1].entries if prior else ()))}
        return len(shapes | {(size, ()) for size, _ in shapes})  # references may be dropped

    @property
    def state(self) -> dict[str, Any]:
        """What `check_unchanged` compares, for the checkpoints."""
        return {"data": self.manifest.digest, "models": dict(self.models)}


def first_captions(samples: Iterable[Sample], count: int) -> list[tuple[str, list[str]]]:
    """Return the first different captions of a dataset, each with the files of what it edits; `""` for one in a table.

    At most `count` are returned.
    """

    def file(picture: Picture) -> str:
        source = picture.open
        return source.path if isinstance(source, FileOpener) and source.length is None else ""

    found: dict[str, list[str]] = {}
    for sample in samples:
        if len(found) == count:
            break
        if sample.caption and sample.caption not in found:
            found[sample.caption] = [file(picture) for picture in sample.references]
    return list(found.items())


def sample_captions(config: RunConfig, samples: Iterable[Sample], count: int | None = None) -> RunConfig:
    """Return the configuration with the first captions as the sample prompts, if it has none.

    `count` is `sample.captions` by default. Captions that edit images without a file of their own are left out.
    """
    if config.sample.prompts:
        return config
    found = first_captions(samples, config.sample.captions if count is None else count)
    usable = [(caption, files) for caption, files in found if all(files)]
    return config.with_prompts([caption for caption, _ in usable], [files for _, files in usable])


def announce_start(config: RunConfig, folder: Path, data: TrainingData, parameters: int) -> RunConfig:
    """Say what is trained, and return what `announce_samples` returns."""
    config.say(
        f"{many(len(data.names), 'sample')}, {parameters:,} trained parameters, "
        f"{many(config.settings.steps, 'step')} in {folder}"
    )
    return announce_samples(config, data.prepared.samples)


def announce_samples(config: RunConfig, samples: Iterable[Sample]) -> RunConfig:
    """Return what `sample_captions` returns, and say what is drawn and how to change that."""
    if config.sample.prompts or not config.draws_samples:
        return config
    chosen = sample_captions(config, samples)
    if not (count := len(chosen.sample.prompts)):
        config.say("no sample grids: there is no caption to draw. Set sample.prompts, for edits with sample.references")
        return config
    drawn = many(count * len(chosen.sample.scales), "image")
    config.say(
        f"sample grids: {drawn} of {'the first caption' if count == 1 else f'the first {count} captions'} before "
        f"training, every {config.settings.sample_every} steps and at the end. Set sample.prompts for others, or "
        "sample.captions=0 for none"
    )
    return chosen


def paths(dataset: object) -> list[object]:
    """Return the `path` of a dataset and of the datasets that it mixes; what is none is refused when it is made."""
    if not isinstance(dataset, Mapping):
        return []
    mixed = dataset.get("sources")
    sources = mixed.values() if isinstance(mixed, Mapping) else ()
    return [dataset.get("path"), *(path for source in sources for path in paths(source))]


def extra_prompts(config: RunConfig, samples: Sequence[Sample]) -> list[str]:
    """Return the prompts that a run encodes in addition to the captions and the empty one."""

    def captions() -> Iterator[str]:
        return (caption for sample in samples for caption in sample.captions)

    preserved = config.preservation.all_prompts(captions()) if config.prior is None else config.prior.prompts
    return [*config.sample.prompts, *preserved, *config.target.all_prompts(captions())]


def cache_request(config: RunConfig, samples: Source | None = None) -> CacheRequest:
    """Return what to cache for `samples`; the default is the configuration's dataset."""
    cache = config.settings.cache_dir
    if cache is not None and (folder := user_path(cache)).exists() and not folder.is_dir():
        raise ValueError(f"cache_dir={cache!r} is not a folder. Set another one.")
    source = config.source
    if is_offline([*paths(config.composed["dataset"]), source.path, source.autoencoder, source.text_encoder]):
        config.say(f"{constants.ENDPOINT} cannot be reached: using downloaded files only")
    store = MemoryCache() if cache is None else Cache(cache)
    digests = Digests(store.folder / PICTURES if store.shared else None, writes=config.accelerator.is_main_process)
    if samples is None:
        with digests.in_use():
            samples = config.instantiate("dataset")
        if config.buckets.each_resolution:
            samples.repeat_at(config.buckets.filled)

    return CacheRequest(
        source,
        config.text_encoder,
        store,
        samples,
        extra_prompts(config, samples),
        config.buckets,
        config.settings.reference_resolution**2,
        config.precision.dtype,
        config.settings.embedding_storage,
        before_loading=SHARED.free,  # models that the previous sweep job left in memory
        digests=digests,
    )


def with_captions(request: CacheRequest, classes: Source | None) -> CacheRequest:
    """Return the request with the captions of class images, which are encoded in the same pass."""
    captions = [caption for sample in classes or [] for caption in sample.captions]
    return replace(request, prompts=[*request.prompts, *captions])


def embedding_check(config: RunConfig) -> Callable[[str | None], bool]:
    """Return a function that tells whether the cache has all prompts, as a text encoder of a `storage` encodes them.

    A run then loads no text encoder. The samples are read when the function is called, once.
    """

    @memoized
    def request() -> CacheRequest:
        found = cache_request(config)
        found.digests.close()
        return with_captions(found, class_dataset(config))

    @memoized
    def has_all(storage: str | None) -> bool:
        encoder = config.with_text_encoder({"storage": storage}).text_encoder
        return config.settings.cache_dir is not None and not missing_prompts(replace(request(), text_encoder=encoder))

    return has_all


def prepare_samples(config: RunConfig, share: tuple[int, int] = (0, 1)) -> PreparedData:
    """Fill the cache for training, including class images, or a share of it: every n-th entry, as (i, n)."""
    request, classes = replace(cache_request(config), share=share), class_dataset(config)
    check_pairs(config.loss, config.target, request.samples)
    check_pairs(MSE(), Flow(), classes or [])
    cached = prepare(config.accelerator, with_captions(request, classes))
    if config.prior is None:
        request.digests.close()
        return PreparedData(request.samples, cached)
    source = draw_class_images(config, cached) if classes is None else classes
    config.say(f"class images: {len(source)} from {source.where}")
    class_request = replace(request, samples=source, prompts=[], table="Buckets of the class images")
    cached_classes = prepare(config.accelerator, class_request)
    request.digests.close()
    return PreparedData(request.samples, cached, (source, cached_classes))


@phase("data")
def prepare_data(config: RunConfig) -> TrainingData:
    """Prepare the samples, or reuse those of the previous sweep job, and split them."""
    key = [config.precision.dtype, *(config.composed[name] for name in (*DATA_GROUPS, *DATA_KEYS))]
    prepared: PreparedData = SHARED.take("data", key, lambda: prepare_samples(config), config.say, "prepared data")
    cached, settings = prepared.cached, config.settings
    check_pairs(config.loss, config.target, prepared.samples)  # of a job before, with another loss
    training, held_out = config.validation.split(cached.contents, cached.references, cached.pixels)
    if config.validation.held_out and len(held_out) > config.validation.held_out:
        config.say(
            f"{len(held_out)} samples are held out instead of {config.validation.held_out}: samples of one image, and "
            "edits of an image that is held out, are not trained either"
        )
    samples, entries = [prepared.samples[i] for i in training], [cached.entries[i] for i in training]
    all_samples, all_entries = samples, entries
    if prepared.classes is not None:
        all_samples, all_entries = [*samples, *prepared.classes[0]], [*entries, *prepared.classes[1].entries]
    config.loss.check_masks(any(entry.mask_key for entry in all_entries))
    manifest = TrainedData.from_samples(all_samples, all_entries)
    # The key of an embedding also identifies the text encoder, wherever that is, and the dtype, which another device
    # may change: only keys of one dtype are compared.
    encoder = f"the text encoder in {str(config.precision.dtype).removeprefix('torch.')}"
    models = {"the transformer": fingerprint(config.source, "transformer"), encoder: cached.prompts[""]}
    loader, prior = make_loaders(config, prepared, training, config.accelerator.num_processes)
    for reader, what in ((loader, "samples"), *([(prior.loader, "class images")] if prior else [])):
        if note := repeats(reader, what):
            config.say(note)
    chosen = chosen_samples(prepared.samples, cached, held_out, both_ends=config.target.uses_pairs)
    noise = config.validation.seed, config.validation.times
    validator = FixedNoiseLoss(cached, chosen, *noise, config.processes.map, settings.batch_size) if chosen else None
    names = manifest.names[: len(samples)]
    return TrainingData(prepared, samples, names, manifest, models, loader, prior, validator)


def make_loaders(
    config: RunConfig, prepared: PreparedData, training: Sequence[int], processes: int
) -> tuple[Loader, ClassPictures | None]:
    """Return this process's loaders of the samples with the indices `training`, and of the class images, if any."""
    settings, cached = config.settings, prepared.cached
    shards = {
        "gradient_accumulation": settings.gradient_accumulation,
        "num_processes": processes,
        "process_index": config.accelerator.process_index,
    }
    used = ("batch_size", "seed", "caption_dropout", "reference_dropout")
    given = {key: getattr(settings, key) for key in used} | {"batch_of": batch_of(config, settings.batch_size)}
    samples, entries = [prepared.samples[i] for i in training], [cached.entries[i] for i in training]
    loader = make_loader(samples, entries, cached, **shards, **given)
    return loader, class_loader(config, prepared.classes, **shards)


def repeats(loader: Loader, what: str) -> str | None:
    """Return a line about buckets with fewer samples than a step has, which trains some of them several times."""
    if not (small := loader.sampler.small):
        return None
    sizes = listed(
        [f"{width} x {height}: {count}" for (width, height), count in cast(dict[Size, int], small).items()], 5
    )
    return (
        f"a step trains {loader.sampler.global_batch} {what} of one size; those of {many(len(small), 'bucket')} with "
        f"fewer ({sizes}) are repeated within a step. A lower batch_size or a larger buckets.step avoids that"
    )


def make_objective(config: RunConfig, data: TrainingData) -> Objective:
    """Return the training objective."""
    settings = config.timesteps, config.loss, config.weighting, config.preservation
    return Objective(config.settings.seed, *settings, data.prior, config.target, config.guidance, config.autocast)
