"""Search for the memory settings that fit and are fastest, and for the next smaller ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import product
from typing import Any

from flux2.memory.activation_checkpointing import POLICIES
from flux2.utils.text import gigabytes
from train.config.memory import Choice
from train.planner.gpus import Gpu
from train.planner.prediction import Prediction
from train.planner.predictor import Planner


def policies(planner: Planner, fixed: Mapping[str, Any]) -> Iterator[tuple[str, float | None]]:
    """Yield checkpointing policies with their budgets, budgets from the most kept blocks to the fewest."""
    for policy in [fixed["checkpointing"]] if "checkpointing" in fixed else POLICIES:
        if policy != "budget":
            yield policy, None
        elif "budget_gb" in fixed:
            yield policy, fixed["budget_gb"]
        else:
            yield from ((policy, planner.budget_for(count)) for count in range(len(planner.weights) - 1, 0, -1))


def choices(planner: Planner, fixed: Mapping[str, Any], limit: float) -> Iterator[Prediction]:
    """Yield predictions of choices with `fixed` keys that fit `limit` bytes, with the fewest streamed blocks each."""
    if planner.job.num_shards > 1 or planner.job.num_gpus > 1:  # these do not work together
        fixed = {**fixed, "offload_blocks": 0, "offload_activations": False}
    if not planner.job.on_gpu:  # offloading moves nothing out of host memory
        fixed = {"offload_blocks": 0, "offload_activations": False, **fixed}

    def options(key: str, default: Iterable[Any]) -> Iterable[Any]:
        return [fixed[key]] if key in fixed else default

    for policy, budget in policies(planner, fixed):
        # block inputs are a small part of the activations with these policies
        offloads = options("offload_activations", [False] if policy in ("none", "budget") else [False, True])
        # with less recompute, copies are hidden less
        few = policy == "budget" and "checkpointing" not in fixed
        numbers = options("offload_blocks", [0] if few else range(len(planner.weights) + 1))
        layouts = options("cache_transposed_weights", [True, False] if planner.has_layouts else [False])
        for away, both in product(offloads, layouts):
            for number in numbers:
                prediction = planner.predict(Choice(policy, budget, number, away, both))
                if prediction.training <= limit:
                    yield prediction
                    break


def choose(planner: Planner, fixed: Mapping[str, Any], limit: float, on: Gpu) -> Prediction | None:
    """Return the fastest choice that fits `limit` bytes in training; of equally fast ones, the one that moves least."""
    found = choices(planner, fixed, limit)
    return min(found, key=lambda p: (round(p.seconds(on), 6), p.moved, p.training), default=None)


def step_down(planner: Planner, now: Choice, on: Gpu, short: float = 0.0) -> Choice | None:
    """Return the fastest choice that needs at least `short` bytes less than `now`, or None."""
    best = choose(planner, {}, planner.predict(now).training - max(short, 1.0), on)
    return None if best is None else best.choice


def does_not_fit(planner: Planner, fixed: Mapping[str, Any], limit: float, most: float, where: str, on: Gpu) -> str:
    """Return the error message if no choice fits `limit` bytes, with the smallest choice and other ways to save memory.

    `most` are the bytes without memory.headroom_gb, and `where` names the memory.
    """
    least = min(choices(planner, fixed, float("inf")), key=lambda p: p.training)
    can_stream = planner.job.num_shards == planner.job.num_gpus == 1 and planner.job.on_gpu
    streams = "offload_blocks" not in fixed and can_stream
    for number in range(len(planner.weights) + 1) if streams else []:
        more = planner.predict(replace(least.choice, offload_blocks=number))
        least = min(least, more, key=lambda p: p.training)
    would_fit = least.training <= most
    headroom = "It would fit with memory.headroom_gb=0, which leaves nothing to other programs. " if would_fit else ""
    return (
        f"{where}: this run does not fit. With {least.settings} it is predicted to need {gigabytes(least.training)} of "
        f"{gigabytes(limit)}{' on a GPU' if least.split else ''}. {headroom}{smaller(planner, on)}"
    )


def lighter(planner: Planner, on: Gpu) -> str:
    """Return a sentence with the precisions that make the base smaller, in 8 bits the faster one; empty if none do."""
    element = {"fp32": 4, "bf16": 2, "fp8": 1, "int8": 1, "nf4": 0.516}  # bytes per weight, including scales
    eight_bits = "int8" if not planner.job.on_gpu or on.int8 > (on.fp8 or 0) else "fp8"
    now = element[planner.job.precision]
    weights = sum(planner.weights) / now
    savings = [
        f"{gigabytes(weights * (now - element[name]))} smaller with precision={name}"
        for name in (eight_bits, "nf4")
        if element[name] < now
    ]
    return f"The base would be {', '.join(savings)}." if savings else ""


def smaller(planner: Planner, on: Gpu) -> str:
    """Return the ways to save memory outside the group `memory`."""
    ways = ["batch_size=1 with more gradient_accumulation"] if planner.job.rows - planner.job.held > 1 else []
    ways.append("a smaller buckets.resolution")
    return f"{lighter(planner, on)} A run needs less with {' or '.join(ways)}.".strip()
