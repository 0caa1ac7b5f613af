"""How to set the group `memory` so that a run fits: for `memory=auto`, for the presets, and after an error.

The fastest setting that is predicted to fit is chosen, and nothing else is looked at, so the choice for a size of
memory is always the same, and more memory never gets a slower one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from data.buckets import reference_size
from flux2.models.transformer import Transformer
from flux2.models.variants import Variant
from flux2.quantization.precision import Precision, convert, pick_dtype
from flux2.weights.sources import ModelSource
from train.config.memory import CHOSEN, FREE, choice_of, fixed_keys, settings_of
from train.config.run_config import RunConfig
from train.planner.gpus import CONTEXT_GB, GIB, gpu, usable
from train.planner.predictor import Planner
from train.planner.search import choose, does_not_fit, lighter, smaller, step_down
from train.planner.workload import Workload, tokens
from train.sweeps.reuse import SHARED
from train.utils.memory import OutOfMemory

LEAST_STEP = 0.03  # of what a run takes: an advice after an error saves at least this, as memory is in pieces


# ------------------------------------------------------------------ the job of a run


def text_sizes(source: ModelSource) -> dict[str, int]:
    """Sizes of a text encoder that is on this disk, from its config.json; empty if it is not, or is of another kind."""
    file = Path(source.where("text_encoder")).expanduser() / "text_encoder" / "config.json"
    if not file.is_file():
        return {}
    values = json.loads(file.read_text())
    values = values.get("text_config", values)
    keys = {"mlp": "intermediate_size", "heads": "num_attention_heads", "pairs": "num_key_value_heads"}
    keys |= {"head": "head_dim", "words": "vocab_size"}
    return {name: values[key] for name, key in keys.items()} if set(keys.values()) <= values.keys() else {}


def skeleton(variant: Variant, precision: Precision, adapt: Callable[[Transformer], object]) -> Transformer:
    """The transformer in its precision and with its adapter, on the meta device."""
    with torch.device("meta"):
        model = Transformer(variant.transformer).to(precision.dtype)
        convert(model, precision, "cpu")
        adapt(model)
    return model


def planned_precision(config: RunConfig, on_gpu: bool, in_fp8: bool = True) -> Precision:
    """That of a run, as on a GPU: FP8 products if the GPU at hand can do them; of one that is not there if `in_fp8`."""
    given = {key: value for key, value in config.config["precision"].items() if value is not None}
    dtype = pick_dtype(given.pop("dtype", None), torch.device("cuda" if on_gpu else "cpu"))
    if "layers" in given:
        given["layers"] = tuple(given["layers"])
    precision = Precision(dtype, **given)
    if precision.storage != "fp8" or precision.matmul != "auto" or not on_gpu:
        return precision
    able = precision.multiplies_in_fp8("cuda") if torch.cuda.is_available() else in_fp8
    return replace(precision, matmul="fp8" if able else "dequantized")


def references_of(dataset: Mapping[str, Any]) -> int:
    """How many references its settings name; of several datasets the most."""
    named = dataset.get("reference_columns") or dataset.get("reference_folders") or []
    if not isinstance(named, list):
        raise ValueError(f"dataset.reference_columns={named!r} must be a list of names, such as [{named}]")
    return max([len(named), *map(references_of, (dataset.get("sources") or {}).values())])


def job_of(config: RunConfig, on_gpu: bool, in_fp8: bool = True) -> Workload:
    """What of a run decides memory and time. Pictures are counted as squares, the largest of the buckets.

    Args:
        in_fp8: whether a GPU that is not there multiplies FP8 (compute capability 8.9 and above).
    """
    settings, side = config.settings, config.buckets.largest
    samples = bool(config.sample.prompts) and settings.sample_every > 0
    each = [config.sample_references(paths) for paths in config.sample.edits if samples]
    edited = [[reference_size(*picture.size, limit) for picture in pictures] for pictures, limit in each]
    held = min(config.preservation.samples, settings.batch_size) if config.preservation.active else 0
    prior = config.prior
    precision = planned_precision(config, on_gpu, in_fp8)
    plain = Precision(precision.dtype, precision.storage, matmul=precision.matmul)
    return Workload(
        variant=config.variant,
        model=skeleton(config.variant, precision, partial(config.make_adapter, seed=settings.seed)),
        dtype=precision.dtype,
        optimizer=config.make_optimizer,
        pixels=(side, side),
        references=[(settings.reference_resolution,) * 2 for _ in range(references_of(config.config["dataset"]))],
        sample_pixels=(config.sample.width or side, config.sample.height or side) if samples else None,
        sample_references=max(edited, key=lambda sizes: sum(map(tokens, sizes)), default=[]),
        text_tokens=config.text_encoder.length or config.variant.text.length,
        rows=settings.batch_size + held,
        held=held,
        accumulation=settings.gradient_accumulation,
        averaged=settings.ema_decay > 0,
        class_rows=prior.images_per_batch(settings.batch_size) if prior else 0,
        class_pixels=config.class_image_size if prior and prior.draws else None,
        validates=settings.validate_every > 0 and bool(config.validation.held_out or config.validation.samples),
        on_gpu=on_gpu,
        storage=precision.storage,
        compiled=config.memory.compile,
        usual=not held and prior is None and precision == plain and config.memory.attention is None,
        text_sizes=text_sizes(config.source),
        text_storage=config.text_encoder.storage,
        text_here=config.text_encoder.here,
        shares=config.shares,
    )


def free_bytes(device: torch.device) -> int:
    """Memory that is free on a GPU, or in the host for a CPU; what a job before left can be freed."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return free + SHARED.held(device)


def gpu_name(device: torch.device) -> str | None:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def planned(config: RunConfig, memory: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """The group `memory` with its nulls chosen for `gpu_memory_gb`, and a sentence that says what and why.

    Raises:
        ValueError: nothing that can be chosen fits.
    """
    device = config.accelerator.device
    gpu_memory_gb = memory["gpu_memory_gb"]
    if gpu_memory_gb == FREE:  # of all processes the least, so that all choose alike
        free = torch.tensor([float(free_bytes(device))], dtype=torch.float64, device=device)
        gpu_memory_gb = round(config.accelerator.gather(free).min().item() / GIB + CONTEXT_GB, 1)
    planner = Planner(job_of(config, device.type == "cuda"))
    on, fixed, limit = gpu(gpu_name(device), gpu_memory_gb), fixed_keys(memory), usable(gpu_memory_gb)
    found = choose(planner, fixed, limit, on)
    if found is None:
        raise ValueError(does_not_fit(planner, fixed, gpu_memory_gb))
    chosen = {key: value for key, value in settings_of(found.choice).items() if key in memory}
    why = (
        f"memory for {gpu_memory_gb:g} GB: {found.choice}, the fastest that is predicted to fit "
        f"({found.training / 1e9:.1f} of {limit / 1e9:.1f} GB)"
    )
    if found.moved:  # weights or activations leave the device
        why = f"{why}. {lighter(planner)}".removesuffix(". ")
    return dict(memory) | chosen | {"gpu_memory_gb": gpu_memory_gb}, why


def still_fits(config: RunConfig, kept: Mapping[str, Any]) -> bool:
    """Whether a group `memory` that was chosen before agrees with what is given now and fits the memory of now."""
    chosen, given = set(CHOSEN) & kept.keys(), fixed_keys(config.given_memory)
    if kept.get("gpu_memory_gb") is None or any(kept.get(key) != value for key, value in given.items()):
        return False
    if any(kept[key] is None for key in chosen - {"budget_gb"}) or chosen != set(CHOSEN) & config.given_memory.keys():
        return False
    planner = Planner(job_of(config, config.accelerator.device.type == "cuda"))
    if kept.get("cache_transposed_weights") and not planner.has_layouts:
        return False
    return planner.predict(choice_of(kept)).training <= usable(config.config["memory"]["gpu_memory_gb"])


def advice(config: RunConfig, error: OutOfMemory) -> str:
    """What to add after memory did not suffice: the planner's next step down."""
    if error.phase == "prompts":
        return (
            "Text encoders are large and needed only once: keep it in less (text_encoder.storage=nf4), ask one on "
            "another machine (text_encoder=remote), or fill the cache where there is more memory (train/cache.py, or "
            "device=cpu), and start again"
        )
    if error.phase == "pictures":
        return "Smaller pictures need less: buckets.resolution, reference_resolution"
    device = config.accelerator.device
    planner, now = Planner(job_of(config, device.type == "cuda")), choice_of(config.config["memory"])
    on = gpu(gpu_name(device), free_bytes(device) / GIB + CONTEXT_GB)
    before = planner.predict(now).training
    found = step_down(planner, now, on, max(error.asked - error.free, LEAST_STEP * before))
    if found is None:
        return smaller(planner)
    after = planner.predict(found).training
    return f"Next step down: {found} (predicted: {after / 1e9:.1f} GB in place of {before / 1e9:.1f} GB)"
