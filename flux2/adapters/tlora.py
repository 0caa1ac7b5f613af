"""T-LoRA: a LoRA whose active rank depends on the timestep (flux2/layers/rank_schedule.py).

Its weights are those of a LoRA, and no format of others has its schedule: the header of PEFT's file records it. Only
`flux2.adapters.load` reads it; exporting and merging are refused, because all directions would be used at every
timestep.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import peft

from flux2.adapters.formats import AdapterError
from flux2.adapters.settings import Targets, check_integer, is_number, require
from flux2.adapters.tuners import HOOK, adapter_layers, attach
from flux2.layers.rank_schedule import RankSchedule
from flux2.models.transformer import Transformer

HEADER = "flux2_lora.rank_schedule"  # key of the header of PEFT's file
EXPONENTS = 0.01, 100  # beyond these limits all timesteps have nearly the same rank


def attach_tlora(
    model: Transformer,
    *,
    rank: int = 16,
    min_rank: int = 1,
    exponent: float = 1.0,
    alpha: float | None = None,
    targets: Targets = "blocks",
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    seed: int = 0,
    name: str = "default",
) -> peft.PeftModel:
    """Attach a new T-LoRA, which changes nothing at first.

    Args (others as in `attach`):
        rank: Number of directions at timestep 0.
        min_rank: Number of directions at timestep 1, at least 1 and less than the rank of any layer.
        exponent: Above 1 there are fewer directions in between, below 1 more.
    """
    check_integer("min_rank", min_rank)
    is_valid = is_number(exponent) and EXPONENTS[0] <= exponent <= EXPONENTS[1]
    require("exponent", exponent, is_valid, f"a number from {EXPONENTS[0]:g} to {EXPONENTS[1]:g}")
    least = min([check_integer("rank", rank), *(rank_pattern or {}).values()])
    if min_rank >= least:
        raise AdapterError(
            f"adapter.min_rank={min_rank} must be less than the rank of every layer, and the least is {least}: "
            "otherwise all directions are always active. Lower it, or use adapter=lora"
        )
    ranks = {"rank_pattern": rank_pattern, "alpha_pattern": alpha_pattern}
    wrapped = attach(model, rank=rank, alpha=alpha, targets=targets, **ranks, seed=seed, name=name)  # type: ignore[arg-type]
    set_schedule(model, RankSchedule(min_rank, float(exponent)))
    return wrapped


def set_schedule(model: Transformer, schedule: RankSchedule) -> None:
    """Give the LoRA layers of `model` a schedule, which sees the timesteps of each forward."""
    for layer in adapter_layers(model).values():
        layer.rank_schedule = schedule
    vars(model)[HOOK] = model.register_forward_pre_hook(schedule.observe, with_kwargs=True)


def schedule_of(model: Transformer) -> RankSchedule | None:
    """Return the schedule of the adapters of `model`, if they have one."""
    found = (getattr(layer, "rank_schedule", None) for layer in adapter_layers(model).values())
    return next((schedule for schedule in found if schedule is not None), None)


def header(model: Transformer) -> dict[str, str]:
    """Return the entry of the header of a saved adapter; empty without a schedule."""
    schedule = schedule_of(model)
    if schedule is None:
        return {}
    return {HEADER: json.dumps({"min_rank": schedule.min_rank, "exponent": schedule.exponent})}


def read_schedule(metadata: Mapping[str, str]) -> RankSchedule | None:
    """Return the schedule in the header of a file; None without one. Raises AdapterError if it is invalid."""
    if HEADER not in metadata:
        return None
    try:
        values = json.loads(metadata[HEADER])
        schedule = RankSchedule(check_integer("min_rank", values["min_rank"]), float(values["exponent"]))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise AdapterError(f"its header has an invalid {HEADER}: {metadata[HEADER][:100]}") from error
    if not EXPONENTS[0] <= schedule.exponent <= EXPONENTS[1]:
        raise AdapterError(f"its header has an invalid {HEADER}: {metadata[HEADER][:100]}")
    return schedule
