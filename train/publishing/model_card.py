"""The card of a trained adapter, adapter/README.md: what it is, what it was made from and with, and how it is used.

The Hub reads its first lines. It is written by every run, so that it can be read before anything is published; secrets
are masked (train/utils/redact.py).
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from flux2.adapters.files import DIFFUSERS_FILE, PEFT_FILE
from flux2.models.variants import Variant
from flux2.weights.sources import looks_local
from train.checkpoints.resume_command import REPLACED
from train.evaluation.recommend import percent, validations
from train.utils.redact import masked, masked_command, masked_text
from train.utils.text import many

CARD, SHEET, BASE_SHEET = "README.md", "samples.png", "samples_base.png"
LIBRARIES = ("torch", "peft", "diffusers")
COMFYUI = """\
ComfyUI has names of its own for the layers. flux2-lora writes a file with them, for `models/loras`:

```sh
python -m flux2.export {folder} --format comfyui --out {name}.safetensors
```
"""


@dataclass(frozen=True)
class Facts:
    """What a card says of a run.

    Attributes:
        config: the resolved configuration.
        samples: trained pictures; images: of a step.
        overrides: the words of the command line, behind the entry file; None where there was none.
        place: of the adapter on the Hub, if it is known.
    """

    name: str
    variant: Variant
    config: Mapping[str, Any]
    samples: int
    images: int
    device: str
    precision: str
    prompts: Sequence[str] = field(default_factory=list)
    edits: bool = False
    overrides: Sequence[str] | None = None
    processes: int = 1
    place: str | None = None


def triggers(dataset: Mapping[str, Any]) -> list[str]:
    """The trigger words of a data set and of those that it mixes."""
    own = (dataset.get("captions") or {}).get("trigger")
    mixed = [word for source in (dataset.get("sources") or {}).values() for word in triggers(source)]
    return list(dict.fromkeys([*([own] if own else []), *mixed]))


def settings(group: Mapping[str, Any]) -> str:
    """A group of settings in a line: what is made, then what is not left out."""
    shown = [
        f"{key}={value}" for key, value in group.items() if not key.startswith("_") and value not in (None, [], {})
    ]
    made = str(group.get("_target_", "")).rpartition(".")[2]
    made = {"attach": "LoRA"}.get(made, made.removeprefix("attach_"))
    return ", ".join([made, *shown]).lstrip(", ")


def metadata(facts: Facts, folder: Path) -> str:
    """The lines between `---` that the Hub reads."""
    variant, words = facts.variant, triggers(facts.config["dataset"])
    license: dict[str, Any] = {"license": "apache-2.0"}
    if variant.license:
        license = {
            "license": "other",
            "license_name": "flux-non-commercial-license",
            "license_link": f"https://huggingface.co/{variant.repo}/blob/main/LICENSE.md",
        }
    base = {"base_model": variant.repo, "base_model_relation": "adapter"} if variant.repo else {}
    data = ModelCardData(
        **base,
        **license,
        library_name="diffusers" if (folder / DIFFUSERS_FILE).exists() else "peft",
        pipeline_tag="image-to-image" if facts.edits else "text-to-image",
        instance_prompt=masked_text(words[0]) if words else None,
        tags=["flux2", "lora", "image-to-image" if facts.edits else "text-to-image"],
    )
    return f"---\n{data.to_yaml()}\n---\n"


def training(facts: Facts, run: Path) -> str:
    """The table of what was done."""
    config = masked(facts.config)
    where = config["model"].get("path")
    weights = "" if where is None else ", local weights" if looks_local(where) else f", weights of {where}"
    rows = {
        "base": f"{facts.variant.repo or facts.variant.name} ({facts.precision}){weights}",
        "pictures": f"{facts.samples}, at {config['buckets']['resolution']} px",
        "steps": f"{config['steps']} of {many(facts.images, 'picture')}",
        "adapter": f"`{settings(config['adapter'])}`",
        "optimizer": f"`{settings(config['optimizer'])}`",
        **({"average": f"`ema_decay={config['ema_decay']}`"} if config.get("ema_decay") else {}),
        **({"preservation": f"`{settings(kept)}`"} if (kept := config.get("preservation", {})).get("weight") else {}),
        "schedule": f"`{settings(config['schedule'])}`",
        "seed": config["seed"],
        "device": f"{facts.processes} x {facts.device}",
        "libraries": ", ".join(f"{name} {found}" for name in LIBRARIES if (found := installed(name))),
    }
    measured = validations(run)
    if measured:
        count = len(measured[-1].losses)
        held = config["validation"]["held_out"]
        on = f"{many(count, 'sample')} set aside" if held else many(count, "training sample")
        gain = percent(measured[-1].mean, measured[0].mean) if measured[0].step == 0 else ""
        rows["validation loss"] = f"{measured[-1].mean:.4f} on {on}" + (
            f", {gain} against the base" if gain and len(measured) > 1 else ""
        )
    return "\n".join(
        ["| | |", "|---|---|", *(f"| {key} | {str(row).replace('|', chr(92) + '|')} |" for key, row in rows.items())]
    )


def installed(library: str) -> str | None:
    try:
        return version(library)
    except ImportError:
        return None


def quoted(text: str) -> str:
    """A text of Python in double quotes."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'


def usage(facts: Facts, folder: Path) -> list[str]:
    """How pictures are made with it, here, in diffusers and in ComfyUI."""
    variant, place = facts.variant, facts.place or "FOLDER"
    prompt = masked_command([facts.prompts[0]]) if facts.prompts else '"..."'
    image = " --image picture.png" if facts.edits else ""
    fetch = f"hf download {facts.place} --local-dir lora\n" if facts.place else ""
    local = "lora" if facts.place else "FOLDER"
    command = f"python -m flux2.generate --model {variant.name} --adapter {local}{image} --prompt {prompt}"
    found = ["## Use\n", "With flux2-lora:\n", f"```sh\n{fetch}{command}\n```\n"]
    if variant.repo and (folder / DIFFUSERS_FILE).exists():
        pipeline = "Flux2KleinPipeline" if "klein" in variant.name else "Flux2Pipeline"
        given = "image=picture, " if facts.edits else ""
        words = quoted(masked_text(facts.prompts[0])) if facts.prompts else '"..."'
        found += [
            "With diffusers:\n",
            f"```python\nimport torch\nfrom diffusers import {pipeline}\n\n"
            f'pipe = {pipeline}.from_pretrained("{variant.repo}", torch_dtype=torch.bfloat16)\n'
            f'pipe.load_lora_weights("{place}", weight_name="{DIFFUSERS_FILE}")\n'
            f"pipe({given}prompt={words}).images[0]\n```\n",
        ]
    if variant.repo:
        found += [COMFYUI.format(folder=local, name=re.sub(r"[^\w.-]+", "_", facts.name))]
    return found


def card(facts: Facts, run: Path) -> str:
    """The whole card of the adapter in the folder of a run."""
    folder, variant = run / "adapter", facts.variant
    base = f"[{variant.repo}](https://huggingface.co/{variant.repo})" if variant.repo else f"`{variant.name}`"
    parts = [
        metadata(facts, folder),
        f"# {masked_text(facts.name)}\n",
        f"A LoRA for {base}, trained with flux2-lora.\n",
    ]
    if words := triggers(facts.config["dataset"]):
        shown = ", ".join(f"`{masked_text(word)}`" for word in words)
        parts.append(f"**Trigger**: {shown} in the prompt.\n")
    if variant.license:
        parts.append(f"**License**: the base model's, {variant.license}, applies to what is made with this adapter.\n")
    for file, title in ((SHEET, "With the adapter"), (BASE_SHEET, "Without it, from the same seeds")):
        if (folder / file).exists():
            parts.append(f"{title}:\n\n![{title}]({file})\n")
    if facts.prompts and (folder / SHEET).exists():
        parts.append(
            "\n".join(f"{i}. {masked_text(' '.join(text.split()))}" for i, text in enumerate(facts.prompts, 1))
        )
        parts.append("")
    parts += usage(facts, folder)
    parts += ["## Training\n", training(facts, run), ""]
    if facts.overrides is not None:
        processes = f"--num_processes {facts.processes} " if facts.processes > 1 else ""
        words = [word for word in facts.overrides if word.lstrip("+").partition("=")[0] not in REPLACED]
        parts.append(f"```sh\naccelerate launch {processes}train/run.py {masked_command(words)}".rstrip() + "\n```\n")
    files = {
        f"{PEFT_FILE}`, `adapter_config.json": "PEFT, layers named as Black Forest Labs names them",
        DIFFUSERS_FILE: "for diffusers",
    }
    parts += [
        "## Files\n",
        *(f"- `{name}`: {what}" for name, what in files.items() if (folder / name.split("`")[0]).exists()),
    ]
    return "\n".join(parts) + "\n"


def write(facts: Facts, run: Path) -> None:
    """Put the card, and the first and the last sheet, beside the finished adapter. Raises OSError if it cannot be."""
    sheets = sorted((run / "samples").glob("step_*.png"))
    for name, found in (
        (SHEET, sheets[-1:]),
        (BASE_SHEET, [sheet for sheet in sheets[:-1] if int(sheet.stem[5:]) == 0]),
    ):
        (run / "adapter" / name).unlink(missing_ok=True)  # of an earlier end of this run
        for sheet in found:
            shutil.copyfile(sheet, run / "adapter" / name)
    (run / "adapter" / CARD).write_text(card(facts, run))
