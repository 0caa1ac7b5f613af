"""The group `memory` of a run: chosen for the GPU, kept on resume, and changed by advice after out of memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from flux2.memory.compile_blocks import compiler_error
from flux2.memory.kernels import choose_kernels
from flux2.models.variants import Variant, undistilled
from train.checkpoints.resume import RunLocation
from train.config.memory import AUTO, choice_of
from train.config.run_config import RunConfig
from train.planner.compilation import compiles
from train.planner.from_config import (
    advice,
    fastest_batch,
    gpu_name,
    memory_size,
    planned,
    planned_split,
    planned_text_encoder,
    still_fits,
)
from train.planner.workload import TextEncoderChoice
from train.stages.data import TrainingData, embedding_check
from train.utils.console import name_process_in_errors, warn
from train.utils.memory import OutOfMemory


def load_config(config: DictConfig | dict[str, Any]) -> RunConfig:
    """Parse a configuration, choose its memory settings, and check all settings together (`RunConfig.dry_run`)."""
    checked = choose_memory(RunConfig(config)).dry_run()
    words = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    notes = unchosen_model(checked.variant, words), "" if checked.is_saved else distilled_model(checked.variant)
    for note in filter(None, notes if checked.accelerator.is_main_process else ()):
        warn(note)
    return checked


def distilled_model(variant: Variant) -> str:
    """Return a warning if the model to train is one that is distilled to few steps."""
    if (base := undistilled(variant)) is None:
        return ""
    works = f", whose adapters also work with {variant.name}" if base.transformer == variant.transformer else ""
    return (
        f"model={variant.name} is distilled to {variant.steps} steps, which training on it may undo. Train "
        f"model={base.name} instead{works}"
    )


def unchosen_model(variant: Variant, overrides: Sequence[str]) -> str:
    """Return a warning if a dataset is given and the embedded model is trained on it because none was chosen."""
    keys = {word.lstrip("+").partition("=")[0] for word in overrides}
    is_given = any(key == "dataset" or key.startswith("dataset.") for key in keys)
    if variant.name != "tiny" or not is_given or keys & {"model", "model.name", "experiment"}:
        return ""
    return (
        "NO MODEL WAS CHOSEN, so the embedded toy of 4 million parameters is used, which knows only the fourteen "
        "subjects of its own drawings. Set model=dev, klein_base_9b or klein_base_4b, or model=tiny if it is wanted"
    )


def choose_memory(config: RunConfig) -> RunConfig:
    """Return the configuration with `batch_size=auto`, null keys of `memory`, and `split=auto`, chosen by the planner.

    Null keys are chosen if `gpu_memory_gb` is set. Raises ValueError if there are fewer GPUs than `split` needs, and
    for `batch_size=auto` without a GPU.
    """
    is_divided = len(config.devices) > 1
    check_products(config)
    if config.chooses_batch:
        config = choose_batch_size(config)
    if config.memory.gpu_memory_gb is not None:
        chosen, why = planned(config, config.given_memory)
    elif is_divided and config.memory.split == AUTO:
        chosen, why = planned_split(config)
    else:
        return config
    config = config.with_memory(chosen)
    config.say(why)
    return config


def choose_batch_size(config: RunConfig) -> RunConfig:
    device, memory = config.accelerator.device, config.given_memory
    if device.type != "cuda":
        raise ValueError(
            "batch_size=auto is chosen by the predicted time of an image, and none is predicted for a CPU. Set a number"
        )
    size, why = fastest_batch(config, memory, memory_size(config, memory), gpu_name(device))
    config.say(why)
    return config.with_batch_size(size)


def check_products(config: RunConfig) -> None:
    """Raise ValueError if only some GPUs of a divided model multiply in 8 bits: its layers are made for one kind."""
    able = {device: config.precision.multiplies_in_8_bits(device) for device in config.devices}
    if len(set(able.values())) > 1:
        unable = next(device for device, multiplies in able.items() if not multiplies)
        raise ValueError(
            f"memory.split={config.memory.split}: {unable} does not multiply in {config.precision.storage}, as other "
            "GPUs here do. Set precision.matmul=dequantized or precision=int8, or choose equal GPUs with "
            "CUDA_VISIBLE_DEVICES."
        )


def keep_resumed_memory(config: RunConfig, location: RunLocation) -> RunConfig:
    """Return the configuration with the memory settings of the resumed run, if they were chosen and still fit."""
    if location.checkpoint is None or config.memory.gpu_memory_gb is None:
        return config
    before = location.resumed_config.get("memory", {})
    if before == config.composed["memory"] or not still_fits(config, before):
        return config
    config = config.with_memory(before)
    config.say(f"memory settings of the resumed run: {choice_of(before)}")
    return config


def choose_text_encoder(config: RunConfig, location: RunLocation | None = None) -> RunConfig:
    """Return the configuration with the keys of `text_encoder` that are `auto` decided.

    They are as in the run that is resumed, whose embeddings they determine. Otherwise, with `gpu_memory_gb`, the
    planner chooses the first that fits, or that the cache has all prompts of. Raises ValueError if there is none.
    """
    given = config.composed["text_encoder"]
    free = [key for key in ("storage", "device") if given.get(key) == AUTO]
    if not free:
        return config
    if location is not None and location.checkpoint is not None:
        before = location.resumed_config.get("text_encoder", {})
        kept = {key: None if before.get(key) == AUTO else before.get(key) for key in free}
        chosen = TextEncoderChoice(**kept)
        why = f"text encoder {chosen.words}, as in the resumed run" if chosen.words else ""
    elif config.memory.gpu_memory_gb is None:
        chosen, why = TextEncoderChoice(), ""
    else:
        chosen, why = planned_text_encoder(config, embedding_check(config))
    if why:
        config.say(why)
    return config.with_text_encoder({key: getattr(chosen, key) for key in free})


def settle_memory(config: RunConfig, location: RunLocation) -> RunConfig:
    """Return the configuration with what depends on the run that is resumed, if there is one."""
    config = keep_kernels(keep_resumed_memory(config, location), location)
    return choose_text_encoder(config, location)


def choose_compile(config: RunConfig, location: RunLocation, data: TrainingData) -> RunConfig:
    """Return the configuration with memory.compile=auto decided: as in the run that is resumed, else by the saving."""
    if config.memory.compile != AUTO:
        return config
    before = {} if location.checkpoint is None else location.resumed_config.get("memory", {})
    if isinstance(before.get("compile"), bool):
        chosen, why = before["compile"], "as in the resumed run"
    else:
        chosen, why = compiles(config, data.shapes)
    config.say(f"memory.compile={str(chosen).lower()}: {why}")
    return config.with_memory({**config.composed["memory"], "compile": chosen})


def keep_kernels(config: RunConfig, location: RunLocation) -> RunConfig:
    """Return the configuration with memory.kernels decided: auto is as in the run that is resumed, else by a trial.

    Raise ValueError if memory.kernels=triton cannot be used.
    """
    given, resumed = config.given_memory.get("kernels", "torch"), location.checkpoint is not None
    kept = given == AUTO and resumed and location.resumed_config.get("memory", {}).get("kernels", "torch") == "torch"
    chosen = "torch" if kept else choose_kernels(given, config.accelerator.device)
    if given == AUTO:
        config.say(f"memory.kernels={chosen}{': as in the resumed run' if kept else ''}")
    if chosen == config.memory.kernels:
        return config
    return config.with_memory({**config.composed["memory"], "kernels": chosen})


@contextmanager
def memory_advice(config: RunConfig) -> Iterator[None]:
    """Context manager that turns out of memory, and an error of the compiler, into a ValueError with advice."""
    try:
        yield
    except OutOfMemory as error:
        with name_process_in_errors(config.accelerator.process_index):
            raise ValueError(f"{error.what} {advice(config, error)} {error.saved}".strip()) from None
    except Exception as error:
        if not (what := compiler_error(error)):
            raise
        with name_process_in_errors(config.accelerator.process_index):
            raise ValueError(f"PyTorch failed to compile a block ({what}). Set memory.compile=false") from error
