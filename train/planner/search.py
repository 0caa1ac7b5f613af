"""Search for memory settings that fit: the fastest first, and the next step down."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from flux2.memory.activation_checkpointing import POLICIES
from train.config.memory import Choice
from train.planner.gpus import Gpu, usable
from train.planner.predictor import Planner, Prediction


def policies(planner: Planner, fixed: Mapping[str, Any]) -> Iterator[tuple[str, float | None]]:
    """Ways to recompute, with their budgets; those with a budget from the most blocks kept to the fewest."""
    for policy in [fixed["checkpointing"]] if "checkpointing" in fixed else POLICIES:
        if policy != "budget":
            yield policy, None
        elif "budget_gb" in fixed:
            yield policy, fixed["budget_gb"]
        else:
            budgets = (planner.budget_for(count) for count in range(len(planner.weights) - 1, 0, -1))
            yield from ((policy, budget) for budget in budgets)


def layouts(planner: Planner, fixed: Mapping[str, Any]) -> list[bool]:
    """Whether to keep FP8 weights transposed too."""
    if "cache_transposed_weights" in fixed:
        return [fixed["cache_transposed_weights"]]
    return [True, False] if planner.has_layouts else [False]


def choices(planner: Planner, fixed: Mapping[str, Any], limit: float) -> Iterator[Prediction]:
    """Ways to set the group `memory` that fit `limit` bytes, each with as few streamed blocks as that takes.

    Args:
        fixed: keys of the group that are not to be chosen, with their values.
    """
    total = len(planner.weights)
    if planner.job.shares > 1:  # blocks of a sharded base do not stream
        fixed = {**fixed, "offload_blocks": 0, "offload_activations": False}
    for policy, budget in policies(planner, fixed):
        for away in [fixed["offload_activations"]] if "offload_activations" in fixed else [False, True]:
            if away and policy in ("none", "budget") and "offload_activations" not in fixed:
                continue  # block inputs are little of what is kept then
            numbers = [fixed["offload_blocks"]] if "offload_blocks" in fixed else range(total + 1)
            if policy == "budget" and "checkpointing" not in fixed and len(numbers) > 1:
                numbers = [0]  # what streams must be waited for sooner the less is computed
            for both in layouts(planner, fixed):
                for number in numbers:
                    prediction = planner.predict(Choice(policy, budget, number, away, both))
                    if prediction.training <= limit:
                        yield prediction
                        break


def choose(planner: Planner, fixed: Mapping[str, Any], limit: float, on: Gpu) -> Prediction | None:
    """The fastest choice, as predicted, that fits `limit` bytes while the transformer is loaded; None if none does.

    The same arguments give the same choice. Of those that take as long, it is the one that leaves most on the device.
    """
    found = choices(planner, fixed, limit)
    return min(found, key=lambda p: (round(p.seconds(on), 6), p.moved, p.training), default=None)


def step_down(planner: Planner, now: Choice, on: Gpu, short: float = 0.0) -> Choice | None:
    """The fastest choice that needs less than `now`, by `short` bytes at least; None if there is none."""
    found = choose(planner, {}, planner.predict(now).training - max(short, 1.0), on)
    return None if found is None else found.choice


def does_not_fit(planner: Planner, fixed: Mapping[str, Any], gpu_memory_gb: float) -> str:
    """The error where nothing fits, with what would."""
    least = min(choices(planner, fixed, float("inf")), key=lambda p: p.training)
    streams = "offload_blocks" not in fixed and planner.job.shares == 1
    for number in range(len(planner.weights) + 1) if streams else []:
        more = planner.predict(replace(least.choice, offload_blocks=number))
        least = min(least, more, key=lambda p: p.training)
    return (
        f"memory.gpu_memory_gb={gpu_memory_gb:g}: this run does not fit. With {least.choice} it is predicted to take "
        f"{least.training / 1e9:.1f} GB of {usable(gpu_memory_gb) / 1e9:.1f} GB. {smaller(planner)}"
    )


def lighter(planner: Planner) -> str:
    """Which precisions of the base take less, and how much; empty if none does."""
    element = {"fp32": 4, "bf16": 2, "fp8": 1, "nf4": 0.516}  # bytes of a weight, with its scales
    now = element[planner.job.precision]
    weights = sum(planner.weights) / now
    found = [
        f"{weights * (now - element[name]) / 1e9:.1f} GB smaller with precision={name}"
        for name in ("fp8", "nf4")
        if element[name] < now
    ]
    return f"The base would be {', '.join(found)}." if found else ""


def smaller(planner: Planner) -> str:
    """What else makes a run smaller, when the group `memory` has nothing more to give."""
    ways = ["batch_size=1 with more gradient_accumulation"] if planner.job.rows - planner.job.held > 1 else []
    return f"{lighter(planner)} Less is needed with {' or '.join([*ways, 'a smaller buckets.resolution'])}.".strip()
