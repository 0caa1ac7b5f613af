"""The group `memory` of a run: chosen for the GPU, kept on resume, and changed by advice after out of memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from omegaconf import DictConfig

from train.checkpoints.resume import RunLocation
from train.config.memory import choice_of
from train.config.run_config import RunConfig
from train.planner.from_config import advice, planned, still_fits
from train.utils.console import name_process_in_errors
from train.utils.memory import OutOfMemory


def load_config(config: DictConfig | dict[str, Any]) -> RunConfig:
    """Parse a configuration, choose its memory settings, and check all settings together (`RunConfig.dry_run`)."""
    return choose_memory(RunConfig(config)).dry_run()


def choose_memory(config: RunConfig) -> RunConfig:
    """Return the configuration with the null keys of `memory` chosen by the planner, if `gpu_memory_gb` is set."""
    if config.memory.gpu_memory_gb is None:
        return config
    chosen, why = planned(config, config.given_memory)
    config = config.with_memory(chosen)
    config.say(why)
    return config


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


@contextmanager
def memory_advice(config: RunConfig) -> Iterator[None]:
    """Context manager that turns an out-of-memory error into a ValueError with the planner's advice."""
    try:
        yield
    except OutOfMemory as error:
        with name_process_in_errors(config.accelerator.process_index):
            raise ValueError(f"{error.what} {advice(config, error)} {error.saved}".strip()) from None
