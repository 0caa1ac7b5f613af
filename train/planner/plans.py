"""The plan of a run: what is predicted for it, and for which memory. `train/plan.py` prints it, the studio draws it."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import psutil
import torch
from omegaconf import DictConfig, OmegaConf

from train.config.instantiate import parse_settings
from train.config.memory import AUTO, FREE, choice_of, completed, fixed_keys
from train.config.run_config import RunConfig
from train.config.settings import MemorySettings
from train.planner.from_config import (
    fastest_batch,
    free_bytes,
    free_host_memory,
    limit_of,
    planned_precision,
    workload_of,
)
from train.planner.gpus import CONTEXT_GB, GIB, SIZES, Gpu, gpu
from train.planner.prediction import Prediction
from train.planner.predictor import LIBRARIES, Planner
from train.planner.search import choose
from train.planner.text_encoder_memory import first_fit
from train.planner.workload import TextEncoderChoice
from train.utils.checks import check_count, is_number


def choose_batch_size(
    run: RunConfig, memory: Mapping[str, Any], card: float | None, name: str | None, cards: int | None
) -> tuple[RunConfig, str]:
    """Return the run with batch_size=auto chosen for a GPU, and what is predicted; otherwise as it is, and nothing."""
    if not run.chooses_batch:
        return run, ""
    if card is None:
        raise ValueError("batch_size=auto is chosen for a GPU. Name its size, as with +card=24, or set a number")
    size, why = fastest_batch(run, memory, card, name, num_gpus=cards)
    return run.with_batch_size(size), why


def planned_memory(prediction: Prediction, on_gpu: bool, name: str | None, card: float) -> str:
    """Return what a plan is for: a GPU by its name or its memory in GB, several of them, or free host memory."""
    if not on_gpu:
        return free_host_memory(card)
    if prediction.split:
        return f"{len(prediction.split)} x {name or f'{card:g} GB'}"
    return name or f"a GPU of {card:g} GB"


def take_cards(given: dict[str, Any]) -> int | None:
    """Remove `cards` from the configuration; return the number of GPUs for memory.split=auto, None without it.

    By default it is the number of visible GPUs, at least two. Raises ValueError for a bad value.
    """
    cards, split = given.pop("cards", None), given["memory"].get("split")
    if given.get("device") == "cpu" and (split is not None or cards is not None):
        what = f"cards={cards}" if split is None else f"memory.split={split}"
        raise ValueError(f"{what} divides a model over GPUs, and this is device=cpu. Omit one of them.")
    if cards is not None:
        check_count("cards", cards, 2)
        if split != AUTO:
            remedy = "Add it" if split is None else f"Set it instead of {split}, or omit cards"
            raise ValueError(f"cards={cards} divides the model over GPUs, which needs memory.split={AUTO}. {remedy}.")
    return (cards or max(2, torch.cuda.device_count())) if split == AUTO else None


def take_options(given: dict[str, Any]) -> tuple[float | None, int]:
    """Remove `card` and `processes` from the configuration and return them. Raise ValueError for a bad value."""
    card, processes = given.pop("card", None), given.pop("processes", 1)
    if card is not None and not is_number(card, low=1):
        raise ValueError(f"card={card!r} must be the memory of a GPU in GB, a number >= 1. Write +card=24.")
    check_count("processes", processes, 1)
    if processes > 1 and given.get("shard") is not True:
        raise ValueError(f"processes={processes} needs shard=true: without it each process needs what one alone needs")
    if processes == 1 and given.get("shard") is True:
        raise ValueError("shard=true shards the base over several processes. Add their number: +processes=4.")
    if given.get("device") is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", str(given["device"])):
        raise ValueError(f"device={given['device']!r} must be cuda, cuda:1 or cpu, or null")
    memory = given["memory"]
    if not isinstance(memory, dict):
        raise ValueError(f"memory={memory!r} must be a group of settings; see conf/train.yaml")
    if card is None and memory.get("gpu_memory_gb") != FREE:
        card = memory.get("gpu_memory_gb")
    parse_settings("memory", completed(memory), MemorySettings)
    return card, processes


@dataclass(frozen=True)
class Plan:
    """What is predicted for a run, and for which memory.

    Attributes:
        planners: Planners by GPU, because not all multiply in FP8.
        now: The prediction for the run as set, or as memory=auto would choose where that is set.
        on: The GPU that times are predicted for.
        card: Its memory in GB; None if no GPU is known.
        name: Its name in CUDA; None for a GPU of that size.
        memory: The group `memory` as given.
        batch: What is predicted for batch_size=auto; empty without it.
    """

    run: RunConfig
    planners: Callable[[Gpu], Planner]
    now: Prediction
    on: Gpu
    card: float | None
    name: str | None
    memory: Mapping[str, Any]
    on_gpu: bool
    processes: int
    batch: str

    @property
    def planner(self) -> Planner:
        return self.planners(self.on)

    @property
    def is_chosen(self) -> bool:
        """Whether the planner chooses keys of the group `memory`."""
        return self.memory.get("gpu_memory_gb") is not None

    @property
    def fixed(self) -> dict[str, Any]:
        return fixed_keys(self.memory) if self.is_chosen else {}  # otherwise its values are the group's defaults

    @property
    def limit(self) -> int:
        """Bytes that tensors can use."""
        return limit_of(self.memory, self.card or 0)

    @property
    def fits(self) -> bool:
        return self.card is None or self.now.training <= self.limit

    def best(self) -> Prediction | None:
        """Return what memory=auto would choose; None if nothing fits or no memory is known."""
        return None if self.card is None else self.best_on(gpu(self.name, self.card), self.limit)

    def best_on(self, on: Gpu, limit: float) -> Prediction | None:
        """Return what memory=auto would choose within `limit` bytes of a GPU; None if nothing fits."""
        planner = self.planners(on)
        best, encoder = choose(planner, self.fixed, limit, on), self.text_encoder(limit)
        return best if best is None or encoder is None else planner.with_text_encoder(best, encoder)

    def text_encoder(self, limit: float) -> TextEncoderChoice | None:
        """Return the text encoder that memory=auto would choose within `limit` bytes; None if none fits.

        Only this machine's host memory is known: a plan for another GPU assumes enough of it.
        """
        has_host = self.name is not None or not self.on_gpu
        host = float(psutil.virtual_memory().available) if has_host else math.inf
        given = self.run.composed["text_encoder"]
        return first_fit(self.planner.job, given, limit, host, LIBRARIES if self.on_gpu else 0.0)


def make_plan(config: DictConfig) -> Plan:
    """Return the plan of a composed configuration, with the options of this command."""
    given: dict[str, Any] = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
    card, processes = take_options(given)
    cards = take_cards(given)
    on_gpu, memory = given.get("device") != "cpu", given["memory"]
    place = torch.device("cuda", torch.device(given.get("device") or "cuda").index or 0)
    is_chosen = memory.get("gpu_memory_gb") is not None
    given["memory"] = completed(memory) | ({"gpu_memory_gb": None} if "gpu_memory_gb" in memory else {})
    given["device"] = "cpu"
    run = RunConfig(OmegaConf.create(given), planned_processes=processes)

    has_gpu = torch.cuda.is_available() and on_gpu
    name = torch.cuda.get_device_name(place) if has_gpu else None
    if card is None and has_gpu:
        card = round(torch.cuda.get_device_properties(place).total_memory / GIB, 1)
    elif card is None and is_chosen and not on_gpu:
        card = round(free_bytes(torch.device("cpu")) / GIB + CONTEXT_GB, 1)
    run, batch = choose_batch_size(run, memory, card if on_gpu else None, name, cards)
    plan = cache(lambda in_fp8: Planner(workload_of(run, on_gpu, in_fp8, num_gpus=cards)))

    def planners(on: Gpu) -> Planner:
        return plan(on.fp8 is not None or planned_precision(run, on_gpu).matmul != "fp8")

    planner = planners(gpu(name, card or SIZES[-1]))
    run.dry_run(planner.job.model)
    now = planner.predict(choice_of(run.composed["memory"]))
    on = gpu(name, card or next((size for size in SIZES if now.training <= limit_of(memory, size)), SIZES[-1]))
    found = Plan(run, planners, planners(on).predict(now.choice), on, card, name, memory, on_gpu, processes, batch)
    best = found.best() if is_chosen else None
    return found if best is None else replace(found, now=best)
