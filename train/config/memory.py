"""The keys of the group `memory` that the planner chooses when they are null, as a `Choice`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# keys of `memory` that may be null
CHOSEN = ("checkpointing", "budget_gb", "offload_blocks", "offload_activations", "cache_transposed_weights")
# memory.compile: true where that is predicted to save time; memory.split: as even as memory allows; memory.kernels:
# triton where it works
AUTO = "auto"
FREE = "free"  # memory.gpu_memory_gb: the memory that is free on this device
HEADROOM_GB = 0.7  # GiB that memory.headroom_gb leaves to what a desktop takes later, such as a browser


@dataclass(frozen=True)
class Choice:
    """Values for the keys of `memory` that the planner can choose."""

    checkpointing: str = "full"
    budget_gb: float | None = None
    offload_blocks: int | float = 0
    offload_activations: bool = False
    cache_transposed_weights: bool = False

    def __str__(self) -> str:
        """Return the overrides for this choice, without the keys that are off."""
        used = {"checkpointing": True, "budget_gb": self.checkpointing == "budget"}
        values = {key: value for key, value in settings_of(self).items() if used.get(key, value)}
        return " ".join(f"memory.{key}={str(value).lower()}" for key, value in values.items())


def fixed_keys(memory: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys of the group that have a value, so that the planner leaves them."""
    return {key: memory[key] for key in CHOSEN if memory.get(key) is not None}


def settings_of(choice: Choice) -> dict[str, Any]:
    """Return all keys of the group that can be chosen."""
    return {key: getattr(choice, key) for key in CHOSEN}


def completed(memory: Mapping[str, Any]) -> dict[str, Any]:
    """Return the group with defaults for the keys that the planner chooses, so that the others can be checked."""
    needed = {"budget_gb": 0.0} if memory.get("checkpointing") == "budget" and memory.get("budget_gb") is None else {}
    chosen = {key: value for key, value in settings_of(choice_of({**memory, **needed})).items() if key in memory}
    return dict(memory) | (chosen if memory.get("gpu_memory_gb") is not None else {})


def choice_of(memory: Mapping[str, Any]) -> Choice:
    """Return the choice of a group `memory` without nulls."""
    return Choice(**fixed_keys(memory))
