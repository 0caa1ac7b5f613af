"""The objects of one configuration, with every setting checked before anything large is loaded.

Training, planner, evaluation and train/cache.py start from a `RunConfig`. Nothing below it sees a `DictConfig`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from data.buckets import Buckets
from data.files import user_path
from data.sources.images import FileOpener, Picture
from flux2.adapters import adapter_parameters
from flux2.adapters.loading import check_scale
from flux2.adapters.tuners import adapter_layers, kind_of
from flux2.adapters.warm_start import attach_frozen, start_from
from flux2.layers.attention import chosen_backend, preferred_backends
from flux2.layers.fused_lora import FROZEN
from flux2.memory.block_offload import offloaded_blocks
from flux2.memory.compile_blocks import check_compiles
from flux2.memory.model_split import check_split, module_devices, split_devices
from flux2.models.transformer import Transformer
from flux2.models.variants import PIXELS_PER_TOKEN, Variant
from flux2.pipeline import reference_limit
from flux2.quantization.precision import convert
from flux2.utils.text import listed
from flux2.weights.sources import ModelSource, model_source
from train.config.instantiate import check_own_targets, instantiate, parse_settings, to_plain
from train.config.memory import AUTO, completed
from train.config.settings import AdapterSettings, MemorySettings, ModelSettings, PrecisionSettings, RunSettings
from train.distributed.processes import Processes, make_accelerator
from train.distributed.sharding import check_adapter, launched_to_shard
from train.encoding.text_encoders import PromptEncoder
from train.objective.loss import DPO, MSE
from train.objective.preservation import BlankPreservation, Preservation
from train.objective.prior import PriorPreservation
from train.objective.target import Flow, Slider, SliderImages
from train.optim.ema import check_one_average
from train.optim.optimizers import build_optimizer, check_installed, try_out, unusual_settings
from train.optim.parameter_groups import RateSettings
from train.optim.stochastic_rounding import check_averages, to_bfloat16
from train.publishing.hub import HubSettings
from train.utils.console import say, warn
from train.validation.loss import ValidationSettings
from train.validation.samples import SampleSettings
from train.validation.twin import twins

# fmt: off
GROUPS = (
    "model", "precision", "memory", "adapter", "dataset", "text_encoder", "optimizer", "schedule", "timesteps",
    "target", "loss", "weighting", "preservation", "tracker", "buckets", "validation", "sample", "hub",
)
# fmt: on
FROZEN_BASE = (
    "adapter.init_mode=frozen with {}: predictions are compared with those of the base, which has neither adapter, so "
    "the new one would undo the frozen one. Merge that into the base (flux2.export), or use adapter.init_mode=continue"
)
# settings of groups with a `_target_` that are not its arguments: all choices of the group have them
OWN: dict[str, type] = {"adapter": AdapterSettings, "optimizer": RateSettings}


def own_names(group: str) -> set[str]:
    return {field.name for field in fields(OWN[group])} if group in OWN else set()


class RunConfig:
    """The objects of one configuration. Constructing it checks every setting; nothing is set on it afterwards.

    Args:
        config: The composed configuration (conf/train.yaml), or that of a run folder as a dict. A folder may come from
            someone else: nothing in a dict is interpolated, and only targets that conf/ names are made of it.
        planned_processes: Number of processes to plan for; None takes the processes that are running.

    Attributes:
        composed: The composed configuration as a plain dict, with its interpolations resolved.

    Raises:
        ValueError: A setting is missing, unknown or invalid; the message names it.
    """

    def __init__(self, config: DictConfig | dict[str, Any], planned_processes: int | None = None) -> None:
        self.is_saved = isinstance(config, dict)
        self.composed: dict[str, Any] = config if isinstance(config, dict) else to_plain(config)
        for group in GROUPS:
            if not isinstance(given := self.composed.get(group), dict):
                raise ValueError(f"{group}={given!r} must be a group of settings; see conf/train.yaml")
        top = {key: value for key, value in self.composed.items() if key not in GROUPS}
        self.chooses_batch = top.get("batch_size") == AUTO  # 1 until it is chosen
        top |= {"batch_size": 1} if self.chooses_batch else {}
        self.model: ModelSettings = parse_settings("model", self.composed["model"], ModelSettings)
        self.settings: RunSettings = parse_settings("", top, RunSettings)
        self.given_memory = dict(self.composed["memory"])
        self.memory: MemorySettings = parse_settings("memory", completed(self.given_memory), MemorySettings)
        precision: PrecisionSettings = parse_settings("precision", self.composed["precision"], PrecisionSettings)
        validation: ValidationSettings = parse_settings("validation", self.composed["validation"], ValidationSettings)
        if self.settings.keep_best and not (validation.held_out or validation.samples):
            raise ValueError(
                f"keep_best={self.settings.keep_best} ranks checkpoints by validation loss, which validation.samples=0 "
                "does not measure. Set validation.samples or validation.held_out above 0."
            )
        self.validation = validation
        self.sample: SampleSettings = parse_settings("sample", self.composed["sample"], SampleSettings)
        self.hub: HubSettings = parse_settings("hub", self.composed["hub"], HubSettings)
        self.buckets: Buckets = parse_settings("buckets", self.composed["buckets"], Buckets)
        self.planned_processes = planned_processes
        self.source = self.model.source()
        self.accelerator = make_accelerator(self.settings.device)
        self.processes = Processes(self.accelerator, self.settings.shard or launched_to_shard())
        self._check_split()
        self.twin = self._twin_source()
        self.precision = self.memory.with_layouts(precision.on(self.accelerator.device))
        self.make_adapter = self.instantiate("adapter", "model", "seed", "name")
        self.adapter: AdapterSettings = self._own_settings("adapter")
        check_installed(self.composed["optimizer"].get("_target_"))
        self.make_optimizer = self.instantiate("optimizer", "params")
        self.rates: RateSettings = self._own_settings("optimizer")
        self.schedule = self.instantiate("schedule")
        self.timesteps = self.instantiate("timesteps")
        self.timesteps.sampled_in(self.variant.steps)
        for width, height in self.buckets.sizes:
            self.timesteps.check_range((width // PIXELS_PER_TOKEN) * (height // PIXELS_PER_TOKEN))
        self.target: Flow = self.instantiate("target")
        self.target.check(self.variant, self.settings.keep_best)
        self.loss: MSE = self.instantiate("loss")
        self.weighting = self.instantiate("weighting")
        self._preservation: Preservation | BlankPreservation | PriorPreservation = self.instantiate("preservation")
        if isinstance(self.loss, DPO) and (self.prior is not None or type(self.target) is not Flow):
            other = f"target={self.target.name}" if self.prior is None else "preservation=prior"
            raise ValueError(
                f"loss=dpo with {other}: a preference is trained on pairs alone. Set loss=mse, or leave {other} out"
            )
        if self.adapter.is_frozen and isinstance(self.loss, DPO):
            raise ValueError(FROZEN_BASE.format("loss=dpo"))
        if self.adapter.is_frozen and isinstance(self.target, SliderImages):
            raise ValueError(
                "adapter.init_mode=frozen with target=slider_images: a slider is trained alone, because the images at "
                "its ends would also teach it to undo the frozen adapter. Merge that into the base (flux2.export), or "
                "use adapter.init_mode=continue"
            )
        if isinstance(self.target, Slider):
            if self.adapter.is_frozen:
                raise ValueError(FROZEN_BASE.format("target=slider"))
            if self.settings.validate_every:
                raise ValueError(
                    f"validate_every={self.settings.validate_every} with target=slider: the validation loss is that of "
                    "the images, which a slider does not learn. Set validate_every=0, and compare sample grids"
                )
        self.text_encoder: PromptEncoder = self.instantiate("text_encoder")
        self.text_encoder.check(self.variant)
        self.tracker = self.instantiate("tracker")

    def with_memory(self, chosen: dict[str, Any]) -> RunConfig:
        """Return a copy with `chosen` as its group `memory`, which the run also writes to its config.yaml."""
        other = copy.copy(self)
        other.composed = {**self.composed, "memory": chosen}
        other.memory = parse_settings("memory", chosen, MemorySettings)
        other.precision = other.memory.with_layouts(self.precision)
        return other

    def with_text_encoder(self, chosen: dict[str, Any]) -> RunConfig:
        """Return a copy with `chosen` in its group `text_encoder`, which the run also writes to its config.yaml."""
        other = copy.copy(self)
        other.composed = {**self.composed, "text_encoder": {**self.composed["text_encoder"], **chosen}}
        other.text_encoder = other.instantiate("text_encoder")
        return other

    def with_batch_size(self, chosen: int) -> RunConfig:
        """Return a copy with `batch_size`, which the run also writes to its config.yaml."""
        other = copy.copy(self)
        other.composed, other.chooses_batch = {**self.composed, "batch_size": chosen}, False
        other.settings = replace(self.settings, batch_size=chosen)
        return other

    def with_prompts(self, prompts: Sequence[str], references: Sequence[Sequence[str]] = ()) -> RunConfig:
        """Return a copy that samples `prompts`, each with its list of `references`; by default with none."""
        other = copy.copy(self)
        other.sample = replace(self.sample, prompts=list(prompts), references=list(map(list, references)))
        return other

    @property
    def draws_samples(self) -> bool:
        """Whether the run draws sample grids, of its prompts or of the first captions."""
        return self.sample.count > 0 and self.settings.sample_every > 0

    def dry_run(self, model: Transformer | None = None) -> RunConfig:
        """Return this configuration after checks on a model without memory, so that errors are reported early.

        Args:
            model: One on the meta device that has its adapter, if there is one already.

        Raises ValueError for settings that do not work together and for sample images that cannot be read.
        """
        if self.processes.sharded:
            self.memory.check_sharded()
        if model is None:
            with torch.device("meta"):
                model = Transformer(self.variant.transformer)
                convert(model, self.precision, self.accelerator.device)
                self.attach_adapter(model)
        self._check_start(model)
        self.memory.apply(model, self.accelerator.device, self.buckets)
        self._check_storage(model)
        if self.processes.sharded:
            check_adapter(model)
        if self.memory.compile is True:
            check_compiles(model)
        shapes = [parameter.shape for parameter in adapter_parameters(model)]
        one = torch.zeros((), device=self.accelerator.device)  # expanding it to a shape takes no memory
        parameters = [nn.Parameter(one.expand(shape)) for shape in shapes]
        factors = self.rates.factors(model)
        optimizer = build_optimizer(self.make_optimizer, parameters, factors)
        check_one_average(optimizer, self.settings.ema_decay)
        if self.adapter.is_bfloat16:
            check_averages(optimizer)
        try_out(self.make_optimizer, self.accelerator.device)
        if self.accelerator.is_main_process:
            drawing = self.variant if self.twin is None else self.twin.variant
            scale = drawing.guidance if self.sample.guidance is None else self.sample.guidance
            guidance = self.target.warnings(scale) if self.draws_samples else []
            unusual = unusual_settings(self.make_optimizer, self.schedule, self.settings.steps, factors)
            for warning in [*unusual, *guidance]:
                warn(warning)
        if self.prior is not None and not self.chooses_batch:
            self.prior.images_per_batch(self.settings.batch_size)
        for kind in {kind_of(layer) for layer in adapter_layers(model).values()}:
            for scale in {*self.sample.scales, *self.target.scales}:
                check_scale(kind, scale)
        self.attention_backend()
        assert all(model.get_submodule(block) for block in self.streamed)
        for picture in self.sample_references(self.sample.files)[0]:
            picture.load()
        return self

    def _check_start(self, model: Transformer) -> None:
        """Raise ValueError if the adapter cannot start from `adapter.init`; a resumed run does not read it."""
        start = self.adapter
        if start.init is not None and not start.is_frozen and self.settings.resume is None:
            start_from(model, start.init)

    def _check_storage(self, model: nn.Module) -> None:
        """Raise ValueError if embeddings are stored as the output of a trained layer."""
        inside = [(name, tensor) for name, tensor in model.named_parameters() if "txt_in" in name]
        trained, frozen = any(tensor.requires_grad for _, tensor in inside), any(FROZEN in name for name, _ in inside)
        storage = self.settings.embedding_storage
        if (trained or frozen) and storage.startswith("projected"):
            what = "adapter.targets trains" if trained else "adapter.init changes"
            remedy = "Remove txt_in from adapter.targets, or set" if trained else "Set"
            raise ValueError(
                f"embedding_storage={storage!r} stores the output of the layer txt_in, but {what} that layer. {remedy} "
                "embedding_storage=full or fp8."
            )

    def _check_split(self) -> None:
        """Raise ValueError if the model cannot be divided as `memory.split` says, or not in these processes."""
        split = self.memory.split
        if split is None:
            return
        if self.processes.sharded or self.accelerator.num_processes > 1:
            several = "shard=true" if self.processes.sharded else f"{self.accelerator.num_processes} processes"
            raise ValueError(
                f"memory.split={split} divides the model over the GPUs of one process, and does not work with "
                f"{several}. Set memory.split=null, or start one process with shard=false."
            )
        if isinstance(split, list):
            check_split(self.variant.transformer, split, "memory.split")

    def _twin_source(self) -> ModelSource | None:
        """Return the model that draws the sample grids instead of the one that trains, if there is one."""
        name, names, storage = self.sample.model, twins(self.variant), self.settings.embedding_storage
        if name is None:
            return None
        if name not in names:
            raise ValueError(
                f"sample.model={name!r} must have the sizes and the text encoder of model={self.variant.name}, whose "
                f"adapter it takes: {listed(names) or 'no other model has them'}. null draws with the model that trains"
            )
        for key, used in {
            "embedding_storage": storage if storage.startswith("projected") else None,  # by the layer of one model
            "shard": self.processes.sharded or None,
            "memory.split": self.memory.split,
        }.items():
            if used is not None:
                raise ValueError(f"sample.model={name} does not work with {key}={used}. Change one of them")
        return model_source(name, self.sample.path)

    @property
    def devices(self) -> list[torch.device]:
        """The devices of the model, several with `memory.split`. Raise ValueError if there are not as many GPUs."""
        device, split = self.accelerator.device, self.memory.split
        if split is None:
            return [device]
        return split_devices(device, None if split == AUTO else len(split), f"memory.split={split}")

    @property
    def module_devices(self) -> dict[str, torch.device]:
        """The devices of the modules that are not on the first of `devices`."""
        split = self.memory.parts
        return module_devices(self.variant.transformer, split, self.devices) if split else {}

    @property
    def streamed(self) -> list[str]:
        """Names of the offloaded blocks, which stream to the device."""
        return offloaded_blocks(self.variant.transformer, self.memory.offload_blocks, "memory.offload_blocks")

    @property
    def copies(self) -> Path | None:
        """The folder of quantized copies of models."""
        folder = self.settings.quantized_cache_dir
        return user_path(folder) if folder else None

    @property
    def variant(self) -> Variant:
        return self.source.variant

    @property
    def preservation(self) -> Preservation | BlankPreservation:
        """Preservation of the base's predictions; inactive with `preservation=none` and `prior`."""
        return Preservation() if isinstance(self._preservation, PriorPreservation) else self._preservation

    @property
    def prior(self) -> PriorPreservation | None:
        """Prior preservation with class images; None unless `preservation=prior`."""
        return self._preservation if isinstance(self._preservation, PriorPreservation) else None

    @property
    def class_image_size(self) -> tuple[int, int]:
        """(width, height) in pixels of the class images that the base draws."""
        assert self.prior is not None
        width, height = self.buckets.nearest(1, 1)
        return self.prior.width or width, self.prior.height or height

    @property
    def guidance(self) -> float | None:
        """The guidance scale that the model receives in training; None for a model without one."""
        if not self.variant.transformer.guidance:
            return None
        return self.variant.training_guidance if self.settings.guidance is None else self.settings.guidance

    @property
    def autocast(self) -> torch.dtype | None:
        """The dtype of matrix products where it is not float32, the adapter's dtype."""
        return torch.bfloat16 if self.precision.dtype == torch.bfloat16 else None

    @property
    def images_per_step(self) -> int:
        return self.settings.batch_size * self.settings.gradient_accumulation * self.accelerator.num_processes

    @property
    def num_shards(self) -> int:
        """Number of processes that the base is sharded over; 1 without sharding."""
        return (self.planned_processes or self.accelerator.num_processes) if self.processes.sharded else 1

    def instantiate(self, group: str, *excluded: str) -> Any:
        """Return the object of a group with a `_target_`; its arguments `excluded` are no settings."""
        if self.is_saved:
            check_own_targets(group, self.composed[group])
        given = {key: value for key, value in self.composed[group].items() if key not in own_names(group)}
        return instantiate(group, given, excluded)

    def _own_settings(self, group: str) -> Any:
        """Return the settings of a group with a `_target_` that are not arguments of it."""
        given = {key: value for key, value in self.composed[group].items() if key in own_names(group)}
        return parse_settings(group, given, OWN[group])

    def attach_adapter(self, model: Transformer) -> nn.Module:
        """Attach the configured adapter, and the saved one that is frozen next to it, to a model to plan or check."""
        wrapped: nn.Module = self.make_adapter(model, seed=self.settings.seed)
        if self.adapter.is_frozen:
            attach_frozen(wrapped, self.adapter.init or "")
        if self.adapter.is_bfloat16:
            to_bfloat16(wrapped)
        return wrapped

    def say(self, text: str) -> None:
        """Print a line in the main process only."""
        if self.accelerator.is_main_process:
            say(text)

    def attention_backend(self) -> str:
        """Return the attention backend for a square image of the largest bucket."""
        device, config = self.accelerator.device, self.variant.transformer
        backends = preferred_backends(self.memory.attention, device)
        tokens = (self.buckets.largest // 16) ** 2
        return chosen_backend(backends, config.heads, config.head_dim, tokens, device, self.precision.dtype)

    def sample_references(self, paths: Sequence[str]) -> tuple[list[Picture], int]:
        """Return the reference images of a sample prompt, and the maximum number of pixels of each."""
        limit = reference_limit(self.variant, len(paths))
        return [Picture(path, FileOpener(str(user_path(path)))) for path in paths], limit
