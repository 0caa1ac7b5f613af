"""Write the card of a trained adapter, adapter/README.md: what it is, how it was trained, and how to use it.

The Hub reads its first lines. Every run writes one, without secrets, to be read before anything is published.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import huggingface_hub

from flux2.adapters.files import DIFFUSERS_FILE, PEFT_FILE
from flux2.models.variants import Variant
from flux2.utils.files import write_text
from flux2.weights.sources import looks_local
from train.checkpoints.resume_command import NOT_REPEATED
from train.evaluation.recommend import count_samples, percent, validations, what_is_unfit
from train.reports.run_report import launch_command
from train.utils.redact import masked, masked_command, masked_text
from train.utils.text import many
from train.validation.sample_grid import sample_grids

CARD, SHEET, BASE_SHEET = "README.md", "samples.png", "samples_base.png"
LIBRARIES = ("torch", "peft", "diffusers")
DIFFUSERS = """\
import torch
from diffusers import {pipeline}

pipe = {pipeline}.from_pretrained("{repo}", torch_dtype=torch.bfloat16)
pipe.load_lora_weights("{place}", weight_name="{file}")
pipe({image}prompt={prompt}).images[0]"""
COMFYUI = """\
ComfyUI has its own names for the layers. flux2-lora writes a file with them, for `models/loras`:

```sh
python -m flux2.export {folder} --format comfyui --out {name}.safetensors
```
"""


@dataclass(frozen=True)
class ModelCardData:
    """What a card says about a run."""

    name: str
    variant: Variant
    config: Mapping[str, Any]  # resolved
    samples: int  # number of training images
    images: int  # per step
    device: str
    precision: str
    prompts: Sequence[str] = field(default_factory=list)
    edits: bool = False
    overrides: Sequence[str] | None = None  # the command line after the script; None if there was none
    processes: int = 1
    place: str | None = None  # repository of the adapter on the Hub, if it is known


def plain(text: str) -> str:
    """Return `text` on one line, masked, with the signs escaped that Markdown or HTML would take for markup."""
    return re.sub(r"([\\`*_\[\]<>&|~#])", r"\\\1", masked_text(" ".join(text.split())))


def code(text: str) -> str:
    """Return `text` as code in a line: between more backticks than it has in a row."""
    line = masked_text(" ".join(text.split()))
    fence = "`" * (longest_run(line) + 1)
    space = " " if "`" in line else ""
    return f"{fence}{space}{line}{space}{fence}"


def code_block(language: str, text: str) -> str:
    """Return `text` as a block of code, which no line of it ends."""
    fence = "`" * max(3, longest_run(text) + 1)
    return f"{fence}{language}\n{text}\n{fence}\n"


def longest_run(text: str) -> int:
    return max(map(len, re.findall("`+", text)), default=0)


def triggers(dataset: Mapping[str, Any]) -> list[str]:
    """Return the trigger words of a data set and of those that it mixes."""
    own = (dataset.get("captions") or {}).get("trigger")
    mixed = [word for source in (dataset.get("sources") or {}).values() for word in triggers(source)]
    return list(dict.fromkeys([*([own] if own else []), *mixed]))


def settings(group: Mapping[str, Any]) -> str:
    """Return a group of settings in a line: the name of its class, then its values that are not empty."""
    values = [f"{key}={value}" for key, value in group.items() if key[0] != "_" and value not in (None, [], {})]
    name = str(group.get("_target_", "")).rpartition(".")[2]
    name = "LoRA" if name == "attach" else name.removeprefix("attach_")
    return ", ".join([name, *values]).lstrip(", ")


def metadata(data: ModelCardData, folder: Path) -> str:
    """Return the lines between `---` that the Hub reads."""
    variant, words = data.variant, triggers(data.config["dataset"])
    license_keys: dict[str, Any] = {"license": "apache-2.0"}
    if variant.license:
        license_keys = {
            "license": "other",
            "license_name": "flux-non-commercial-license",
            "license_link": f"https://huggingface.co/{variant.repo}/blob/main/LICENSE.md",
        }
    base = {"base_model": variant.repo, "base_model_relation": "adapter"} if variant.repo else {}
    task = "image-to-image" if data.edits else "text-to-image"
    found = huggingface_hub.ModelCardData(
        **base,
        **license_keys,
        library_name="diffusers" if (folder / DIFFUSERS_FILE).exists() else "peft",
        pipeline_tag=task,
        instance_prompt=masked_text(words[0]) if words else None,
        tags=["flux2", "lora", task],
    )
    return f"---\n{found.to_yaml()}\n---\n"


def training_table(data: ModelCardData, run: Path) -> list[str]:
    """Return the lines of a table that says how the adapter was trained."""
    config = masked(data.config)
    path = config["model"].get("path")
    weights = "" if path is None else ", local weights" if looks_local(path) else f", weights of {code(path)}"
    preservation, target = config.get("preservation", {}), config.get("target", {})
    start = config["adapter"].get("init")
    is_frozen = config["adapter"].get("init_mode") == "frozen"
    how_started = "trained next to, and used with" if is_frozen else "started from"
    rows = {
        "base": f"{data.variant.repo or data.variant.name} ({data.precision}){weights}",
        "images": f"{data.samples}, at {config['buckets']['resolution']} px",
        "steps": f"{config['steps']} of {many(data.images, 'image')}",
        "adapter": code(settings({**config["adapter"], "init": None, "init_mode": None})),
        **({how_started: f"another adapter, {code(Path(start).name)}"} if start else {}),
        "optimizer": code(settings(config["optimizer"])),
        **({"average": f"`ema_decay={config['ema_decay']}`"} if config.get("ema_decay") else {}),
        **({"target": f"{code(settings(target))}, sampled with a guidance scale of 1"} if target.get("scale") else {}),
        **({"preservation": code(settings(preservation))} if preservation.get("weight") else {}),
        "schedule": code(settings(config["schedule"])),
        "seed": config["seed"],
        "device": f"{data.processes} x {data.device}",
        "libraries": ", ".join(f"{name} {found}" for name in LIBRARIES if (found := installed_version(name))),
    }
    if measured := validations(run):
        first, last = measured[0], measured[-1]
        samples = count_samples(last, config["validation"]["held_out"])
        gain = f", {percent(last.mean, first.mean)} against the base" if first.step == 0 and len(measured) > 1 else ""
        rows["validation loss"] = f"{last.mean:.4f} on {samples}{gain}"
    if unfit := what_is_unfit(run):
        rows["not recommended"] = unfit
    escaped = [(key, str(value).replace("|", "\\|")) for key, value in rows.items()]
    return ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in escaped), ""]


def installed_version(library: str) -> str | None:
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def usage(data: ModelCardData, folder: Path) -> list[str]:
    """Return how to use the adapter with this project, with diffusers and with ComfyUI."""
    variant, local = data.variant, "lora" if data.place else "FOLDER"
    prompt = masked_command([data.prompts[0]]) if data.prompts else '"..."'
    fetch = f"hf download {data.place} --local-dir lora\n" if data.place else ""
    image = " --image image.png" if data.edits else ""
    command = f"python -m flux2.generate --model {variant.name} --adapter {local}{image} --prompt {prompt}"
    parts = ["## Use\n", "With flux2-lora:\n", code_block("sh", f"{fetch}{command}")]
    if variant.repo and (folder / DIFFUSERS_FILE).exists():
        text = masked_text(data.prompts[0] if data.prompts else "...")
        example = DIFFUSERS.format(
            pipeline="Flux2KleinPipeline" if "klein" in variant.name else "Flux2Pipeline",
            repo=variant.repo,
            place=data.place or "FOLDER",
            file=DIFFUSERS_FILE,
            image="image=picture, " if data.edits else "",
            prompt=json.dumps(text, ensure_ascii=False),  # JSON's strings are literals of Python too
        )
        parts += ["With diffusers:\n", code_block("python", example)]
    if variant.repo:
        parts.append(COMFYUI.format(folder=local, name=re.sub(r"[^\w.-]+", "_", data.name)))
    return parts


def render(data: ModelCardData, run: Path) -> str:
    """Return the whole card of the adapter in the folder of a run."""
    folder, variant = run / "adapter", data.variant
    base = f"[{variant.repo}](https://huggingface.co/{variant.repo})" if variant.repo else f"`{variant.name}`"
    parts = [metadata(data, folder), f"# {plain(data.name)}\n\nA LoRA for {base}, trained with flux2-lora.\n"]
    if words := triggers(data.config["dataset"]):
        parts.append(f"**Trigger**: {', '.join(map(code, words))} in the prompt.\n")
    if variant.license:
        parts.append(f"**License**: the base model's, {variant.license}, applies to what is made with this adapter.\n")
    for file, title in ((SHEET, "With the adapter"), (BASE_SHEET, "Without it, from the same seeds")):
        if (folder / file).exists():
            parts.append(f"{title}:\n\n![{title}]({file})\n")
    if (folder / SHEET).exists() and data.prompts:
        parts += [*(f"{i}. {plain(prompt)}" for i, prompt in enumerate(data.prompts, 1)), ""]
    parts += usage(data, folder)
    parts += ["## Training\n", *training_table(data, run)]
    if data.overrides is not None:
        parts.append(code_block("sh", launch_command(data.overrides, data.processes, NOT_REPEATED)))
    parts.append("## Files\n")
    if (folder / PEFT_FILE).exists():
        parts.append(f"- `{PEFT_FILE}`, `adapter_config.json`: PEFT, layers named as Black Forest Labs names them")
    if (folder / DIFFUSERS_FILE).exists():
        parts.append(f"- `{DIFFUSERS_FILE}`: for diffusers")
    return "\n".join(parts) + "\n"


def write(data: ModelCardData, run: Path) -> None:
    """Write the card, the first and the last sample grid next to the finished adapter. Raises OSError if it cannot."""
    grids = sample_grids(run)
    last, first = list(grids.values())[-1:], [file for step, file in list(grids.items())[:-1] if step == 0]
    for name, found in ((SHEET, last), (BASE_SHEET, first)):
        (run / "adapter" / name).unlink(missing_ok=True)  # of an earlier end of this run
        for grid in found:
            shutil.copyfile(grid, run / "adapter" / name)
    write_text(run / "adapter" / CARD, render(data, run))
