"""The objects of one configuration, with every setting checked before anything large is loaded.

Training, planner, evaluation and train/cache.py start from a `RunConfig`. Nothing below it sees a `DictConfig`.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from data.buckets import Buckets
from data.files import user_path
from data.sources.images import FileOpener, Picture
from flux2.adapters import adapter_parameters
from flux2.layers.attention import chosen_backend, preferred_backends
from flux2.memory.block_offload import offloaded_blocks
from flux2.memory.compile_blocks import check_compiles
from flux2.memory.model_split import check_split, module_devices, split_devices
from flux2.models.transformer import Transformer
from flux2.models.variants import PIXELS_PER_TOKEN, Variant
from flux2.pipeline import MANY_REFERENCES_PIXELS, ONE_REFERENCE_PIXELS
from flux2.quantization.precision import convert
from train.config.instantiate import check_own_targets, instantiate, parse_settings
from train.config.memory import AUTO, completed
from train.config.settings import MemorySettings, ModelSettings, PrecisionSettings, RunSettings
from train.distributed.processes import Processes, make_accelerator
from train.distributed.sharding import check_adapter, launched_to_shard
from train.encoding.text_encoders import PromptEncoder
from train.objective.loss import DPO, MSE
from train.objective.preservation import BlankPreservation, Preservation
from train.objective.prior import PriorPreservation
from train.objective.target import Flow
from train.optim.ema import check_one_average
from train.optim.optimizers import build_optimizer, check_installed, try_out, unusual_settings
from train.publishing.hub import HubSettings
from train.utils.console import say, warn
from train.validation.loss import ValidationSettings
from train.validation.samples import SampleSettings

# fmt: off
GROUPS = (
    "model", "precision", "memory", "adapter", "dataset", "text_encoder", "optimizer", "schedule", "timesteps",
    "target", "loss", "weighting", "preservation", "tracker", "buckets", "validation", "sample", "hub",
)
# fmt: on


def open_image(path: str) -> Picture:
    """Return the image at `path`; its file is read on `load`."""
    return Picture(path, FileOpener(str(user_path(path))))


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
        self.composed: dict[str, Any] = (
            config if isinstance(config, dict) else OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        )
        for group in GROUPS:
            if not isinstance(self.composed.get(group), dict):
                raise ValueError(
                    f"{group}={self.composed.get(group)!r} must be a group of settings; see conf/train.yaml"
                )
        top = {key: value for key, value in self.composed.items() if key not in GROUPS}
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
        self.precision = self.memory.with_layouts(precision.on(self.accelerator.device))
        self.make_adapter = self.instantiate("adapter", "model", "seed", "name")
        check_installed(self.composed["optimizer"].get("_target_"))
        self.make_optimizer = self.instantiate("optimizer", "params")
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
            other = "target=contrastive" if self.prior is None else "preservation=prior"
            raise ValueError(
                f"loss=dpo with {other}: a preference is trained on pairs alone. Set loss=mse, or leave {other} out"
            )
        self.text_encoder: PromptEncoder = self.instantiate("text_encoder")
        self.tracker = self.instantiate("tracker")

    def with_memory(self, chosen: dict[str, Any]) -> RunConfig:
        """Return a copy with `chosen` as its group `memory`, which the run also writes to its config.yaml."""
        other = copy.copy(self)
        other.composed = {**self.composed, "memory": chosen}
        other.memory = parse_settings("memory", chosen, MemorySettings)
        other.precision = other.memory.with_layouts(self.precision)
        return other

    def with_prompts(self, prompts: Sequence[str]) -> RunConfig:
        """Return a copy that samples `prompts` without references."""
        other = copy.copy(self)
        other.sample = replace(self.sample, prompts=list(prompts), references=[])
        return other

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
                self.make_adapter(model, seed=self.settings.seed)
        self.memory.apply(model, self.accelerator.device, self.buckets)
        self._check_storage(model)
        if self.processes.sharded:
            check_adapter(model)
        if self.memory.compile is True:
            check_compiles(model)
        shapes = [parameter.shape for parameter in adapter_parameters(model)]
        one = torch.zeros((), device=self.accelerator.device)  # expanding it to a shape takes no memory
        parameters = [nn.Parameter(one.expand(shape)) for shape in shapes]
        check_one_average(build_optimizer(self.make_optimizer, parameters), self.settings.ema_decay)
        try_out(self.make_optimizer, self.accelerator.device)
        if self.accelerator.is_main_process:
            scale = self.variant.guidance if self.sample.guidance is None else self.sample.guidance
            guidance = self.target.warnings(scale) if self.sample.prompts and self.settings.sample_every else []
            for warning in [*unusual_settings(self.make_optimizer, self.schedule, self.settings.steps), *guidance]:
                warn(warning)
        if self.prior is not None:
            self.prior.images_per_batch(self.settings.batch_size)
        self.attention_backend()
        assert all(model.get_submodule(block) for block in self.streamed)
        for path in self.sample.files:
            open_image(path).load()
        return self

    def _check_storage(self, model: nn.Module) -> None:
        """Raise ValueError if embeddings are stored as the output of a trained layer."""
        trained = [name for name, tensor in model.named_parameters() if tensor.requires_grad and "txt_in" in name]
        storage = self.settings.embedding_storage
        if trained and storage.startswith("projected"):
            raise ValueError(
                f"embedding_storage={storage!r} stores the output of the layer txt_in, but adapter.targets trains that "
                "layer. Remove txt_in from adapter.targets, or set embedding_storage=full or fp8."
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
        return instantiate(group, self.composed[group], excluded)

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
        limit = ONE_REFERENCE_PIXELS if len(paths) == 1 else MANY_REFERENCES_PIXELS
        return [open_image(path) for path in paths], limit
