"""Train a LoRA: `accelerate launch train/run.py +experiment=tarot [key=value ...]`, or with plain `python`.

Hydra composes the configuration from conf/, train/configured.py checks it, and this file loads what it names and hands
it to train/loop.py. Missing cache entries are computed first, each encoder loaded only if it is needed and freed before
the next model.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if __name__ == "__main__":  # a script's own folder comes first in sys.path, and ours would hide libraries
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    if os.environ.get("RANK", "0") == "0":
        print("loading libraries", file=sys.stderr, flush=True)

import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import broadcast_object_list
from huggingface_hub import constants
from omegaconf import DictConfig, OmegaConf
from torch import nn

from data.cache import Cache, MemoryCache
from data.loader import Loader
from data.samples import Source
from flux2.adapters import adapter_parameters
from flux2.model import Transformer
from flux2.offload import offload
from flux2.pipeline import reference_image, to_pixels
from flux2.precision import describe
from flux2.weights import load_autoencoder, load_transformer
from train import closing, folder, resume, sweep
from train.cache import Needs, Prepared, gigabytes, prepare
from train.choose import advice, choice_of, still_fits
from train.classes import class_data, class_loader, drawn_classes, given_classes
from train.command import command, own_errors
from train.configured import Configured
from train.ema import Shown
from train.loop import Training
from train.masking import masked
from train.optim import build
from train.outofmemory import OutOfMemory, watched
from train.processes import is_offline
from train.sharding import attached, check_processes, sharder, shares, whole_size
from train.shared import SHARED, Base, free_memory
from train.tracking import Metrics
from train.trained_data import TrainedData
from train.validate import FixedNoiseLoss, Sampler, chosen_samples
from train.wording import many

if TYPE_CHECKING:
    import peft


def paths(dataset: Mapping[str, Any]) -> list[object]:
    """Where the pictures are: a dataset's `path`, and those of the datasets that it mixes."""
    return [
        dataset.get("path"),
        *(path for source in (dataset.get("sources") or {}).values() for path in paths(source)),
    ]


class Run(Configured):
    """What becomes of a configuration: samples, models, and the training of an adapter."""

    def __init__(self, config: DictConfig) -> None:
        self._place: resume.Place | None = None
        self._lock: folder.Lock | None = None
        super().__init__(config)

    def place(self) -> resume.Place:
        """The run folder, chosen, made and held by the main process for all. The first call decides."""
        if self._place is not None:
            return self._place
        shared: list[Any] = [None]
        if self.accelerator.is_main_process:
            try:
                shared[0] = self.take_place()
            except ValueError as error:
                shared[0] = error
            except OSError as error:
                shared[0] = ValueError(f"the run folder: {error}")
        broadcast_object_list(shared)
        if isinstance(shared[0], ValueError):
            raise shared[0]
        self._place = shared[0]
        return shared[0]

    def take_place(self) -> resume.Place:
        """Choose the run folder, make it, and hold it to the end of the run; before that, whether it can be pushed."""
        self.hub.check()
        output = self.settings.output_dir
        if sweep.is_sweep():
            output = str(sweep.folder_of_job())
        fresh = Path(output or f"outputs/{self.settings.name}/{time.strftime('%Y-%m-%d_%H-%M-%S')}")
        given, chosen = self.settings.resume, output is not None
        while True:
            place = resume.find(
                given, fresh, masked(self.config), self.images_per_step, chosen=chosen, say=partial(print, flush=True)
            )
            if place == resume.Place(fresh) and not chosen:
                place = resume.Place(folder.make_new(fresh))
            try:
                folder.make_writable(place.folder, "output_dir" if chosen else "the run folder")
                self._lock = folder.Lock(place.folder)
            except folder.InUse:
                if chosen or given != "auto":
                    raise
                continue  # another took it since: look for one that is free
            return place

    def release(self) -> None:
        """Let go of the run folder."""
        if self._lock is not None:
            self._lock.release()

    def needs(self, samples: Source | None = None) -> Needs:
        """The samples, by default those of the configuration, and what is to be cached of them."""
        cache = self.settings.cache_dir
        if cache is not None and Path(cache).expanduser().exists() and not Path(cache).expanduser().is_dir():
            raise ValueError(f"cache_dir={cache!r} is not a folder: give another")
        if is_offline(
            [*paths(self.config["dataset"]), self.source.path, self.source.autoencoder, self.source.text_encoder]
        ):
            self.say(f"{constants.ENDPOINT} cannot be reached: going on with what was downloaded before")
        return Needs(
            self.source,
            self.text_encoder,
            MemoryCache() if cache is None else Cache(cache),
            self.instantiate("dataset") if samples is None else samples,
            [*self.sample.prompts, *self.preservation.prompts],
            self.buckets,
            self.settings.reference_resolution**2,
            self.precision.dtype,
            self.settings.embedding_storage,
            before_loading=SHARED.free,  # what a job before left
        )

    def prepare(self) -> tuple[Source, Prepared]:
        """The samples, and the cache filled with all that training reads, that of class pictures too."""
        needs, given = self.needs(), given_classes(self)
        captions = [caption for sample in given or [] for caption in sample.captions]  # all are encoded at once
        prepared = prepare(self.accelerator, replace(needs, prompts=[*needs.prompts, *captions]))
        if self.prior is not None:
            source = drawn_classes(self, prepared) if given is None else given
            self.say(f"class pictures: {len(source)} of {source.where}")
            others = replace(needs, samples=source, prompts=[], table="Buckets of the class pictures")
            self.classes = source, prepare(self.accelerator, others)
        return needs.samples, prepared

    def prepared(self) -> tuple[Source, Prepared]:
        """What `prepare` gives, or gave the job before in a sweep."""
        groups = ("model", "dataset", "text_encoder", "buckets", "sample", "preservation")
        keys = ("cache_dir", "embedding_storage", "reference_resolution", "device")
        key = [self.precision.dtype, *(self.config[name] for name in (*groups, *keys))]

        def prepare() -> tuple[Source, Prepared, tuple[Source, Prepared] | None]:
            return *self.prepare(), self.classes

        source, found, self.classes = SHARED.take("data", key, prepare, self.say, "prepared data")
        return source, found

    def sampler(self, prepared: Prepared) -> Sampler | None:
        """What makes the sample sheets, if any are asked for."""
        if not self.sample.prompts or not self.settings.sample_every:
            return None
        key = [self.source, str(self.accelerator.device)]
        autoencoder = SHARED.take(
            "autoencoder", key, lambda: load_autoencoder(self.source, self.accelerator.device), self.say
        )
        references, sizes = [], []
        for paths in self.sample.edits:
            files, limit = self.sampled(paths)
            pictures = [file.load() for file in files]
            pixels = [to_pixels([reference_image(picture, limit)]) for picture in pictures]
            with torch.no_grad():
                references.append([autoencoder.encode(one.to(self.accelerator.device)) for one in pixels])
            width, height = self.buckets.nearest(*(pictures[0].size if pictures else (1, 1)))
            sizes.append((self.sample.width or width, self.sample.height or height))
        text, empty = prepared.embeddings(self.sample.prompts), prepared.embeddings([""])
        return Sampler(self.sample, self.variant, autoencoder, text, empty, references, sizes, self.processes.map)

    def base(self) -> Base:
        """The transformer, loaded, or as the job before in a sweep left it."""
        device, memory = str(self.accelerator.device), {**self.config["memory"], "card_gb": None}
        stored = self.settings.embedding_storage.startswith("projected")
        key = [self.source, self.precision, device, memory, self.config["buckets"], stored, self.processes.sharded]
        return SHARED.take("transformer", key, self.load_base, self.say)

    def load_base(self) -> Base:
        device, sharded = self.accelerator.device, self.processes.sharded
        self.say(f"loading the transformer of {self.variant.name} ({self.precision.name}) onto {device}")
        transformer = load_transformer(
            self.source,
            device,
            self.precision,
            host=self.streamed,
            cache=self.copies,
            say=self.say,
            ready=sharder(device) if sharded else None,
        )
        self.say(describe(transformer, self.precision, device))
        if sharded:
            self.say(
                f"the base is sharded: each of {self.shares} processes keeps {gigabytes(shares(transformer))} of its "
                f"{gigabytes(whole_size(transformer))}, and gathers a block at a time to compute with it"
            )
        if self.settings.embedding_storage.startswith("projected"):
            transformer.txt_in = nn.Identity()  # it is applied in what is stored
        return Base(transformer, check=SHARED.keeps and not sharded)

    def attach(self, transformer: Transformer) -> peft.PeftModel:
        """The adapter around the loaded model."""
        if self.processes.sharded:
            return attached(self.make_adapter, transformer, seed=self.settings.seed)
        return self.make_adapter(transformer, seed=self.settings.seed)

    def stream(self, base: Base) -> None:
        """Let blocks and activations stream from host memory, if that is asked for."""
        if base.offloader is None:
            base.offloader = offload(
                base.transformer,
                self.memory.stream_blocks,
                activations=self.memory.offload_activations,
                device=self.accelerator.device,
            )
        else:
            base.offloader.go_on(base.transformer)
        if base.offloader is not None:
            self.say(str(base.offloader))

    def keep_memory(self, place: resume.Place) -> None:
        """Go on with what was chosen when the run began, if that fits here too and no other choice is asked for."""
        kept = place.before.get("memory", {})
        if kept != self.config["memory"] and still_fits(self, kept):
            self.set_memory(kept, f"memory as when the run began: {choice_of(kept)}")

    def check_data(self, place: resume.Place, data: TrainedData) -> None:
        """Raises ValueError if a run that goes on would train on other samples than it did, unless it may."""
        if place.checkpoint is None:
            return
        changed = data.difference(place.origin, resume.state(place.checkpoint).get("data", ""))
        if changed and not self.settings.allow_changed_data:
            raise ValueError(
                f"the samples are not those that {place.checkpoint} was trained on: {changed}. Give those again, start "
                "a new run, or go on with these: allow_changed_data=true"
            )
        if changed:
            self.say(f"going on with other samples: {changed}")

    def train(self) -> Path:
        """Prepare, train, and return the folder of the finished adapter."""
        if self.processes.sharded:
            check_processes(self.accelerator.num_processes)
        place = self.place()
        try:
            with SHARED.job(keeps=sweep.is_sweep()):
                return self.train_in(place)
        finally:
            self.release()

    def train_in(self, place: resume.Place) -> Path:
        """Prepare and train in a folder that is held."""
        settings, accelerator = self.settings, self.accelerator
        if place.checkpoint is not None and self.memory.card_gb is not None:
            self.keep_memory(place)
        dataset, prepared = self.prepared()
        self.first_caption = next((sample.caption for sample in dataset if sample.caption), "")
        trained, validated = self.validation.split(prepared.contents)
        captions = [sample.captions for sample in dataset]
        weights = [sample.weight for sample in dataset]
        names = [dataset[i].name for i in trained]
        entries = [prepared.entries[i] for i in trained]
        data = TrainedData.of(names, entries, [captions[i] for i in trained], [weights[i] for i in trained])
        data = data.beside(class_data(self))
        self.check_data(place, data)

        self.say(
            f"{self.variant.name} ({self.precision.name}) on {accelerator.device}; "
            f"processes: {accelerator.num_processes}, CPU threads each: {torch.get_num_threads()}; "
            f"attention: {self.attention_backend()}"
        )
        loading = watched("while loading the transformer", "step", accelerator.device)
        with own_errors(accelerator.process_index), loading:
            base = self.base()
            self.memory.apply(base.transformer, accelerator.device, self.buckets)
            wrapped = self.attach(base.transformer)
            self.stream(base)
        optimizer = build(self.make_optimizer, adapter_parameters(wrapped))
        trainable = sum(parameter.numel() for parameter in adapter_parameters(wrapped))
        self.say(
            f"{many(len(trained), 'sample')}, {trainable:,} trained parameters, "
            f"{many(settings.steps, 'step')} in {place.folder}"
        )
        if place.checkpoint is not None:
            self.say(f"going on from {place.checkpoint}")

        metrics = Metrics(place.folder, self.tracker)

        def begin() -> None:  # only when the checkpoint was read is the folder changed
            text = OmegaConf.to_yaml(OmegaConf.create(masked(self.config)))
            folder.write_whole(place.folder / resume.CONFIG_FILE, text)
            data.write(place.folder)
            closing.note_command(self, place)
            metrics.start(settings.name, self.config, place.step)

        cut = {
            "gradient_accumulation": settings.gradient_accumulation,
            "num_processes": accelerator.num_processes,
            "process_index": accelerator.process_index,
        }
        loader = Loader(
            prepared.cache,
            entries,
            [captions[i] for i in trained],
            prepared.prompts,
            batch_size=settings.batch_size,
            **cut,
            seed=settings.seed,
            weights=[weights[i] for i in trained],
            caption_dropout=settings.caption_dropout,
            reference_dropout=settings.reference_dropout,
        )
        chosen = chosen_samples(dataset, prepared, validated)
        fixed = self.validation.seed, self.validation.times
        validate = FixedNoiseLoss(prepared, chosen, *fixed, self.processes.map, settings.batch_size)
        prompts = list(self.held.prompts) if self.held.active else []
        adapter = Training(
            settings=settings,
            processes=self.processes,
            variant=self.variant,
            base=self.variant.repo or self.variant.name,
            wrapped=wrapped,
            optimizer=optimizer,
            schedule=self.schedule,
            shown=Shown(adapter_parameters(wrapped), optimizer, settings.ema_decay),
            timesteps=self.timesteps,
            weighting=self.weighting,
            preservation=self.held,
            loader=loader,
            prior=class_loader(self, **cut),
            plain=dict(zip(prompts, prepared.embeddings(prompts), strict=True)) if prompts else {},
            place=place,
            metrics=metrics,
            begin=begin,
            names=names,
            about={"data": data.digest},
            sampler=self.sampler(prepared),
            validate=validate if chosen else None,
            autocast=torch.bfloat16 if self.precision.dtype == torch.bfloat16 else None,
        ).run()
        closing.write(self, place.folder, len(trained))
        if SHARED.keeps and (self.memory.compile or not base.take_off(wrapped)):
            SHARED.drop("transformer")  # compiled code is of its layers as they were
        return adapter


def main(config: DictConfig) -> float | None:
    """Train one configuration and say where everything is; returns the last validation loss, if there is one."""
    try:
        run = Run(config)
        sweep.check(run)
        if not sweep.is_done(run):
            train(run)
        return sweep.result(run)
    finally:
        free_memory()  # the next job of a sweep needs it


def train(run: Run) -> None:
    """Train, and say where everything is."""
    try:
        adapter = run.train()
    except OutOfMemory as error:
        with own_errors(run.accelerator.process_index):
            raise ValueError(f"{error.what} {advice(run, error)} {error.saved}".strip()) from None
    closing.announce(run, adapter)


if __name__ == "__main__":
    command(main)
