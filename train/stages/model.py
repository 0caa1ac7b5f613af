"""The models of a run: the frozen base with its adapter, and the sampler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import peft
import torch
from PIL import Image
from torch import nn

from data.cache.prepared import CachedDataset
from data.files import user_path
from flux2.adapters import adapter_parameters
from flux2.adapters.warm_start import attach_frozen, start_from
from flux2.memory.block_offload import offload
from flux2.memory.model_split import split_model
from flux2.models.pixels import reference_image, to_pixels
from flux2.quantization.precision import caution, describe
from flux2.utils.text import gigabytes
from flux2.weights.loading import load_autoencoder, load_transformer, tensor_files
from train.checkpoints.checkpoint import read_state
from train.checkpoints.resume import RunLocation
from train.config.run_config import RunConfig
from train.distributed.sharding import attach_sharded, local_bytes, sharder, total_bytes
from train.optim.optimizers import build_optimizer
from train.optim.stochastic_rounding import build_rounded_optimizer, to_bfloat16
from train.sweeps.reuse import SHARED, Base
from train.utils.console import name_process_in_errors, phase, warn
from train.utils.memory import explain_oom
from train.utils.text import many
from train.validation.sample_grid import side_by_side
from train.validation.samples import Sampler
from train.validation.twin import Twin

START = "adapter_start"  # key of a checkpoint's state


@dataclass(frozen=True)
class LoadedModel:
    """The base, which a later sweep job may reuse, and PEFT's wrapper around it with the adapter.

    Attributes:
        state: What the checkpoints record of the saved adapter that it started from.
    """

    base: Base
    peft_model: peft.PeftModel
    state: Mapping[str, Any]

    @property
    def trained_parameters(self) -> list[nn.Parameter]:
        """The parameters of the adapter."""
        return adapter_parameters(self.peft_model)

    @property
    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.trained_parameters)

    def build_optimizer(self, config: RunConfig) -> torch.optim.Optimizer:
        """Build the configured optimizer of the adapter, with the learning rates of its layers."""
        parameters, factors = self.trained_parameters, config.rates.factors(self.peft_model)
        if config.adapter.is_bfloat16:
            return build_rounded_optimizer(config.make_optimizer, parameters, factors, config.settings.seed)
        return build_optimizer(config.make_optimizer, parameters, factors)

    def release(self, config: RunConfig) -> None:
        """Remove the adapter, so that the next sweep job can reuse the base; drop a base that cannot be reused."""
        # compiled code is specific to the replaced layers
        if SHARED.keeps and (config.memory.compile is True or not self.base.remove_adapter(self.peft_model)):
            SHARED.drop("transformer")


@phase("model")
def load_model(config: RunConfig, location: RunLocation) -> LoadedModel:
    """Load the transformer, apply the memory settings, attach and start the adapter, and set up offloading."""
    config.say(
        f"{config.variant.name} ({config.precision.name}) on {config.accelerator.device}; "
        f"processes: {config.accelerator.num_processes}, CPU threads each: {torch.get_num_threads()}; "
        f"attention: {config.attention_backend()}"
    )
    loading = explain_oom("while loading the transformer", "step", config.accelerator.device)
    with name_process_in_errors(config.accelerator.process_index), loading:
        base = shared_base(config)
        config.memory.apply(base.transformer, config.accelerator.device, config.buckets)
        attach = partial(attach_sharded, config.make_adapter) if config.processes.sharded else config.make_adapter
        peft_model = attach(base.transformer, seed=config.settings.seed)
        state = start_adapter(config, location, peft_model)
        if config.adapter.is_bfloat16:
            to_bfloat16(peft_model)
        place_blocks(config, base)
    return LoadedModel(base, peft_model, state)


def start_adapter(config: RunConfig, location: RunLocation, peft_model: peft.PeftModel) -> dict[str, Any]:
    """Start a new run's adapter from the saved one at `adapter.init`; return what the run records of it.

    A resumed run reads it only if it is frozen: otherwise the checkpoint has the adapter. Raises ValueError if the
    frozen one has changed since.
    """
    path, is_frozen = config.adapter.init, config.adapter.is_frozen
    if path is None:
        return {}
    recorded = None if location.checkpoint is None else read_state(location.checkpoint).get(START)
    if location.checkpoint is not None and not is_frozen:
        return {START: recorded}
    start = attach_frozen(peft_model, path) if is_frozen else start_from(peft_model, path)
    if recorded is not None and recorded["digest"] != start.digest:
        raise ValueError(
            f"adapter.init={path!r} has other values than when the run began, and would change what is trained. "
            "Restore it, or start a new run"
        )
    new = f"; {many(start.new_layers, 'layer')} that it does not have begin new" if start.new_layers else ""
    verb = "trains next to the frozen one" if is_frozen else "starts from the one"
    config.say(f"the adapter {verb} at {path}: {start.adapter}{new}")
    return {START: {"path": str(user_path(path).resolve()), "digest": start.digest}}


def shared_base(config: RunConfig) -> Base:
    """Return the transformer, loaded now or reused from the previous sweep job."""
    device, memory = str(config.accelerator.device), {**config.composed["memory"], "gpu_memory_gb": None}
    projected, sharded = config.settings.embedding_storage.startswith("projected"), config.processes.sharded
    key = [config.source, config.precision, device, memory, config.composed["buckets"], projected, sharded]
    return SHARED.take("transformer", key, lambda: load_base(config), config.say)


def load_base(config: RunConfig) -> Base:
    """Load the transformer in its precision; with `shard=true` each process holds a share of it."""
    device, sharded = config.accelerator.device, config.processes.sharded
    config.say(f"loading the transformer of {config.variant.name} ({config.precision.name}) onto {device}")
    ready = sharder(device) if sharded else None
    transformer = load_transformer(
        config.source,
        device,
        config.precision,
        cache=config.copies,
        host=config.streamed,
        devices=config.module_devices,
        say=config.say,
        ready=ready,
    )
    config.say(describe(transformer, config.precision, device))
    if inexact := caution(transformer):
        remedy = "Use bf16 or fp8" if config.precision.rotate else "Set precision.rotate=true, or use fp8"
        warn(f"{inexact}. {remedy}")
    if sharded:
        config.say(
            f"the base is sharded: each of {config.num_shards} processes holds {gigabytes(local_bytes(transformer))} "
            f"of {gigabytes(total_bytes(transformer))} and gathers one block at a time"
        )
    if config.settings.embedding_storage.startswith("projected"):
        transformer.txt_in = nn.Identity()  # cached embeddings are its output
    return Base(transformer, check=SHARED.keeps and not sharded)


def place_blocks(config: RunConfig, base: Base) -> None:
    """Set up the division over several GPUs, or offloading of blocks and activations to host memory, as configured."""
    memory, device = config.memory, config.accelerator.device
    if memory.parts:
        split_model(base.transformer, config.module_devices)
        parts = [f"{many(n, 'block')} on {at}" for n, at in zip(memory.parts, config.devices, strict=True)]
        config.say(f"the model is divided: {', '.join(parts)}")
        return
    if base.offloader is None:
        activations = memory.offload_activations
        base.offloader = offload(base.transformer, memory.offload_blocks, activations=activations, device=device)
    else:
        base.offloader.reattach(base.transformer)
    if base.offloader is not None:
        config.say(str(base.offloader))


def load_sampler(config: RunConfig, cached: CachedDataset, peft_model: peft.PeftModel | None = None) -> Sampler | None:
    """Return the sampler of the run's sample grids; None without sample grids.

    With `peft_model`, the model that trains, `sample.model` draws the grids.
    """
    if not config.sample.prompts or not config.settings.sample_every:
        return None
    device = config.accelerator.device
    key = [config.source, str(device)]
    autoencoder = SHARED.take("autoencoder", key, lambda: load_autoencoder(config.source, device), config.say)
    references, sizes, edited = [], [], list[Image.Image | None]()
    for paths in config.sample.edits:
        files, limit = config.sample_references(paths)
        images = [file.load() for file in files]
        edited.append(side_by_side(images))
        pixels = [to_pixels([reference_image(image, limit)]) for image in images]
        with torch.no_grad():
            references.append([autoencoder.encode(one.to(device)) for one in pixels])
        width, height = config.buckets.nearest(*(images[0].size if images else (1, 1)))
        sizes.append((config.sample.width or width, config.sample.height or height))
    text, empty = cached.embeddings(config.sample.prompts), cached.embeddings([""])
    twin, variant = None, config.variant
    if config.twin is not None and peft_model is not None:
        tensor_files(config.twin, "transformer")  # now, and not at the first grid
        precision = replace(config.precision, cache_transposed_weights=False)  # there is no backward
        twin, variant = Twin(config.twin, peft_model, device, precision, config.copies), config.twin.variant
    share = config.processes.map
    return Sampler(config.sample, variant, autoencoder, text, empty, references, sizes, edited, twin, share)
