"""Predict the memory and the step time of a training run: `python train/plan.py +experiment=tarot [+card=24]`.

Prints the memory of each phase, host memory and disk, the GPUs that it fits, what `memory=auto` would choose there, and
how often each image is trained, if the images are on this machine. Memory and time are predicted from shapes
(train/planner/predictor.py, docs/memory.md), without weights, network or GPU.

`+preview=batch.png` also draws the first samples as they are trained, with buckets, masks, references and captions.
`+card=24` plans for a GPU of 24 GB, like `memory=24gb`; the default is the GPU of this machine, if there is one.
`shard=true +processes=4` plans for each of four processes that share the base (docs/scaling.md), `memory.split=auto
+cards=2` for one process that divides the model over two GPUs (docs/memory.md).
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # sys.path begins with the script's folder, whose modules would hide libraries
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from train.cli.start import start_command

    start_command()  # before the imports below: they take seconds, and --help needs none of them
    from train.cli.light_imports import import_lightly

    import_lightly()

import gc
from typing import Any

import psutil
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from data.files import user_path
from data.sources import Sample, Source
from flux2.utils.text import gigabytes as size_text
from flux2.utils.text import join_words
from train.cli.app import command
from train.config.memory import Choice, settings_of
from train.config.run_config import RunConfig
from train.planner.disk import too_full, written
from train.planner.from_config import ELSEWHERE, faster, headroom_text, limit_of, split_hint
from train.planner.gpus import Gpu, measured, usable
from train.planner.lighter_runs import lighter_runs
from train.planner.plan_tables import gigabytes, gpu_table, phase_tables
from train.planner.plans import Plan, make_plan, planned_memory
from train.planner.prediction import Prediction
from train.planner.predictor import Planner
from train.planner.search import does_not_fit, lighter
from train.stages.class_data import class_dataset
from train.stages.data import extra_prompts, paths
from train.stages.first_batch import UNDECODED, check_new, plan_first_batch
from train.stages.memory import distilled_model
from train.utils.files import write_whole
from train.utils.text import many

SMALL_GPU = 24  # GB
FEW_TIMES, MANY_TIMES = 20, 300  # that an image is trained


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


def open_samples(run: RunConfig) -> Source | None:
    """Return the samples of a run; None if they are not on this machine. Raises ValueError if they cannot be used."""
    where = paths(run.composed["dataset"])
    if not all(isinstance(place, str) and user_path(place).exists() for place in where if place is not None):
        return None
    samples: Source = run.instantiate("dataset")
    if run.buckets.each_resolution:
        samples.repeat_at(run.buckets.filled)
    return samples


def missing_images(run: RunConfig) -> str:
    """Return that images of a dataset of files are not on this machine; empty if they are, or may be on the Hub."""
    dataset = run.composed["dataset"]
    if str(dataset.get("_target_")).endswith("HuggingFace"):
        return ""
    missing = [place for place in paths(dataset) if isinstance(place, str) and not user_path(place).exists()]
    return f"dataset.path={missing[0]!r} does not exist on this machine" if missing else ""


def about_images(plan: Plan) -> list[str]:
    """Return lines on how often each image is trained, and on the disk that its run takes."""
    try:
        samples = open_samples(plan.run)
    except ValueError as error:
        return [f"The images cannot be counted: {error}", *disk_lines(plan, None)]
    seen = [f"{text}."] if (text := missing_images(plan.run)) else []
    return [*(seen if samples is None else [times_seen(plan.run, samples)]), *disk_lines(plan, samples)]


def disk_lines(plan: Plan, samples: Source | None) -> list[str]:
    """Return lines on what the run writes to disk, and whether there is room; for one image without `samples`."""
    run = plan.run
    images: list[Sample] = [] if samples is None else [*samples, *(class_dataset(run) or [])]
    captions = [caption for sample in images for caption in sample.captions]
    prompts = dict.fromkeys([*captions, "", *extra_prompts(run, samples or [])])
    parts = list(written(run, plan.planner, None if samples is None else images, prompts))
    what = f"Disk, predicted: {size_text(sum(part.size for part in parts))}"
    rest = "" if samples is not None else "; of images, one is counted"
    kinds = f"{', '.join(map(str, parts))}; without sample grids{rest}"
    return [f"{what} ({kinds})", *filter(None, [too_full(parts)])]


def host_text(prediction: Prediction) -> str:
    """Return the host memory of a prediction with its parts."""
    parts = ", ".join(f"{part} {gigabytes(value)}" for part, value in prediction.host_parts.items() if value)
    return f"{prediction.host_memory / 1e9:.1f} GB ({parts})"


def text_encoder_text(plan: Plan) -> str:
    """Return a sentence if the text encoder that is set does not fit, or another one was chosen; else empty."""
    planner, given = plan.planner, plan.planner.job.text_encoder
    limit = plan.limit if plan.card is not None else limit_of(plan.memory, SMALL_GPU)
    parts = planner.encoders(given).get("prompts", {})
    if sum(parts.values()) <= limit:
        return ""
    needed = f"The text encoder needs {sum(parts.values()) / 1e9:.1f} GB once, before training"
    if (chosen := plan.text_encoder(limit)) is None:
        return f"{needed}, and {limit / 1e9:.1f} GB are usable. {ELSEWHERE}"
    other = sum(planner.encoders(chosen).get("prompts", {}).values())
    room = f"{other / 1e9:.1f} GB" if other else "host memory"
    verb = "takes" if plan.is_chosen else "would take"
    return f"{needed}: memory=auto {verb} {chosen.overrides} ({room}); text_encoder=remote encodes elsewhere."


def lacking(plan: Plan, best: Prediction) -> str:
    """Return the memory of this machine, if a plan for its own GPU needs more; otherwise empty."""
    total = psutil.virtual_memory().total
    return f"; this machine has {total / 1e9:.1f} GB" if plan.name is not None and best.host_memory > total else ""


def times_seen(run: RunConfig, samples: Source) -> str:
    """Return how often each image is trained, with a hint at both ends."""
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


def main(config: DictConfig) -> None:
    """Print the plan of one configuration, and with `preview` draw the first samples as they are trained."""
    preview = check_new(config["preview"]) if "preview" in config else None
    config = OmegaConf.masked_copy(config, [key for key in config if key != "preview"])
    plan = make_plan(config)
    run, now, planner, card, on_gpu = plan.run, plan.now, plan.planner, plan.card, plan.on_gpu

    # The run and its memory by phase.
    width, shape = max(120, Console().width), planner.job.shape
    console = Console(width=width, highlight=False, markup=False, emoji=False)
    console.print(
        f"{run.variant.name} in {planner.job.precision}: {many(shape.rows, 'image')} of {shape.image} tokens "
        f"with {shape.text} text tokens, {planner.job.trained_parameters:,} trained parameters"
        + (f"; for each of {plan.processes} processes with a sharded base" if plan.processes > 1 else "")
    )
    for table in phase_tables(now, on_gpu):
        console.print(table)
    console.print(f"Host memory, predicted: {host_text(now)}{lacking(plan, now)}")

    # Whether it fits, and the time of a step.
    target = planned_memory(now, on_gpu, plan.name, card or 0)
    if plan.fits and card is not None:
        console.print(f"It fits {f'{card:g} GB' if on_gpu else target}, as predicted.")
    elif not plan.fits:
        console.print(
            f"As set it does not fit {f'{card:g} GB' if on_gpu else target}: it needs {now.training / 1e9:.1f} GB"
            f"{' on one of them' if now.split else ''}, and "
            f"only {plan.limit / 1e9:.1f} GB are usable{headroom_text(plan.memory)}"
        )
    console.print(f"{'A' if plan.fits else 'If it did fit, a'} step of {describe(planner, now, plan.on, plan.name)}")
    speed = faster(run, now, plan.on) if on_gpu else ""
    for hint in (total_time(plan), speed, plan.batch, *about_images(plan), text_encoder_text(plan)):
        console.print(hint, soft_wrap=True, end="\n" if hint else "")
    if note := distilled_model(run.variant):
        console.print(f"Careful: {note}")
    if plan.is_chosen and card is None and on_gpu:
        console.print("This machine has no GPU to choose settings for. Name a size: memory=24gb or +card=24.")

    # What memory=auto would choose.
    if on_gpu:
        console.print(gpu_table(plan), "")
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
            if best != now:
                console.print(f"It needs host memory of {host_text(best)}{lacking(plan, best)}")
        if plan.name is not None and (hint := split_hint(run, plan.memory, best, card, plan.on)):
            console.print(hint)
        words = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
        for number, other in enumerate(lighter_runs(config, plan)):
            console.print("Lighter on the same GPU:" if number == 0 else "", end="\n" if number == 0 else "")
            console.print(
                f"  {other}\n  {join_words(['python', 'train/run.py', *other.command(words)])}", soft_wrap=True
            )

    if preview is not None:
        write_whole(preview, plan_first_batch(run).sheet())
        console.print(f"The first batch, as it would be trained: {preview}\n{UNDECODED}", soft_wrap=True)


if __name__ == "__main__":
    gc.set_threshold(200_000)  # by default garbage collection takes 7 % of the CPU time of a plan
    command(main)
