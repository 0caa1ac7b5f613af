"""One configuration turned into objects, every setting checked, before anything large is loaded.

Training, the planner and the filling of caches begin with it. Nothing below it sees a configuration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from data.buckets import Buckets
from data.pictures import Picture
from data.samples import Source
from flux2.adapters import adapter_parameters
from flux2.attention import chosen_backend, preferred_backends
from flux2.compiling import check_compiles
from flux2.model import Transformer
from flux2.offload import streamed_blocks
from flux2.pipeline import MANY_REFERENCES_PIXELS, ONE_REFERENCE_PIXELS
from flux2.precision import convert
from flux2.variants import Variant
from train.cache import Prepared
from train.choose import completed, planned
from train.command import checked, made
from train.ema import check_one_average
from train.hub import HubSettings
from train.loss import Preservation
from train.optim import build, check_installed, doubts, try_out
from train.prior import PriorPreservation
from train.processes import Processes, make_accelerator
from train.settings import MemorySettings, ModelSettings, PrecisionSettings, RunSettings
from train.sharding import check_adapter, check_memory, launched_to_shard
from train.text_encoders import PromptEncoder
from train.tracking import warn
from train.validate import SampleSettings, ValidationSettings

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
    "weighting",
    "preservation",
    "tracker",
    "buckets",
    "validation",
    "sample",
    "hub",
)


def open_picture(path: str) -> Picture:
    return Picture(path, lambda: Path(path).expanduser().open("rb"))


class Configured:
    """The objects of one configuration. Constructing it checks every setting."""

    def __init__(self, config: DictConfig) -> None:
        self.config: dict[str, Any] = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        for group in GROUPS:
            if not isinstance(self.config.get(group), dict):
                raise ValueError(
                    f"{group}={self.config.get(group)!r} must be a group of settings, as in conf/train.yaml"
                )
        top = {key: value for key, value in self.config.items() if key not in GROUPS}
        self.model: ModelSettings = checked("model", self.config["model"], ModelSettings)
        self.settings: RunSettings = checked("", top, RunSettings)
        self.given_memory = dict(self.config["memory"])
        self.memory: MemorySettings = checked("memory", completed(self.given_memory), MemorySettings)
        chosen: PrecisionSettings = checked("precision", self.config["precision"], PrecisionSettings)
        self.validation: ValidationSettings = checked("validation", self.config["validation"], ValidationSettings)
        if self.settings.keep_best and not (self.validation.held_out or self.validation.samples):
            raise ValueError(
                f"keep_best={self.settings.keep_best} goes by the validation loss, which validation.samples=0 does not "
                "measure: give it a number above 0, or validation.held_out"
            )
        self.sample: SampleSettings = checked("sample", self.config["sample"], SampleSettings)
        self.hub: HubSettings = checked("hub", self.config["hub"], HubSettings)
        self.buckets: Buckets = checked("buckets", self.config["buckets"], Buckets)
        self.first_caption = ""
        self.planned_processes: int | None = None  # in a plan, how many there will be
        self.source = self.model.source()
        self.accelerator = make_accelerator(self.settings.device)
        self.processes = Processes(self.accelerator, self.settings.shard or launched_to_shard())
        self.precision = chosen.on(self.accelerator.device)
        self.lay_out()
        self.make_adapter = self.instantiate("adapter", "model", "seed", "name")
        check_installed(self.config["optimizer"].get("_target_"))
        self.make_optimizer = self.instantiate("optimizer", "params")
        self.schedule = self.instantiate("schedule")
        self.timesteps = self.instantiate("timesteps")
        self.timesteps.sampled_in(self.variant.steps)
        self.weighting = self.instantiate("weighting")
        self.preservation: Preservation | PriorPreservation = self.instantiate("preservation")
        self.classes: tuple[Source, Prepared] | None = None  # class pictures, once they are there
        self.text_encoder: PromptEncoder = self.instantiate("text_encoder")
        self.tracker = self.instantiate("tracker")
        if self.memory.card_gb is not None:
            self.set_memory(*planned(self, self.given_memory))
        self.rehearse()

    def set_memory(self, chosen: dict[str, Any], why: str) -> None:
        """Use what was chosen as the group `memory`, also in the configuration that is kept."""
        self.config["memory"] = chosen
        self.memory = checked("memory", chosen, MemorySettings)
        self.lay_out()
        self.say(why)

    def lay_out(self) -> None:
        """Let the precision follow `memory.keep_both_layouts`."""
        both, precision = self.memory.keep_both_layouts, self.precision
        for key, value, needed in (
            ("storage", precision.storage or "null", "fp8"),
            ("backward", precision.backward, "fp8"),
            ("matmul", precision.matmul, ("auto", "fp8")),
        ):
            if both and value not in needed:
                raise ValueError(
                    f"memory.keep_both_layouts=true does nothing with precision.{key}={value}: it is for gradients "
                    "that are multiplied in FP8"
                )
        self.precision = replace(self.precision, keep_both_layouts=both)

    def rehearse(self) -> None:
        """Attach to a model without memory, and open pictures: what cannot work says so now and not in an hour."""
        if self.processes.sharded:
            check_memory(self.memory)
        with torch.device("meta"):
            model = Transformer(self.variant.transformer)
            convert(model, self.precision, self.accelerator.device)
            self.memory.apply(model, self.accelerator.device, self.buckets)
            wrapped = self.make_adapter(model, seed=self.settings.seed)
        self.check_storage(wrapped)
        if self.processes.sharded:
            check_adapter(wrapped)
        if self.memory.compile:
            check_compiles(model)
        shapes = [parameter.shape for parameter in adapter_parameters(wrapped)]
        one = torch.zeros((), device=self.accelerator.device)  # shown in every shape, so that it takes no memory
        parameters = [nn.Parameter(one.expand(shape)) for shape in shapes]
        check_one_average(build(self.make_optimizer, parameters), self.settings.ema_decay)
        try_out(self.make_optimizer, self.accelerator.device)
        if self.accelerator.is_main_process:
            for doubt in doubts(self.make_optimizer, self.schedule, self.settings.steps):
                warn(doubt)
        if self.prior is not None:
            self.prior.beside(self.settings.batch_size)
        self.attention_backend()
        assert all(model.get_submodule(block) for block in self.streamed)
        for path in self.sample.files:
            open_picture(path).load()

    def check_storage(self, wrapped: nn.Module) -> None:
        """Raises ValueError if embeddings are stored behind a layer that is trained."""
        trained = [name for name, tensor in wrapped.named_parameters() if tensor.requires_grad and "txt_in" in name]
        storage = self.settings.embedding_storage
        if trained and storage.startswith("projected"):
            raise ValueError(
                f"embedding_storage={storage!r} stores embeddings as the layer txt_in gives them, and adapter.targets "
                "trains that layer: take txt_in out of the targets, or store them in another way (full, fp8)"
            )

    @property
    def streamed(self) -> list[str]:
        """Names of the blocks that stream."""
        return streamed_blocks(self.variant.transformer, self.memory.stream_blocks, "memory.stream_blocks")

    @property
    def copies(self) -> Path | None:
        """The folder of quantised copies of models."""
        given = self.settings.quantised_dir
        return Path(given).expanduser() if given else None

    @property
    def variant(self) -> Variant:
        return self.source.variant

    @property
    def held(self) -> Preservation:
        """What is held to the base, if anything."""
        return self.preservation if isinstance(self.preservation, Preservation) else Preservation()

    @property
    def prior(self) -> PriorPreservation | None:
        """Whether and how class pictures are trained."""
        return self.preservation if isinstance(self.preservation, PriorPreservation) else None

    @property
    def images_per_step(self) -> int:
        return self.settings.batch_size * self.settings.gradient_accumulation * self.accelerator.num_processes

    @property
    def shares(self) -> int:
        """How many processes the base is sharded over; 1 if it is not."""
        return (self.planned_processes or self.accelerator.num_processes) if self.processes.sharded else 1

    @property
    def example(self) -> str:
        """A prompt that shows what was learned."""
        return self.sample.prompts[0] if self.sample.prompts else self.first_caption

    def instantiate(self, group: str, *ours: str) -> Any:
        """The object that a group's `_target_` makes; the arguments `ours` are no settings."""
        return made(group, self.config[group], ours)

    def say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            print(text, flush=True)

    def attention_backend(self) -> str:
        """Which one computes the attention of a square picture."""
        device, config = self.accelerator.device, self.variant.transformer
        backends = preferred_backends(self.memory.attention, device)
        tokens = (self.buckets.largest // 16) ** 2
        return chosen_backend(backends, config.heads, config.head_dim, tokens, device, self.precision.dtype)

    def sampled(self, paths: Sequence[str]) -> tuple[list[Picture], int]:
        """The pictures that a prompt of the sheets edits, and the pixels of each at most: as inference takes them, so
        that a sheet shows what it gives."""
        limit = ONE_REFERENCE_PIXELS if len(paths) == 1 else MANY_REFERENCES_PIXELS
        return [open_picture(path) for path in paths], limit
