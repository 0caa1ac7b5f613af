"""What to train on a GPU that a run does not fit well: a smaller model, or smaller images."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from omegaconf import DictConfig, OmegaConf

from train.config.paths import CONFIG
from train.planner.gpus import Gpu
from train.planner.plans import Plan, make_plan
from train.planner.prediction import Prediction
from train.utils.files import read_yaml

SMALL_MODEL = "klein_base_4b"
SMALL_SIDE = 512
MUCH = 0.5  # share of the base that streams to a GPU which the run does not fit well
OF_A_PLAN = ("card", "cards", "processes", "preview")  # keys of train/plan.py alone


@dataclass(frozen=True)
class LighterRun:
    """A run that differs in one setting, as memory=auto would train it on the GPU of a plan."""

    override: str
    best: Prediction
    on: Gpu

    def __str__(self) -> str:
        figures = f"{self.best.training / 1e9:.1f} GB and {self.best.host_memory / 1e9:.1f} of host memory"
        return f"{self.override}: {figures}, {self.best.seconds(self.on):.2f} s a step"

    def command(self, overrides: Sequence[str]) -> list[str]:
        """Return the words of `overrides` with what this run has instead."""
        group = self.override.partition("=")[0]
        chooses = any(word.startswith("memory=") and word != "memory=default" for word in overrides)
        replaced = {group, *OF_A_PLAN, *([] if chooses else ["memory"])}
        kept = [word for word in overrides if not keys_of(word) & replaced]
        return [*kept, self.override, *([] if chooses else ["memory=auto"])]


def keys_of(override: str) -> set[str]:
    """Return the key of an override and the group that it is in."""
    key = override.lstrip("+~").partition("=")[0]
    return {key, key.partition(".")[0]}


def streams_much(plan: Plan, best: Prediction | None) -> bool:
    """Return whether nothing fits the GPU of a plan, or more than `MUCH` of the base streams to it."""
    return best is None or best.host["streamed blocks"] > MUCH * sum(plan.planner.weights)


def lighter_runs(config: DictConfig, plan: Plan) -> Iterator[LighterRun]:
    """Yield what fits the GPU of a plan better than the run of `config`; nothing if that fits well.

    A change that does not work with the other settings is left out.
    """
    best = plan.best()
    if plan.card is None or plan.processes > 1 or not plan.on_gpu or not streams_much(plan, best):
        return
    changes = [(f"model={SMALL_MODEL}", "model", read_yaml(CONFIG / "model" / f"{SMALL_MODEL}.yaml"))]
    changes += [(f"buckets.resolution={SMALL_SIDE}", "buckets.resolution", SMALL_SIDE)]
    is_smaller = {"model": plan.run.variant.name not in (SMALL_MODEL, "tiny", "klein_4b")}
    is_smaller["buckets.resolution"] = plan.run.buckets.largest > SMALL_SIDE
    for override, key, value in changes:
        changed = copy.deepcopy(config)
        OmegaConf.update(changed, key, value, merge=False)
        try:
            found = make_plan(changed).best() if is_smaller[key] else None
        except ValueError:
            continue
        if found is not None and (best is None or found.seconds(plan.on) < best.seconds(plan.on)):
            yield LighterRun(override, found, plan.on)
