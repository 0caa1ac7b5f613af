"""Train a LoRA: `accelerate launch train/run.py +experiment=tarot [key=value ...]`, or with plain `python`.

Hydra composes the configuration from conf/; this file turns it into objects and hands them to train/loop.py. Nothing
below it sees a configuration. Missing cache entries are computed first, each encoder loaded only if it is needed and
freed before the next model.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # a script's own folder comes first in sys.path, and ours would hide libraries
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import dataclasses
import difflib
import gc
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import hydra
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import broadcast_object_list
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from PIL import Image

from data.buckets import Buckets
from data.cache import Cache
from data.loader import Loader
from data.samples import Picture, Source
from flux2.checkpointing import set_policy
from flux2.pipeline import pick_device, pick_dtype, reference_image, to_pixels
from flux2.variants import Variant
from flux2.weights import ModelSource, load_autoencoder, load_transformer, model_source
from train import checkpoint
from train.cache import LocalTextEncoder, Prepared, prepare
from train.loop import Interrupted, LoopSettings, Training
from train.loss import Preservation, is_number
from train.optim import build
from train.tracking import Metrics
from train.validate import FixedNoiseLoss, Sampler, SampleSettings, ValidationSettings, check_count

CONFIG = "../conf"
GROUPS = (
    "model",
    "precision",
    "memory",
    "adapter",
    "dataset",
    "text_encoder",
    "optimizer",
    "schedule",
    "timesteps",
    "preservation",
    "tracker",
    "buckets",
    "validation",
    "sample",
)

if not OmegaConf.has_resolver("first"):
    OmegaConf.register_new_resolver("first", lambda *values: next(value for value in values if value is not None))


@dataclass(frozen=True)
class RunSettings(LoopSettings):
    """The keys of conf/train.yaml that are not in a group."""

    name: str = "default"
    batch_size: int = 4
    caption_dropout: float = 0.0
    reference_resolution: int = 1024
    resume: str | None = None
    output_dir: str | None = None
    cache_dir: str = "outputs/cache"
    device: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("batch_size", self.batch_size, 1)
        check_count("reference_resolution", self.reference_resolution, 16)
        if not is_number(self.caption_dropout, 0, 1):
            raise ValueError(f"caption_dropout={self.caption_dropout!r} must be a number from 0 to 1")
        for key in ("name", "resume", "output_dir", "cache_dir", "device"):
            value = getattr(self, key)
            if not isinstance(value, str) and not (value is None and key not in ("name", "cache_dir")):
                raise ValueError(f"{key}={value!r} must be a text")
        if not self.name or "/" in self.name:
            raise ValueError(f"name={self.name!r} must be a word without slashes: it becomes a folder")


def checked(where: str, given: Mapping[str, Any], accepted: Callable[..., Any]) -> Any:
    """`accepted(**given)` for a dataclass; a key that it does not have is an error that names the nearest ones."""
    known = [field.name for field in dataclasses.fields(accepted)]  # type: ignore[arg-type]
    prefix = f"{where}." if where else ""
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(key, known, 3)
            hint = f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(known)}"
            raise ValueError(f"{prefix}{key} is not a setting; {hint}")
    return accepted(**given)


@dataclass(frozen=True)
class ModelSettings:
    """The group `model`."""

    name: str
    path: str | None
    autoencoder: str | None
    text_encoder: str | None
    resolution: int

    def source(self) -> ModelSource:
        return model_source(self.name, self.path, self.autoencoder, self.text_encoder)


@dataclass(frozen=True)
class PrecisionSettings:
    """The group `precision`."""

    dtype: str | None


@dataclass(frozen=True)
class MemorySettings:
    """The group `memory`."""

    checkpointing: str


def make_accelerator(device: str | None) -> Accelerator:
    """The processes and the device of this run.

    Raises ValueError for a GPU that is not there. In bfloat16 the loop autocasts by itself: a prepared model would also
    autocast where pictures are sampled, which inference does not.
    """
    chosen = pick_device(device)
    AcceleratorState._reset_state()  # a sweep runs several jobs in one process
    GradientState._reset_state()
    # without `cpu`, processes on a machine without a GPU do not find each other and train the same run twice
    accelerator = Accelerator(cpu=chosen.type == "cpu")
    world = int(os.environ.get("WORLD_SIZE", "1"))
    assert accelerator.num_processes == world, f"{accelerator.num_processes} processes know each other, not {world}"
    launched = any(key.startswith("ACCELERATE_") for key in os.environ)
    if launched and world == 1 and chosen.type == "cpu":
        torch.set_num_threads(os.cpu_count() or 1)  # `accelerate launch` leaves one thread, and half the machine idle
    return accelerator


def prompt_picture(path: str) -> Image.Image:
    """A reference picture of the sample sheets."""
    return Picture(path, lambda: Path(path).open("rb")).load()


class Run:
    """One configuration turned into objects. Constructing it checks every setting and loads nothing large."""

    def __init__(self, config: DictConfig) -> None:
        self.config: dict[str, Any] = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
        top = {key: value for key, value in self.config.items() if key not in GROUPS}
        self.settings: RunSettings = checked("", top, RunSettings)
        self.model: ModelSettings = checked("model", self.config["model"], ModelSettings)
        self.memory: MemorySettings = checked("memory", self.config["memory"], MemorySettings)
        precision: PrecisionSettings = checked("precision", self.config["precision"], PrecisionSettings)
        self.validation: ValidationSettings = checked("validation", self.config["validation"], ValidationSettings)
        self.sample: SampleSettings = checked("sample", self.config["sample"], SampleSettings)
        self.buckets: Buckets = checked("buckets", self.config["buckets"], Buckets)
        self.source = self.model.source()
        self.accelerator = make_accelerator(self.settings.device)
        self.dtype = pick_dtype(precision.dtype, self.accelerator.device)
        self.make_adapter = self.instantiate("adapter")
        self.make_optimizer = self.instantiate("optimizer")
        self.schedule = self.instantiate("schedule")
        self.timesteps = self.instantiate("timesteps")
        self.preservation: Preservation = self.instantiate("preservation")
        self.text_encoder: LocalTextEncoder = self.instantiate("text_encoder")
        self.tracker = self.instantiate("tracker")

    @property
    def variant(self) -> Variant:
        return self.source.variant

    def instantiate(self, group: str) -> Any:
        """The object that a group's `_target_` makes. What it refuses is raised as it said it."""
        try:
            return instantiate(self.config[group], _convert_="object")
        except InstantiationException as error:
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            if isinstance(cause, ValueError):
                raise cause from error
            raise ValueError(f"{group}: {cause}") from error

    def say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            print(text, flush=True)

    def place(self) -> checkpoint.Place:
        """The run folder, chosen by the main process for all."""
        output = self.settings.output_dir
        fresh = Path(output or f"outputs/{self.settings.name}/{time.strftime('%Y-%m-%d_%H-%M-%S')}")
        if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
            fresh = Path(HydraConfig.get().runtime.output_dir)
        shared: list[Any] = [None]
        if self.accelerator.is_main_process:
            try:
                shared[0] = checkpoint.find(self.settings.resume, fresh, self.config)
            except ValueError as error:
                shared[0] = error
        broadcast_object_list(shared)
        if isinstance(shared[0], ValueError):
            raise shared[0]
        return shared[0]

    def prepare(self) -> tuple[Source, Prepared]:
        """The samples, and the cache filled with all that training reads."""
        dataset: Source = self.instantiate("dataset")
        prompts = [*self.sample.prompts, *self.preservation.prompts]
        prepared = prepare(
            self.accelerator,
            self.source,
            self.text_encoder,
            Cache(self.settings.cache_dir),
            dataset,
            prompts,
            self.buckets,
            self.settings.reference_resolution**2,
            self.dtype,
        )
        return dataset, prepared

    def sampler(self, prepared: Prepared) -> Sampler | None:
        """What makes the sample sheets, if any are asked for."""
        if not self.sample.prompts or not self.accelerator.is_main_process:
            return None
        autoencoder = load_autoencoder(self.source, self.accelerator.device)
        limit = self.settings.reference_resolution**2
        pixels = [to_pixels([reference_image(prompt_picture(path), limit)]) for path in self.sample.references]
        with torch.no_grad():
            references = [autoencoder.encode(picture.to(self.accelerator.device)) for picture in pixels]
        text, empty = prepared.embeddings(self.sample.prompts), prepared.embeddings([""])
        return Sampler(self.sample, self.variant, autoencoder, text, empty, references, self.buckets.resolution)

    def train(self) -> Path:
        """Prepare, train, and return the folder of the finished adapter."""
        settings, accelerator = self.settings, self.accelerator
        place = self.place()
        dataset, prepared = self.prepare()
        trained, validated = self.validation.split(len(dataset), settings.seed)
        captions = [sample.caption for sample in dataset]

        self.say(f"loading the transformer of {self.variant.name} ({self.dtype}) onto {accelerator.device}")
        transformer = load_transformer(self.source, accelerator.device, self.dtype)
        set_policy(transformer, self.memory.checkpointing)
        wrapped = self.make_adapter(transformer, seed=settings.seed)
        optimizer = build(self.make_optimizer, [p for p in wrapped.parameters() if p.requires_grad])
        trainable = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
        self.say(f"{len(trained)} samples, {trainable:,} trained parameters, {settings.steps} steps in {place.folder}")
        if place.checkpoint is not None:
            self.say(f"going on from {place.checkpoint}")

        if accelerator.is_main_process:
            place.folder.mkdir(parents=True, exist_ok=True)
            OmegaConf.save(OmegaConf.create(self.config), place.folder / checkpoint.CONFIG_FILE)
            self.tracker.start(place.folder, settings.name, self.config)
        loader = Loader(
            prepared.cache,
            [prepared.entries[i] for i in trained],
            [captions[i] for i in trained],
            prepared.prompts,
            batch_size=settings.batch_size,
            gradient_accumulation=settings.gradient_accumulation,
            num_processes=accelerator.num_processes,
            process_index=accelerator.process_index,
            seed=settings.seed,
            caption_dropout=settings.caption_dropout,
        )
        chosen = [(prepared.entries[i], captions[i]) for i in validated]
        prompts = list(self.preservation.prompts) if self.preservation.active else []
        return Training(
            settings=settings,
            accelerator=accelerator,
            variant=self.variant,
            base=self.variant.repo or self.variant.name,
            wrapped=wrapped,
            optimizer=optimizer,
            schedule=self.schedule,
            timesteps=self.timesteps,
            preservation=self.preservation,
            loader=loader,
            plain=dict(zip(prompts, prepared.embeddings(prompts), strict=True)) if prompts else {},
            place=place,
            metrics=Metrics(place.folder, self.tracker, place.step if place.checkpoint else None),
            sampler=self.sampler(prepared),
            validate=FixedNoiseLoss(prepared, chosen, settings.seed) if chosen else None,
            autocast=torch.bfloat16 if self.dtype == torch.bfloat16 else None,
        ).run()


def main(config: DictConfig) -> None:
    """Train one configuration and say where everything is."""
    run = Run(config)
    adapter = run.train()
    folder = adapter.parent
    path = f" --path {run.model.path}" if run.model.path else ""
    run.say(f"adapter   {adapter}")
    run.say(f"numbers   {folder / 'metrics.jsonl'}")
    if run.sample.prompts:
        run.say(f"pictures  {folder / 'samples'}")
    prompt = run.sample.prompts[0] if run.sample.prompts else "..."
    run.say(
        f'use it    python -m flux2.generate --model {run.variant.name}{path} --adapter {adapter} --prompt "{prompt}"'
    )
    del run
    gc.collect()  # the next job of a sweep needs the memory


def explain(error: Exception) -> str:
    """One message for what a user can mend."""
    text = " ".join(str(error).split())
    if isinstance(error, OmegaConfBaseException | HydraException):
        return f"configuration: {text} (settings and choices are in conf/; --help lists them)"
    return str(error)


def command(task: Callable[[DictConfig], None]) -> None:
    """Run `task` under Hydra; an error that a user can mend is one message and exit code 2, a stop request 130."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # or Hydra prints a cut traceback itself
    try:
        hydra.main(version_base="1.3", config_path=CONFIG, config_name="train")(task)()
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(130)
    except (ValueError, OmegaConfBaseException, HydraException) as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    command(main)
