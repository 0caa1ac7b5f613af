"""The group `memory` as something to choose: which of its keys may be null, and how each way to set it is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# keys of `memory` that may be null
CHOSEN = ("checkpointing", "budget_gb", "offload_blocks", "offload_activations", "cache_transposed_weights")
FREE = "free"  # memory.gpu_memory_gb: whatever is free on the device at hand


@dataclass(frozen=True)
class Choice:
    """A way to set the group `memory`; from the top of `Planner.choices` down each takes less and is slower."""

    checkpointing: str = "full"
    budget_gb: float | None = None
    offload_blocks: int | float = 0
    offload_activations: bool = False
    cache_transposed_weights: bool = False

    def settings(self) -> dict[str, Any]:
        """By their keys, without those that are off."""
        found: dict[str, Any] = {"checkpointing": self.checkpointing}
        if self.checkpointing == "budget":
            found["budget_gb"] = self.budget_gb
        if self.offload_blocks:
            found["offload_blocks"] = self.offload_blocks
        if self.offload_activations:
            found["offload_activations"] = True
        if self.cache_transposed_weights:
            found["cache_transposed_weights"] = True
        return found

    def __str__(self) -> str:
        return " ".join(f"memory.{key}={str(value).lower()}" for key, value in self.settings().items())


def fixed_keys(memory: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of the group that are given and so not to be chosen."""
    return {key: memory[key] for key in CHOSEN if memory.get(key) is not None}


def settings_of(choice: Choice) -> dict[str, Any]:
    """All keys of the group that can be chosen."""
    return {key: getattr(choice, key) for key in CHOSEN}


def completed(memory: Mapping[str, Any]) -> dict[str, Any]:
    """The group with what is to be chosen set to a default, so that the rest can be checked."""
    needed = {"budget_gb": 0.0} if memory.get("checkpointing") == "budget" and memory.get("budget_gb") is None else {}
    choice = choice_of({**memory, **needed})
    chosen = {key: value for key, value in settings_of(choice).items() if key in memory}
    return dict(memory) | (chosen if memory.get("gpu_memory_gb") is not None else {})


def choice_of(memory: Mapping[str, Any]) -> Choice:
    """The choice that a group `memory` without nulls is."""
    return Choice(**fixed_keys(memory))
