"""Write captions for images that have none: `python train/caption.py dataset=folder dataset.path=cats [key=value ...]`

A language model that sees describes each image, by default dev's text encoder (docs/data.md). The caption is written
next to the image, or into the metadata.jsonl that names it, as soon as it is made, so an interrupted start resumes. No
caption that exists is changed.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # train/ comes first in sys.path and would hide libraries
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from train.cli.start import start_command

    start_command("caption")  # before the imports below: they take seconds, and --help needs none of them

import os
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig

from data.sources.base import CAPTION_PLACES, CaptionPlace, Source
from flux2.models.text_encoder import check_storage
from flux2.prompts.captioning import (
    MOST_TOKENS,
    TEMPLATES,
    CaptionModel,
    RemoteCaptionModel,
    caption_source,
    is_address,
    load_caption_model,
)
from flux2.prompts.remote_protocol import RemoteError
from flux2.quantization.precision import DTYPES, pick_dtype
from flux2.utils.choices import TextStorage
from flux2.utils.device import pick_device
from flux2.weights.sources import ModelSource, WeightsError
from train.cli.app import command
from train.config.instantiate import check_keys, instantiate, parse_settings, to_plain
from train.utils.caption_files import Change, change_captions
from train.utils.checks import check_count, check_seed
from train.utils.console import say, warn
from train.utils.files import make_writable
from train.utils.network import is_offline
from train.utils.progress import ItemProgress
from train.utils.text import many

SOURCES = ("data.sources.Folder", "data.sources.Pairs")


@dataclass(frozen=True)
class CaptionSettings:
    """The group `caption`, and the keys at the top of conf/caption.yaml."""

    model: str
    template: str
    instructions: str | None
    storage: TextStorage | None
    dtype: str | None
    new_tokens: int

    def __post_init__(self) -> None:
        if self.template not in TEMPLATES:
            raise ValueError(f"caption.template={self.template!r} must be one of {', '.join(TEMPLATES)}")
        for key in ("model", "instructions"):
            if (value := getattr(self, key)) is not None and not value.strip():
                raise ValueError(f"caption.{key}={value!r} is empty. Leave it out, or give a text")
        check_storage(self.storage, "caption.storage")
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ValueError(f"caption.dtype={self.dtype!r} must be one of {', '.join(DTYPES)}, or null")
        if is_address(self.model) and (self.storage or self.dtype):
            key = "storage" if self.storage else "dtype"
            raise ValueError(f"caption.{key} has no effect with a server, which has its own. Start it with --{key}")
        check_count("caption.new_tokens", self.new_tokens, 1, MOST_TOKENS)

    @property
    def system(self) -> str:
        """The system message: that of the template, and the user's own instructions."""
        system = TEMPLATES[self.template].system
        return system if self.instructions is None else f"{system}\n{self.instructions.strip()}"


def find_uncaptioned(dataset: Mapping[str, Any], template: str) -> tuple[Source, list[CaptionPlace]]:
    """Return the source of the group `dataset`, and the samples that it cannot use for want of a caption.

    Raises ValueError for a source that captions cannot be written to, and BadData for other problems of its samples.
    """
    if dataset.get("_target_") not in SOURCES:
        raise ValueError(
            "dataset: captions are written next to the images of a folder. Set dataset=folder or dataset=pairs"
        )
    if dataset.get("prompt") is not None:
        raise ValueError(f"dataset.prompt={dataset['prompt']!r} is used instead of all captions. Omit it")
    places: list[CaptionPlace] = []
    token = CAPTION_PLACES.set(places)
    try:
        source: Source = instantiate("dataset", dataset)
    finally:
        CAPTION_PLACES.reset(token)
    found = [place for place in places if not place.written and not place.reason]
    for one in found:
        assert one.file is not None
        if one.file.suffix == ".csv":
            raise ValueError(f"{one.file}: captions are written to metadata.jsonl alone. Convert it to that format")
        if template == "edit" and not one.sample.references:
            raise ValueError(
                f"caption.template=edit describes the change from references to an image, and {one.sample.name} has no "
                "references. Set dataset=pairs, or caption.template=subject or style"
            )
    return source, found


def write_captions(
    model: CaptionModel, settings: CaptionSettings, places: Sequence[CaptionPlace], seed: int
) -> list[str]:
    """Write a caption for each of `places`, and return what failed, one message for each."""
    failed = []
    edit = settings.template == "edit"
    with closing(ItemProgress("captions")) as progress:
        for done, place in enumerate(places, start=1):
            sample = place.sample
            images = [*(sample.references if edit else ()), sample.target]
            asked: dict[str, Any] = {"seed": seed, "new_tokens": settings.new_tokens, "name": sample.name}
            try:
                pictures = [image.load() for image in images]
                answer = model.describe(pictures, settings.system, TEMPLATES[settings.template].request, **asked)
                change_captions([Change(place, (" ".join(answer.split()),))])  # one line, as captions are
            except ValueError as error:
                if isinstance(error, RemoteError | WeightsError):  # the others would fail likewise
                    raise
                failed.append(f"{sample.name} got no caption: {error}")
                warn(failed[-1])
            progress.update(done, len(places))
    return failed


def load(settings: CaptionSettings, device: torch.device) -> CaptionModel:
    """Return the model of `caption.model`. Raises ValueError, naming the setting, if it cannot be loaded."""
    try:
        if is_address(settings.model):
            return RemoteCaptionModel(settings.model)
        source = caption_source(settings.model)
        if isinstance(source, ModelSource):
            is_offline([source.path])
        return load_caption_model(source, device, pick_dtype(settings.dtype, device), settings.storage)
    except ValueError as error:
        raise ValueError(f"caption.model={settings.model}: {error}") from error


def main(config: DictConfig) -> None:
    """Write the captions that are missing, and print how many."""
    values = to_plain(config)
    groups = {key: values.pop(key) for key in ("dataset", "caption")}
    for key, group in groups.items():
        if not isinstance(group, dict):
            raise ValueError(f"{key}={group!r} must be a group of settings. See conf/caption.yaml")
    check_keys("", values, ("seed", "device"))
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError("one process writes the captions. Start it without a launcher: python train/caption.py")
    settings: CaptionSettings = parse_settings("caption", groups["caption"], CaptionSettings)
    check_seed("seed", values["seed"])
    if is_address(settings.model) and values["device"] is not None:
        raise ValueError(f"device={values['device']!r} has no effect with a server, which has its own. Omit it")
    device = pick_device(values["device"])
    source, places = find_uncaptioned(groups["dataset"], settings.template)
    if not places:
        say(f"nothing to do: all images of {source.where} have captions ({len(source):,})")
        return
    for folder in dict.fromkeys(place.file.parent for place in places if place.file is not None):
        make_writable(folder, "dataset.path")
    say(f"writing {many(len(places), 'caption')} with {settings.model}; images with one: {len(source):,}")
    try:
        failed = write_captions(load(settings, device), settings, places, values["seed"])
    except torch.OutOfMemoryError as error:
        remedy = "Set caption.storage=nf4 for dev, or give a smaller caption.model. Captions so far are kept"
        raise ValueError(f"out of GPU memory ({' '.join(str(error).split())}). {remedy}") from error
    if failed:
        raise ValueError(f"{many(len(failed), 'image')} of {len(places):,} got no caption, see the warnings above")
    say(f"captions  {source.where}")


if __name__ == "__main__":
    command(main, "caption")
