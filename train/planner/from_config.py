"""Choose the group `memory` so that a run fits: for `memory=auto`, the presets, and advice after out of memory.

The choice is the fastest setting that is predicted to fit, so it is deterministic for a size of memory, and more memory
never gets a slower one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import psutil
import torch

from data.buckets import reference_size
from data.files import user_path
from flux2.layers.attention import computes_in_float32
from flux2.models.transformer import Transformer
from flux2.models.variants import Variant
from flux2.quantization.precision import Backward, Precision, convert, pick_dtype
from flux2.utils.json_files import read_json
from flux2.utils.text import gigabytes
from flux2.weights.sources import ModelSource
from train.config.memory import AUTO, CHOSEN, FREE, HEADROOM_GB, choice_of, fixed_keys, settings_of
from train.config.run_config import RunConfig
from train.objective.loss import DPO
from train.objective.target import ContrastiveGuidance
from train.planner.gpus import CONTEXT_GB, GIB, Gpu, gpu, usable
from train.planner.prediction import Prediction
from train.planner.predictor import LIBRARIES, Planner
from train.planner.search import choose, does_not_fit, lighter, smaller, step_down
from train.planner.text_encoder_memory import first_fit, prompt_bytes, text_encoder_choices
from train.planner.workload import TextEncoderChoice, Workload, tokens
from train.sweeps.reuse import SHARED
from train.utils.checks import is_count
from train.utils.memory import OutOfMemory

ELSEWHERE = (
    "Encode on another machine: text_encoder=remote, or fill the cache there (train/cache.py) and copy cache_dir."
)
BATCHES = (1, 2, 4, 8, 16)  # that batch_size=auto chooses from
LEAST_GAIN = 0.03  # share of the time of an image that a larger batch saves at least, because it makes fewer steps
LEAST_STEP = 0.03  # share of a run's memory that advice after out of memory saves at least, because of fragmentation


def text_sizes(source: ModelSource) -> dict[str, int]:
    """Return the sizes in the config.json of a local text encoder; empty if it is not local or of an unknown kind.

    Raises ValueError, naming the file, if it cannot be read.
    """
    file = user_path(source.where("text_encoder")) / "text_encoder" / "config.json"
    if not file.is_file():
        return {}
    values = read_json(file)
    values = values.get("text_config", values) if isinstance(values, dict) else None
    if not isinstance(values, dict):
        return {}
    keys = {"mlp": "intermediate_size", "heads": "num_attention_heads", "pairs": "num_key_value_heads"}
    keys |= {"head": "head_dim", "words": "vocab_size"}
    is_known = all(is_count(values.get(key), 1) for key in keys.values())
    return {name: values[key] for name, key in keys.items()} if is_known else {}


def skeleton(variant: Variant, precision: Precision, adapt: Callable[[Transformer], object]) -> Transformer:
    """Return the transformer in its precision, with its adapter, on the meta device."""
    with torch.device("meta"):
        model = Transformer(variant.transformer).to(precision.dtype)
        convert(model, precision, "cpu")
        adapt(model)
    return model


def planned_precision(config: RunConfig, on_gpu: bool, in_fp8: bool = True) -> Precision:
    """Return the run's precision as on a GPU. Without a GPU in this machine, `in_fp8` decides about FP8 products."""
    given = {key: value for key, value in config.composed["precision"].items() if value is not None}
    dtype = pick_dtype(given.pop("dtype", None), torch.device("cuda" if on_gpu else "cpu"))
    if "layers" in given:
        given["layers"] = tuple(given["layers"])
    precision = Precision(dtype, **given)
    if precision.storage != "fp8" or precision.matmul != "auto" or not on_gpu:
        return precision
    able = precision.multiplies_in_8_bits("cuda") if torch.cuda.is_available() else in_fp8
    return replace(precision, matmul="fp8" if able else "dequantized")


REFERENCES = ("reference_columns", "reference_folders")


def references_of(dataset: Mapping[str, Any]) -> int:
    """Return the number of references in a dataset's settings, the maximum for a mix."""
    named: Any = next((dataset[key] for key in REFERENCES if dataset.get(key) is not None), [])
    if not isinstance(named, list):
        raise ValueError(f"dataset.reference_columns={named!r} must be a list of names, e.g. [{named}]")
    return max([len(named), *map(references_of, (dataset.get("sources") or {}).values())])


def workload_of(
    config: RunConfig,
    on_gpu: bool,
    in_fp8: bool = True,
    precision: Precision | None = None,
    num_gpus: int | None = None,
) -> Workload:
    """Return what determines memory and step time, for squares of the largest bucket.

    `precision` is `planned_precision` by default, with `in_fp8` as there. `num_gpus` divide the blocks as evenly as
    possible; by default it is what memory.split says.
    """
    split = config.memory.split if num_gpus is None else None
    num_gpus = num_gpus or (1 if split is None else len(config.devices) if split == AUTO else len(split))
    settings, side = config.settings, config.buckets.largest
    samples = config.draws_samples
    references = [(settings.reference_resolution,) * 2 for _ in range(references_of(config.composed["dataset"]))]
    each = [config.sample_references(paths) for paths in config.sample.edits if samples]
    captioned = references if samples and not config.sample.prompts else []  # the captions' own
    edited = [[reference_size(*picture.size, limit) for picture in pictures] for pictures, limit in each]
    rejected = settings.batch_size if isinstance(config.loss, DPO) else 0
    held = config.preservation.rows(settings.batch_size) + rejected
    prior, outside = config.prior, settings.batch_size if config.loss.needs_base else 0
    is_contrastive = isinstance(config.target, ContrastiveGuidance)  # all rows have the empty prompt
    guided = settings.batch_size * (1 if is_contrastive else len(config.target.prompts_for([])))
    precision = precision or planned_precision(config, on_gpu, in_fp8)
    is_usual = config.memory.attention is None and config.memory.kernels == "torch" and num_gpus == 1
    plain = Precision(precision.dtype, precision.storage, matmul=precision.matmul)
    return Workload(
        variant=config.variant,
        model=skeleton(config.variant, precision, config.attach_adapter),
        dtype=precision.dtype,
        optimizer=config.make_optimizer,
        pixels=(side, side),
        references=references,
        sample_pixels=(config.sample.width or side, config.sample.height or side) if samples else None,
        sample_references=max(edited, key=lambda sizes: sum(map(tokens, sizes)), default=captioned),
        twin=samples and config.twin is not None,
        text_tokens=config.text_encoder.length or config.variant.text.length,
        rows=settings.batch_size + held,
        held=held,
        frozen_rows=[rows for rows in (held + outside, guided) if rows],
        guides=1 if is_contrastive else guided,
        accumulation=settings.gradient_accumulation * (len(config.target.scales) if config.target.uses_pairs else 1),
        averaged=settings.ema_decay > 0,
        class_rows=prior.images_per_batch(settings.batch_size) if prior else 0,
        class_pixels=config.class_image_size if prior and prior.draws else None,
        validates=settings.validate_every > 0 and bool(config.validation.held_out or config.validation.samples),
        on_gpu=on_gpu,
        float32_attention=on_gpu and computes_in_float32(config.accelerator.device),
        storage=precision.storage,
        compiled=config.memory.compile is True,
        kernels=on_gpu and config.memory.kernels == "triton" and config.memory.compile is not True,
        usual=is_usual and precision == plain and not held + outside + guided and prior is None,
        text_sizes=text_sizes(config.source),
        text_encoder=TextEncoderChoice(config.text_encoder.storage, config.text_encoder.device),
        text_here=config.text_encoder.here,
        num_shards=config.num_shards,
        num_gpus=num_gpus,
        split=tuple(split) if isinstance(split, list) else None,
    )


def faster(config: RunConfig, now: Prediction, on: Gpu) -> str:
    """Return a sentence if a run in FP8, predicted as `now`, is predicted to be faster in INT8; otherwise empty."""
    given, matmul = planned_precision(config, on_gpu=True), config.composed["precision"].get("matmul")
    if given.storage != "fp8" or matmul == "dequantized" or on.int8 <= (on.fp8 or 0):
        return ""
    backward: Backward = "int8" if given.backward == "fp8" else "bf16"
    precision = replace(given, storage="int8", rowwise=False, backward=backward, matmul="auto")
    planner = Planner(workload_of(config, True, precision=precision, num_gpus=len(now.peaks)))
    seconds = planner.predict(now.choice).seconds(on), now.seconds(on)
    if seconds[0] >= seconds[1]:
        return ""
    return f"With precision=int8 a step is predicted to take {seconds[0]:.2f} s instead of {seconds[1]:.2f} s."


def free_bytes(device: torch.device) -> int:
    """Return the free memory of a GPU, or of the host for a CPU, including what a previous sweep job left."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return free + SHARED.held(device)


def free_host_memory(gpu_memory_gb: float) -> str:
    """Return what a plan on a CPU is for: the size of a GPU on which as much is free."""
    return f"{gigabytes((gpu_memory_gb - CONTEXT_GB) * GIB)} of free host memory"


def gpu_name(device: torch.device) -> str | None:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def limit_of(memory: Mapping[str, Any], gpu_memory_gb: float) -> int:
    """Return the bytes that tensors can use, with the headroom of the group `memory`."""
    return usable(gpu_memory_gb, memory.get("headroom_gb", HEADROOM_GB))


def headroom_text(memory: Mapping[str, Any]) -> str:
    headroom = memory.get("headroom_gb", HEADROOM_GB)
    return f"; memory.headroom_gb={headroom:g} is left to other programs" if headroom else ""


def memory_size(config: RunConfig, memory: Mapping[str, Any]) -> float:
    """Return the memory of the GPU to plan for in GB: that of the group `memory`, or what is free.

    That is the minimum of all processes, so that all choose the same, and of all their devices.
    """
    if memory.get("gpu_memory_gb") not in (None, FREE):
        return float(memory["gpu_memory_gb"])
    return round(least_of(config, min(map(free_bytes, config.devices))) / GIB + CONTEXT_GB, 1)


def least_of(config: RunConfig, own: float) -> float:
    """Return the minimum of a number of all processes; all must call this."""
    if config.accelerator.num_processes == 1:
        return own
    numbers = torch.tensor([float(own)], dtype=torch.float64, device=config.accelerator.device)
    return config.accelerator.gather(numbers).min().item()


def fastest_batch(
    config: RunConfig, memory: Mapping[str, Any], gpu_memory_gb: float, name: str | None, num_gpus: int | None = None
) -> tuple[int, str]:
    """Return the batch size that is predicted to train images fastest on a GPU, and a message.

    It is the smallest of `BATCHES` whose time per image is within `LEAST_GAIN` of the best; 1 if nothing fits. With a
    `gpu_memory_gb` in the group `memory`, its null keys are chosen for each.
    """
    limit, on, seconds = limit_of(memory, gpu_memory_gb), gpu(name, gpu_memory_gb), dict[int, float]()
    for size in BATCHES:
        if config.prior is not None and not config.prior.allows(size):
            continue
        planner = Planner(workload_of(config.with_batch_size(size), True, on.fp8 is not None, num_gpus=num_gpus))
        if memory.get("gpu_memory_gb") is not None:
            best = choose(planner, fixed_keys(memory), limit, on)
        else:
            best = planner.predict(choice_of(memory))
        if best is None or best.training > limit:
            break
        seconds[size] = best.seconds(on) / size
    chosen = min((n for n in seconds if seconds[n] <= (1 + LEAST_GAIN) * min(seconds.values())), default=1)
    each = ", ".join(f"{value:.2f} s with {size}" for size, value in seconds.items())
    return chosen, f"batch_size={chosen}: predicted for an image on {on.name}: {each or 'nothing fits'}"


def planned(config: RunConfig, memory: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Return the group `memory` with its nulls chosen, and a message. Raise ValueError if nothing fits."""
    device = config.accelerator.device
    gpu_memory_gb, where = memory_size(config, memory), ""
    if memory["gpu_memory_gb"] == FREE and device.type == "cpu":
        where = free_host_memory(gpu_memory_gb)
    planner = Planner(workload_of(config, device.type == "cuda"))
    on, fixed, limit = gpu(gpu_name(device), gpu_memory_gb), fixed_keys(memory), limit_of(memory, gpu_memory_gb)
    best = choose(planner, fixed, limit, on)
    if best is None:
        named = f"memory=auto, {where}" if where else f"memory.gpu_memory_gb={gpu_memory_gb:g}"
        message = does_not_fit(planner, fixed, limit, usable(gpu_memory_gb, 0), named, on)
        hint = split_hint(config, memory, None, gpu_memory_gb, on) if device.type == "cuda" else ""
        raise ValueError(f"{message} {hint}".strip())
    chosen = {key: value for key, value in settings_of(best.choice).items() if key in memory}
    chosen |= {"split": list(best.split)} if best.split else {}
    gpus = f"{len(best.split)} GPUs of " if best.split else ""
    why = (
        f"memory for {where or f'{gpus}{gpu_memory_gb:g} GB'}: {best.settings}, the fastest that is predicted to fit "
        f"({' and '.join(map(gigabytes, best.peaks))} of {gigabytes(limit)}{headroom_text(memory)})"
    )
    hints = [lighter(planner, on)] if best.moved else []  # weights or activations leave the device
    if planner.job.on_gpu:
        hints.append(faster(config, best, on))
    why = ". ".join([why, *(hint.removesuffix(".") for hint in hints if hint)])
    return dict(memory) | chosen | {"gpu_memory_gb": gpu_memory_gb}, why


def planned_text_encoder(config: RunConfig, is_cached: Callable[[str | None], bool]) -> tuple[TextEncoderChoice, str]:
    """Return the choice of `text_encoder` that fits the memory of `config`, and a message if it is not the default.

    `is_cached` tells whether all prompts are encoded with a storage, so that its memory does not matter. Raises
    ValueError if nothing fits.
    """
    memory, given, device = config.composed["memory"], config.composed["text_encoder"], config.accelerator.device
    job, size = workload_of(config, device.type == "cuda"), memory["gpu_memory_gb"]
    limit, libraries = limit_of(memory, size), LIBRARIES if job.on_gpu else 0.0
    host = least_of(config, psutil.virtual_memory().available / config.accelerator.num_processes)  # each loads its own
    chosen = first_fit(job, given, limit, host, libraries, is_cached)
    where = f"{size:g} GB" if job.on_gpu else free_host_memory(size)
    choices = list(text_encoder_choices(given, job.on_gpu))
    if chosen is None:
        last = choices[-1]
        needed, on_cpu = sum(prompt_bytes(job, last.storage)), f" and {gigabytes(host)} in host memory" * job.on_gpu
        raise ValueError(
            f"text_encoder: the text encoder{f' {last.words}' if last.words else ''} is predicted to need "
            f"{gigabytes(needed)}, and {gigabytes(limit)}{on_cpu} can be used. {ELSEWHERE}"
        )
    if chosen == choices[0]:
        return chosen, ""
    differs = "; other embeddings than in full" if chosen.storage != choices[0].storage else ""
    return chosen, (
        f"text encoder {chosen.words}, so that it fits {where}{differs}. Set text_encoder.storage and "
        "text_encoder.device to choose"
    )


def planned_split(config: RunConfig) -> tuple[dict[str, Any], str]:
    """Return the group `memory` with memory.split=auto replaced by numbers of blocks, and a message."""
    memory = config.composed["memory"]
    best = Planner(workload_of(config, on_gpu=True)).predict(choice_of(memory))
    why = f"{best.settings}: predicted to need {' and '.join(map(gigabytes, best.peaks))}"
    return dict(memory) | {"split": list(best.split)}, why


def split_hint(
    config: RunConfig, memory: Mapping[str, Any], now: Prediction | None, gpu_memory_gb: float, on: Gpu
) -> str:
    """Return a sentence if all visible GPUs fit what one does not fit, or only with offload; otherwise empty.

    `now` is the best choice for one GPU of `gpu_memory_gb`.
    """
    gpus = torch.cuda.device_count()
    is_possible = gpus > 1 and config.memory.split is None and not config.processes.sharded
    if not is_possible or (now is not None and not now.moved):
        return ""
    planner = Planner(workload_of(config, on_gpu=True, num_gpus=gpus))
    best = choose(planner, fixed_keys(memory), limit_of(memory, gpu_memory_gb), on)
    if best is None:
        return ""
    return (
        f"memory.split={AUTO} would divide the model over the {gpus} GPUs of this machine and offload nothing, with "
        f"{best.settings}: {best.seconds(on):.2f} s a step, predicted."
    )


def still_fits(config: RunConfig, kept: Mapping[str, Any]) -> bool:
    """Return whether the group `memory` of a resumed run agrees with the current settings and still fits."""
    chosen, given = set(CHOSEN) & kept.keys(), fixed_keys(config.given_memory)
    if kept.get("gpu_memory_gb") is None or any(kept.get(key) != value for key, value in given.items()):
        return False
    split = config.given_memory.get("split")  # with `auto`, numbers for as many GPUs as now
    wanted = config.memory.split if split != AUTO else kept.get("split")
    if kept.get("split") != wanted or len(kept.get("split") or []) != len(config.memory.parts):
        return False
    if any(kept[key] is None for key in chosen - {"budget_gb"}) or chosen != set(CHOSEN) & config.given_memory.keys():
        return False
    planner = Planner(workload_of(config.with_memory(dict(kept)), config.accelerator.device.type == "cuda"))
    if kept.get("cache_transposed_weights") and not planner.has_layouts:
        return False
    return planner.predict(choice_of(kept)).training <= limit_of(kept, config.composed["memory"]["gpu_memory_gb"])


def advice(config: RunConfig, error: OutOfMemory) -> str:
    """Return advice after out of memory: the planner's next smaller setting, or how to make the encoders smaller."""
    if error.phase == "prompts":
        return (
            "Quantize the text encoder (text_encoder.storage=nf4), encode in host memory (text_encoder.device=cpu), "
            "use one on another machine (text_encoder=remote), or fill the cache where there is more memory "
            "(train/cache.py)."
        )
    if error.phase == "images":
        return "Set a smaller buckets.resolution or reference_resolution."
    device = config.accelerator.device
    planner, now = Planner(workload_of(config, device.type == "cuda")), choice_of(config.composed["memory"])
    on = gpu(gpu_name(device), free_bytes(device) / GIB + CONTEXT_GB)
    before = planner.predict(now).training
    smaller_choice = step_down(planner, now, on, max(error.asked - error.free, LEAST_STEP * before))
    if smaller_choice is None:
        return smaller(planner, on)
    after = planner.predict(smaller_choice).training
    return f"Set {smaller_choice} (predicted: {after / 1e9:.1f} GB instead of {before / 1e9:.1f} GB)."
