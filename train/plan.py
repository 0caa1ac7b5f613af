"""Will it fit, and how long will it take? `python train/plan.py +experiment=tarot [+card=24] [key=value ...]`

Takes the settings of a training run and prints what memory holds in each of its phases, which cards that fits, and what
`memory=auto` would choose there. All of it is predicted from shapes (train/planner/step_memory.py,
train/planner/predictor.py); docs/memory.md says how. It needs no weights, no network and no GPU, and changes nothing.

`+card=24` plans for a card of 24 GB, like `memory=24gb`; otherwise it is planned for the GPU at hand, if there is one.
`shard=true +processes=4` plans for each of four processes that share the base (docs/scaling.md).
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # a script's own folder comes first in sys.path, and ours would hide libraries
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from train.cli.light_imports import import_lightly
    from train.cli.start import start

    start()
    import_lightly()

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from train.cli.app import command
from train.config.instantiate import parse_settings
from train.config.memory import FREE, Choice, choice_of, completed, fixed_keys, settings_of
from train.config.run_config import RunConfig
from train.config.settings import MemorySettings
from train.planner.from_config import job_of, planned_precision
from train.planner.gpus import GIB, SIZES, Gpu, gpu, measured, usable
from train.planner.predictor import Planner, Prediction
from train.planner.search import choose, does_not_fit, lighter
from train.planner.workload import trained
from train.utils.checks import check_count, is_number
from train.utils.text import many

SMALL_CARD = 24  # GB

# ------------------------------------------------------------------ the table


def gigabytes(value: float) -> str:
    return "" if not value else f"{value / 1e9:.2f}" if value < 9.95e8 else f"{value / 1e9:.1f}"


def phase_table(prediction: Prediction, on_gpu: bool) -> Table:
    where = "on the GPU" if on_gpu else "in host memory"
    table = Table(title=f"Predicted memory {where} in GB, with {prediction.choice}", box=SIMPLE, title_justify="left")
    table.add_column("")
    for phase in prediction.phases:
        table.add_column(phase, justify="right")
    names = dict.fromkeys(name for parts in prediction.phases.values() for name in parts)
    for name in names:
        values = [parts.get(name, 0) for parts in prediction.phases.values()]
        if any(values):
            table.add_row(name, *(gigabytes(value) for value in values))
    table.add_section()
    table.add_row("together", *(gigabytes(prediction.total(phase)) for phase in prediction.phases), style="bold")
    return table


def card_table(planners: Callable[[Gpu], Planner], settings: Choice, fixed: Mapping[str, Any]) -> Table:
    """Whether it fits which card as set, and what would be chosen there."""
    table = Table(title="Which card it fits, as predicted", box=SIMPLE, title_justify="left")
    for name in ("card", "caching: prompts", "pictures", "training as set", "memory=auto would choose", "s/step"):
        table.add_column(name, justify="right" if name in ("card", "s/step") else "left")
    for gpu_memory_gb in SIZES:
        limit, on = usable(gpu_memory_gb), gpu(None, gpu_memory_gb)
        planner = planners(on)
        now = planner.predict(settings)
        caching = [
            "" if phase not in now.phases else "yes" if now.total(phase) <= limit else "no"
            for phase in ("prompts", "pictures")
        ]
        found = choose(planner, fixed, limit, on)
        table.add_row(
            f"{gpu_memory_gb} GB",
            *caching,
            "yes" if now.training <= limit else "no",
            "nothing fits" if found is None else str(found.choice).replace("memory.", ""),
            "" if found is None else f"{found.seconds(on):.2f} ({on.name})",
        )
    return table


def describe(planner: Planner, prediction: Prediction, on: Gpu, name: str | None) -> str:
    """One line on the time of a step."""
    shape, job = prediction.choice, planner.job
    found = measured(name, setting(planner, shape)) if job.usual else None
    pictures = (job.rows - job.held) * job.accumulation
    seconds = prediction.seconds(on) if found is None else found * job.accumulation
    said = f"predicted for {on.name}" if found is None else f"measured on {name}, in benchmarks/results"
    flops = sum(prediction.work.flops.values()) / 1e12
    return f"A step of {many(pictures, 'picture')}: {seconds:.2f} s ({said}); {flops:.0f} TFLOP in products"


def setting(planner: Planner, choice: Choice) -> dict[str, Any]:
    """What a file of benchmarks/results says that it measured."""
    job = planner.job
    return {
        "model": job.variant.name,
        "precision": job.precision,
        "pictures": job.rows,
        "image_tokens": job.shape.image,
        "text_tokens": job.shape.text,
        "trained_parameters": sum(parameter.numel() for parameter in trained(job.model)),
        "compile": job.compiled,
        **settings_of(choice),
    }


def main(config: DictConfig) -> None:
    """Print the plan of one configuration."""
    given: dict[str, Any] = OmegaConf.to_container(config, resolve=True, throw_on_missing=False)
    card = given.pop("card", None)
    if card is not None and not is_number(card, low=1):
        raise ValueError(f"card={card!r} must be the size of a card in GB, from 1, as in +card=24")
    processes = given.pop("processes", 1)
    check_count("processes", processes, 1)
    if processes > 1 and given.get("shard") is not True:
        raise ValueError(f"processes={processes} is planned with shard=true: without it each takes what one alone does")
    if processes == 1 and given.get("shard") is True:
        raise ValueError("shard=true spreads the base over several processes: add +processes=4, or how many there are")
    if given.get("device") not in (None, "cpu", "cuda"):
        raise ValueError(f"device={given['device']!r} must be cuda or cpu, or null")
    on_gpu = given.get("device") != "cpu"
    memory = given["memory"]
    if not isinstance(memory, dict):
        raise ValueError(f"memory={memory!r} must be a group of settings, as in conf/train.yaml")
    if memory.get("gpu_memory_gb") is not None and card is None and memory["gpu_memory_gb"] != FREE:
        card = memory["gpu_memory_gb"]
    parse_settings("memory", completed(memory), MemorySettings)
    chooses = memory.get("gpu_memory_gb") is not None
    given["memory"] = completed(memory) | ({"gpu_memory_gb": None} if "gpu_memory_gb" in memory else {})
    given["device"] = "cpu"
    run = RunConfig(OmegaConf.create(given), planned_processes=processes).dry_run()

    gpu_here = torch.cuda.is_available() and on_gpu
    name = torch.cuda.get_device_name() if gpu_here else None
    if card is None and gpu_here:
        card = round(torch.cuda.get_device_properties(0).total_memory / GIB, 1)
    plan = cache(lambda in_fp8: Planner(job_of(run, on_gpu, in_fp8)))

    def planners(on: Gpu) -> Planner:
        """Of the run on such a GPU."""
        return plan(on.fp8 is not None or planned_precision(run, on_gpu).matmul != "fp8")

    planner = planners(gpu(name, card or SIZES[-1]))
    fixed = fixed_keys(memory) if chooses else {}  # without it they are the group's defaults
    console = Console(width=max(120, Console().width), highlight=False)
    now = planner.predict(choice_of(run.config["memory"]))
    if chooses and card is not None:
        found = choose(planner, fixed, usable(card), gpu(name, card))
        now = now if found is None else found
    on = gpu(name, card or next((size for size in SIZES if now.training <= usable(size)), SIZES[-1]))
    planner = planners(on)
    now = planner.predict(now.choice)
    shape, count = planner.job.shape, sum(parameter.numel() for parameter in trained(planner.job.model))
    console.print(
        f"{run.variant.name} in {planner.job.precision}: {many(shape.rows, 'picture')} of {shape.image} tokens "
        f"with {shape.text} of text, {count:,} trained parameters"
        + (f"; of each of {processes} processes, the base being sharded" if processes > 1 else "")
    )
    console.print(phase_table(now, on_gpu))
    host = ", ".join(f"{part} {gigabytes(value)}" for part, value in now.host.items() if value)
    console.print(f"Host memory, predicted: {sum(now.host.values()) / 1e9:.1f} GB ({host})")
    fits = card is None or now.training <= usable(card)
    if not fits:
        console.print(
            f"As set it does not fit {card:g} GB: it takes {now.training / 1e9:.1f} GB, and {usable(card) / 1e9:.1f} "
            "can be used"
        )
    console.print(f"{'' if fits else 'If it fitted: '}{describe(planner, now, on, name)}")
    if "prompts" in now.phases and now.total("prompts") > usable(card or SMALL_CARD):
        console.print(
            f"The text encoder takes {now.total('prompts') / 1e9:.1f} GB once, before training: less with "
            "text_encoder.storage=nf4, nothing here with text_encoder=remote"
        )
    if chooses and card is None and on_gpu:
        console.print("There is no GPU to choose for here: name a card, memory=24gb or +card=24")
    if on_gpu:
        console.print(card_table(planners, now.choice, fixed))
    if card is not None:
        found = choose(planner, fixed, usable(card), gpu(name, card))
        at = f"a card of {card:g} GB" if name is None else name
        if found is None:
            console.print(f"For {at}: {does_not_fit(planner, fixed, card)}")
        else:
            hint = lighter(planner) if found.moved else ""  # weights or activations leave the device
            console.print(f"For {at} memory=auto would choose {found.choice}{'. ' if hint else ''}{hint}")


if __name__ == "__main__":
    command(main)
