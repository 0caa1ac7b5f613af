"""The end of a run: model card, report, closing output and push to the Hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig

from flux2.adapters.files import UNFINISHED_FILE, format_notes
from flux2.quantization.precision import precision_from_name
from flux2.utils.terminal import show_title
from flux2.utils.text import join_words
from train.checkpoints.checkpoint import checkpoints, step_of
from train.config.run_config import RunConfig
from train.encoding.text_encoders import RemoteTextEncoder
from train.evaluation.recommend import Recommendation, recommend_or_warn
from train.publishing import model_card
from train.publishing.hub import push_or_warn
from train.reports import run_report
from train.sweeps.job import is_sweep
from train.utils.checks import is_number
from train.utils.console import PHASES, UNSAVED, say, warn_unsaved
from train.utils.redact import masked_text
from train.utils.signals import stop_requests
from train.utils.text import duration, many, setting


def write_card_and_report(config: RunConfig, folder: Path, samples: int) -> None:
    """Write the model card next to the finished adapter, and the report. `samples`: number of training samples.

    A stop request has no effect meanwhile; a second one ends the run at once, and `resume=auto` repeats this stage.
    """
    if not config.accelerator.is_main_process:
        return
    with stop_requests():
        write_card(config, folder, samples)
        if run_report.write_or_warn(folder) is None:
            UNSAVED.append(f"the report {folder / run_report.REPORT}")
        if not config.hub.push:  # which `announce` does
            (folder / UNFINISHED_FILE).unlink(missing_ok=True)


def write_card(config: RunConfig, folder: Path, samples: int) -> None:
    """Write the model card, or warn."""
    device, count = config.accelerator.device, len(config.devices)
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    data = model_card.ModelCardData(
        name=config.settings.name,
        variant=config.variant,
        config=config.composed,
        samples=samples,
        images=config.images_per_step,
        device=f"{count} x {kind}" if count > 1 else kind,
        precision=config.precision.recipe,
        prompts=config.sample.prompts,
        edits=bool(config.sample.files),
        overrides=list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else None,
        processes=config.accelerator.num_processes,
        place=config.hub.repo_id if "/" in (config.hub.repo_id or "") else None,
    )
    try:
        model_card.write(data, folder)
    except (OSError, ValueError) as error:
        warn_unsaved(f"the model card could not be written ({error})")


def announce(config: RunConfig, adapter: Path, caption: str, references: Sequence[str] = ()) -> None:
    """Print the results and how to use them, and push with `hub.push`.

    `caption` and `references` are those of a sample, for the command if the run has no sample prompts.
    """
    if not config.accelerator.is_main_process:
        return
    found = recommend_or_warn(adapter.parent)
    show_title(f"{config.settings.name}: {many(config.settings.steps, 'step')}")
    if not is_sweep():  # a sweep ends with the lines of its best job
        say(*found.lines)
    if times := [f"{name} {duration(seconds)}" for name, seconds in PHASES.items() if seconds >= 1]:
        say(f"time      {', '.join(times)}")
    if config.hub.push:
        say(push_or_warn(adapter.parent, config.hub))
        (adapter.parent / UNFINISHED_FILE).unlink(missing_ok=True)
    config.say(f"adapter   {adapter}")
    note = format_notes(adapter)
    if note:
        config.say(f"formats   {note}")
    config.say(f"numbers   {adapter.parent / 'metrics.jsonl'}")
    if config.draws_samples and (adapter.parent / "samples").is_dir():
        config.say(f"samples   {adapter.parent / 'samples'}")
    if (adapter.parent / run_report.REPORT).is_file():
        config.say(f"report    {adapter.parent / run_report.REPORT}")
    if found.unfit:
        config.say(f"careful   the adapter of the last step is not recommended: {found.unfit}")
    if len(config.target.scales) > 1:
        config.say("scales    write --adapter FOLDER:-1 for the other end, and numbers between and beyond")
    config.say(f"best checkpoint: {found.verdict}")
    for what, command_line in next_commands(config, adapter, found, caption, references, exports=not note):
        config.say(f"{what:<10}{command_line}")


def next_commands(
    config: RunConfig,
    adapter: Path,
    found: Recommendation,
    caption: str,
    references: Sequence[str] = (),
    *,
    exports: bool,
) -> list[tuple[str, str]]:
    """Return the commands that come after a run, each with what it does in two words.

    `exports`: whether other programs read what the export writes of this kind of adapter.
    """
    folder, used, commands = adapter.parent, adapter, list[tuple[str, str]]()
    if found.checkpoint is not None and step_of(found.checkpoint) != config.settings.steps:
        used = found.checkpoint / "adapter"
    rate, optimizer = config.composed["optimizer"].get("lr"), str(config.composed["optimizer"].get("_target_"))
    estimates_rate = optimizer.endswith(".Prodigy")  # its lr stays at 1
    if (
        found.rate_factor != 1
        and is_number(rate, 0)
        and HydraConfig.initialized()
        and not (is_sweep() or estimates_rate)
    ):
        words = [word for word in HydraConfig.get().overrides.task if word.partition("=")[0] != "optimizer.lr"]
        words.append(f"optimizer.lr={rate * found.rate_factor:g}")
        processes = config.accelerator.num_processes
        commands.append(("again", run_report.launch_command(words, processes, ("output_dir", "resume"))))
    if checkpoints(folder):
        run = masked_text(setting("run", str(folder)))
        commands.append(("compare", join_words(["python", "train/evaluate.py", run])))
    use = "try it" if found.checkpoint is None and (found.unfit or found.rate_factor != 1) else "use it"
    if use == "use it" and exports:
        adapters = [str(config.adapter.init)] if config.adapter.is_frozen else []
        words = [*adapters, str(used), "--format", "comfyui", "--out", str(folder / "comfyui.safetensors")]
        commands.append(("export", join_words(["python", "-m", "flux2.export", *map(masked_text, words)])))
    commands.append((use, join_words(map(masked_text, words_to_generate(config, used, caption, references)))))
    return commands


def words_to_generate(config: RunConfig, adapter: Path, caption: str, references: Sequence[str] = ()) -> list[str]:
    """Return the command that generates an image with the adapter."""
    words = ["python", "-m", "flux2.generate", "--model", config.variant.name]
    for option in ("path", "autoencoder", "text_encoder"):
        if place := getattr(config.model, option):
            words += [f"--{option.replace('_', '-')}", place]
    if isinstance(config.text_encoder, RemoteTextEncoder) and config.text_encoder.protocol is None:
        words += ["--text-encoder", config.text_encoder.url]
    if config.precision.name != precision_from_name(None, config.accelerator.device).name:
        words += ["--precision", config.precision.name]
    if config.adapter.is_frozen:
        words += ["--adapter", str(config.adapter.init)]
    words += ["--adapter", str(adapter), "--prompt", config.sample.prompts[0] if config.sample.prompts else caption]
    edited = config.sample.edits[0] if config.sample.prompts else []
    for path in edited or references:
        words += ["--image", path or "image.png"]
    return words
