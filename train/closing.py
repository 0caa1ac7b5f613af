"""What a run writes beside its adapter when it ends, and what it says last."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from hydra.core.hydra_config import HydraConfig

from flux2.adapters import unread
from flux2.precision import pick
from train import model_card, report, sweep
from train.hub import push_or_say
from train.recommend import closing_lines
from train.resume import Place
from train.text_encoders import RemoteTextEncoder
from train.tracking import warn

if TYPE_CHECKING:
    from train.run import Run


def note_command(run: Run, place: Place) -> None:
    """Keep the command in the run folder, for its report."""
    if HydraConfig.initialized():
        words, processes = HydraConfig.get().overrides.task, run.accelerator.num_processes
        report.note_command(place.folder, words, processes, goes_on=place.checkpoint is not None)


def write(run: Run, folder: Path, samples: int) -> None:
    """The model card beside the finished adapter, and the report; `samples` were trained on."""
    if not run.accelerator.is_main_process:
        return
    device = run.accelerator.device
    facts = model_card.Facts(
        name=run.settings.name,
        variant=run.variant,
        config=run.config,
        samples=samples,
        images=run.images_per_step,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        precision=run.precision.name,
        prompts=run.sample.prompts,
        edits=bool(run.sample.files),
        overrides=list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else None,
        processes=run.accelerator.num_processes,
        place=run.hub.repo_id if "/" in (run.hub.repo_id or "") else None,
    )
    try:
        model_card.write(facts, folder)
    except (OSError, ValueError) as error:
        warn(f"the card of the adapter could not be written ({error})")
    report.write_or_warn(folder)


def announce(run: Run, adapter: Path) -> None:
    """Say where everything is and how to use it, and push what is to be pushed."""
    if run.accelerator.is_main_process:
        if not sweep.is_sweep():  # which ends with those of its best job
            print(*closing_lines(adapter.parent), sep="\n")
        if run.hub.push:
            print(push_or_say(adapter.parent, run.hub), flush=True)
    run.say(f"adapter   {adapter}")
    if run.accelerator.is_main_process and (note := unread(adapter)):
        run.say(f"formats   {note}")
    run.say(f"numbers   {adapter.parent / 'metrics.jsonl'}")
    if run.sample.prompts and run.settings.sample_every:
        run.say(f"pictures  {adapter.parent / 'samples'}")
    if (adapter.parent / report.REPORT).is_file():
        run.say(f"report    {adapter.parent / report.REPORT}")
    run.say(f"use it    {shlex.join(words_to_generate(run, adapter))}")


def words_to_generate(run: Run, adapter: Path) -> list[str]:
    """The command that draws a picture with the adapter."""
    words = ["python", "-m", "flux2.generate", "--model", run.variant.name]
    for option in ("path", "autoencoder", "text_encoder"):
        if place := getattr(run.model, option):
            words += [f"--{option.replace('_', '-')}", place]
    if isinstance(run.text_encoder, RemoteTextEncoder) and run.text_encoder.protocol is None:
        words += ["--text-encoder", run.text_encoder.url]
    if run.precision.name != pick(None, run.accelerator.device).name:
        words += ["--precision", run.precision.name]
    words += ["--adapter", str(adapter), "--prompt", run.example]
    for path in run.sample.edits[0] if run.sample.prompts else []:
        words += ["--image", path]
    return words
