"""Predict the memory and the step time of a training run: `python train/plan.py +experiment=tarot [+card=24]`.

Prints the memory of each phase, the GPUs that it fits, what `memory=auto` would choose there, and how often each image
is trained, if the images are on this machine. Memory and time are predicted from shapes (train/planner/predictor.py,
docs/memory.md), without weights, network or GPU.

`+preview=batch.png` also draws the first samples as they are trained, with buckets, masks, references and captions.
`+card=24` plans for a GPU of 24 GB, like `memory=24gb`; the default is the GPU of this machine, if there is one.
`shard=true +processes=4` plans for each of four processes that share the base (docs/scaling.md), `memory.split=auto
+cards=2` for one process that divides the model over two GPUs (docs/memory.md).
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

if __name__ == "__main__":  # sys.path begins with the script's folder, whose modules would hide libraries
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from train.cli.start import start_command

    start_command()  # before the imports below: they take seconds, and --help needs none of them
    from train.cli.light_imports import import_lightly

    import_lightly()

import gc
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from data.files import user_path
from train.cli.app import command
from train.config.instantiate import parse_settings
from train.config.memory import AUTO, FREE, Choice, choice_of, completed, fixed_keys, settings_of
from train.config.run_config import RunConfig
from train.config.settings import MemorySettings
from train.planner.from_config import (
    faster,
    fastest_batch,
    free_bytes,
    free_host_memory,
    headroom_text,
    limit_of,
    planned_precision,
    split_hint,
    workload_of,
)
from train.planner.gpus import CONTEXT_GB, GIB, SIZES, Gpu, gpu, measured, usable
from train.planner.prediction import Prediction
from train.planner.predictor import Planner
from train.planner.search import choose, does_not_fit, lighter
from train.stages.data import paths
from train.stages.first_batch import check_new, plan_first_batch
from train.utils.checks import check_count, is_number
from train.utils.files import write_whole
from train.utils.text import many

SMALL_GPU = 24  # GB
FEW_TIMES, MANY_TIMES = 20, 300  # that an image is trained


def gigabytes(value: float) -> str:
    return "" if not value else f"{value / 1e9:.2f}" if value < 9.95e8 else f"{value / 1e9:.1f}"


def phase_tables(prediction: Prediction, on_gpu: bool) -> Iterator[Table]:
    """Yield the table of predicted memory by component and phase of each device."""
    for number, phases in enumerate((prediction.phases, *prediction.later_phases)):
        where = "on the GPU" if on_gpu else "in host memory"
        if prediction.split:
            where = f"on GPU {number + 1} of {len(prediction.split)} ({many(prediction.split[number], 'block')})"
        title = f"Predicted memory {where} in GB, with {prediction.settings}"
        table = Table(title=title, box=SIMPLE, title_justify="left")
        table.add_column("")
        for phase in phases:
            table.add_column(phase, justify="right")
        for name in dict.fromkeys(name for parts in phases.values() for name in parts):
            values = [parts.get(name, 0) for parts in phases.values()]
            if any(values):
                table.add_row(name, *map(gigabytes, values))
        table.add_section()
        table.add_row("total", *(gigabytes(sum(parts.values())) for parts in phases.values()), style="bold")
        yield table


GPU_COLUMNS = (
    "GPU", "caching: prompts", "caching: images", "training as set", "memory=auto would choose", "s/step"
)  # fmt: skip


def gpu_rows(plan: Plan) -> Iterator[list[str]]:
    """Yield for each size of GPU whether the run fits as set, and what memory=auto would choose (`GPU_COLUMNS`)."""
    for gpu_memory_gb in SIZES:
        limit, on = limit_of(plan.memory, gpu_memory_gb), gpu(None, gpu_memory_gb)
        planner = plan.planners(on)
        now, best = planner.predict(plan.now.choice), choose(planner, plan.fixed, limit, on)
        totals = [now.total(phase) if phase in now.phases else None for phase in ("prompts", "images")]
        yield [
            f"{gpu_memory_gb} GB",
            *("" if total is None else "yes" if total <= limit else "no" for total in (*totals, now.training)),
            "nothing fits" if best is None else best.settings.replace("memory.", ""),
            "" if best is None else f"{best.seconds(on):.2f} ({on.name})",
        ]


def gpu_table(plan: Plan) -> Table:
    """Return the table of `gpu_rows`."""
    which = f"Which GPUs it fits, {len(plan.now.split)} of a size" if plan.now.split else "Which GPU it fits"
    table = Table(title=f"{which}, as predicted", box=SIMPLE, title_justify="left")
    for name in GPU_COLUMNS:
        table.add_column(name, justify="right" if name in ("GPU", "s/step") else "left")
    for row in gpu_rows(plan):
        table.add_row(*row)
    return table


def describe(planner: Planner, prediction: Prediction, on: Gpu, name: str | None) -> str:
    """Return the images and the time of a step, measured if benchmarks/results has this GPU and setting."""
    job = planner.job
    median = measured(name, setting(planner, prediction.choice)) if job.usual else None
    images = (job.rows - job.held) * job.accumulation
    seconds = prediction.seconds(on) if median is None else median * job.accumulation
    source = f"predicted for {on.name}" if median is None else f"measured on {name}, in benchmarks/results"
    flops = sum(prediction.work.flops.values()) / 1e12
    if not job.on_gpu:
        return f"{many(images, 'image')}: {flops:.2g} TFLOP in matrix products; on a CPU no time is predicted"
    return f"{many(images, 'image')}: {seconds:.2f} s ({source}); {flops:.0f} TFLOP in matrix products"


def total_time(plan: Plan) -> str:
    """Return the predicted time of all steps; empty for a CPU, for which none is predicted."""
    if not plan.on_gpu:
        return ""
    minutes = plan.now.seconds(plan.on) * plan.run.settings.steps / 60
    text = f"{minutes / 60:.1f} hours" if minutes >= 90 else f"{minutes:.0f} minutes" if minutes >= 1 else "a minute"
    steps = many(plan.run.settings.steps, "step")
    return f"{steps} are predicted to take {text}, without encoding, sample grids and validation."


def times_seen(run: RunConfig) -> str:
    """Return how often each image is trained, with a hint at both ends; empty for a dataset that is not here."""
    where = paths(run.composed["dataset"])
    if not all(isinstance(place, str) and user_path(place).exists() for place in where if place is not None):
        return ""
    try:
        samples = run.instantiate("dataset")
    except ValueError as error:
        return f"The images cannot be counted: {error}"
    steps, drawn = run.settings.steps, run.settings.batch_size * run.settings.gradient_accumulation
    count = max(len(samples) - run.validation.held_out, 1)
    seen = steps * drawn * (run.planned_processes or run.accelerator.num_processes) / count
    least = "at least " if run.settings.batch_by == "tokens" else ""  # smaller buckets have larger batches
    text = f"{many(count, 'sample')}, {many(steps, 'step')}: each is trained {least}{seen:.3g} times on average."
    if seen < FEW_TIMES:
        return f"{text} That is little: others report 30 times for a style and 100 for a character (conf/experiment)."
    if seen > MANY_TIMES:
        return f"{text} That is much, and may reproduce the images: keep checkpoints, and hold images out to see when."
    return text


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


def setting(planner: Planner, choice: Choice) -> dict[str, Any]:
    """Return the `setting` of a case in benchmarks/results that measured this job and choice."""
    job = planner.job
    return {
        "model": job.variant.name,
        "precision": job.precision,
        "pictures": job.rows,
        "image_tokens": job.shape.image,
        "text_tokens": job.shape.text,
        "trained_parameters": job.trained_parameters,
        "compile": job.compiled,
        **settings_of(choice),
    }


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
        if self.card is None:
            return None
        return choose(self.planner, self.fixed, self.limit, gpu(self.name, self.card))


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
    if is_chosen and card is not None:
        now = choose(planner, fixed_keys(memory), limit_of(memory, card), gpu(name, card)) or now
    on = gpu(name, card or next((size for size in SIZES if now.training <= limit_of(memory, size)), SIZES[-1]))
    now = planners(on).predict(now.choice)
    return Plan(run, planners, now, on, card, name, memory, on_gpu, processes, batch)


def main(config: DictConfig) -> None:
    """Print the plan of one configuration, and with `preview` draw the first samples as they are trained."""
    preview = check_new(config["preview"]) if "preview" in config else None
    plan = make_plan(OmegaConf.masked_copy(config, [key for key in config if key != "preview"]))
    run, now, planner, card, on_gpu = plan.run, plan.now, plan.planner, plan.card, plan.on_gpu

    # The run and its memory by phase.
    console, shape = Console(width=max(120, Console().width), highlight=False), planner.job.shape
    console.print(
        f"{run.variant.name} in {planner.job.precision}: {many(shape.rows, 'image')} of {shape.image} tokens "
        f"with {shape.text} text tokens, {planner.job.trained_parameters:,} trained parameters"
        + (f"; for each of {plan.processes} processes with a sharded base" if plan.processes > 1 else "")
    )
    for table in phase_tables(now, on_gpu):
        console.print(table)
    host = ", ".join(f"{part} {gigabytes(value)}" for part, value in now.host.items() if value)
    console.print(f"Host memory, predicted: {sum(now.host.values()) / 1e9:.1f} GB ({host})")

    # Whether it fits, and the time of a step.
    target = planned_memory(now, on_gpu, plan.name, card or 0)
    if not plan.fits:
        console.print(
            f"As set it does not fit {f'{card:g} GB' if on_gpu else target}: it needs {now.training / 1e9:.1f} GB"
            f"{' on one of them' if now.split else ''}, and "
            f"only {plan.limit / 1e9:.1f} GB are usable{headroom_text(plan.memory)}"
        )
    console.print(f"{'A' if plan.fits else 'If it did fit, a'} step of {describe(planner, now, plan.on, plan.name)}")
    for hint in (total_time(plan), faster(run, now, plan.on) if on_gpu else "", plan.batch, times_seen(run)):
        console.print(hint, soft_wrap=True, end="\n" if hint else "")
    if "prompts" in now.phases and now.total("prompts") > limit_of(plan.memory, card or SMALL_GPU):
        console.print(
            f"The text encoder needs {now.total('prompts') / 1e9:.1f} GB once, before training. Set "
            "text_encoder.storage=nf4 to reduce this, or text_encoder=remote to run it elsewhere."
        )
    if plan.is_chosen and card is None and on_gpu:
        console.print("This machine has no GPU to choose settings for. Name a size: memory=24gb or +card=24.")

    # What memory=auto would choose.
    if on_gpu:
        console.print(gpu_table(plan))
    if card is not None:
        best = plan.best()
        if best is None:
            where = f"memory.gpu_memory_gb={card:g}" if on_gpu else target
            said = does_not_fit(planner, plan.fixed, plan.limit, usable(card, 0), where, plan.on)
            console.print(f"For {target}: {said}")
        else:
            hint = f". {lighter(planner, plan.on)}" if best.moved else ""  # weights or activations leave the device
            hint = f"{headroom_text(plan.memory)}{hint}".removesuffix(". ")
            console.print(f"For {target} memory=auto would choose {best.settings}{hint}")
        if plan.name is not None and (hint := split_hint(run, plan.memory, best, card, plan.on)):
            console.print(hint)

    if preview is not None:
        write_whole(preview, plan_first_batch(run).sheet())
        console.print(f"The first batch, as it would be trained: {preview}", soft_wrap=True)


if __name__ == "__main__":
    gc.set_threshold(200_000)  # by default garbage collection takes 7 % of the CPU time of a plan
    command(main)
