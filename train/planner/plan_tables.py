"""Tables of a plan: memory by component and phase, and the GPUs that a run fits."""

from __future__ import annotations

from collections.abc import Iterator

from rich.box import SIMPLE
from rich.table import Table

from train.planner.from_config import limit_of
from train.planner.gpus import SIZES
from train.planner.gpus import gpu as gpu_of
from train.planner.plans import Plan
from train.planner.prediction import Prediction
from train.utils.text import many


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


WIDEST = {"GPU": 14, "memory=auto": 24}  # characters, so that the table fits a terminal of 80
GPU_COLUMNS = ("GPU", "prompts", "images", "as set", "memory=auto", "host", "s/step")


def gpu_rows(plan: Plan) -> Iterator[list[str]]:
    """Yield for each size of GPU whether the run fits as set, and what memory=auto would choose (`GPU_COLUMNS`).

    "prompts" is what encodes them there, if not the text encoder that is set; "host" is in GB.
    """
    for gpu_memory_gb in SIZES:
        limit, on = limit_of(plan.memory, gpu_memory_gb), gpu_of(None, gpu_memory_gb)
        now, best = plan.planners(on).predict(plan.now.choice), plan.best_on(on, limit)
        images, as_set = ("yes" if total <= limit else "no" for total in (now.total("images"), now.training))
        yield [
            f"{gpu_memory_gb} GB {on.name}",
            prompts_cell(plan, limit),
            images,
            as_set,
            "nothing fits" if best is None else best.settings.replace("memory.", ""),
            "" if best is None else f"{best.host_memory / 1e9:.0f}",
            "" if best is None else f"{best.seconds(on):.2f}",
        ]


def prompts_cell(plan: Plan, limit: float) -> str:
    """Return "yes" if the text encoder that is set fits, else what does: int8, nf4, the CPU, or another machine."""
    encoder, given = plan.text_encoder(limit), plan.planner.job.text_encoder
    if not plan.planner.job.text_here:
        return ""
    if encoder is None:
        return "remote"
    return "yes" if encoder == given else " ".join(filter(None, (encoder.device, encoder.storage)))


def gpu_table(plan: Plan) -> Table:
    """Return the table of `gpu_rows`."""
    which = f"Which GPUs it fits, {len(plan.now.split)} of a size" if plan.now.split else "Which GPU it fits"
    title = f"{which}, as predicted; host memory in GB"
    table = Table(title=title, box=SIMPLE, title_justify="left", pad_edge=False, show_edge=False, padding=(0, 1, 0, 0))
    for name in GPU_COLUMNS:
        is_number = name in ("host", "s/step")
        table.add_column(name, justify="right" if is_number else "left", max_width=WIDEST.get(name))
    for row in gpu_rows(plan):
        table.add_row(*row)
    return table
