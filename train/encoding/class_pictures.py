"""Class images that the base draws before training, in a folder named by the hash of their recipe.

The next run finds them there, and an interrupted one continues. Their purpose is described in train/objective/prior.py.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from data.cache.prepared import CachedDataset
from data.files import atomic_write
from data.sources import Sample, Source
from data.sources.base import BadData
from data.sources.images import file_picture
from flux2.models.autoencoder import Autoencoder
from flux2.models.pixels import to_images
from flux2.models.transformer import Transformer
from flux2.models.variants import PIXELS_PER_TOKEN, TOKEN_CHANNELS
from flux2.sampling import initial_noise, sample
from flux2.utils.files import name_write_errors
from train.utils.console import name_process_in_errors
from train.utils.files import make_writable
from train.utils.memory import explain_oom, free_memory
from train.utils.progress import ItemProgress
from train.utils.text import many


@dataclass(frozen=True)
class ClassImageRecipe:
    """Everything that determines class images: image i has seed + i and the i-th prompt, in turn."""

    model: str  # fingerprint of the transformer and autoencoder
    precision: str
    prompts: tuple[str, ...]
    seed: int
    width: int
    height: int
    steps: int
    guidance: float

    @property
    def name(self) -> str:
        """Name of the folder."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def prompt(self, index: int) -> str:
        return self.prompts[index % len(self.prompts)]


class ClassPictureFolder(Source):
    """The first `count` class images that the base drew, with their prompts."""

    def __init__(self, folder: Path, recipe: ClassImageRecipe, count: int) -> None:
        super().__init__(str(folder), None, None, False, 0)
        files = [picture_file(folder, index) for index in range(count)]
        self._take(Sample(file_picture(file), (recipe.prompt(index),)) for index, file in enumerate(files))

    def _check_bad(self, new: Sequence[object]) -> None:
        if self.bad:
            listed = "".join(f"\n  {bad}" for bad in self.bad)
            raise BadData(
                f"{len(self.bad)} class images in {self.where} cannot be used:{listed}\n"
                "Delete these files to draw them again"
            )


def picture_file(folder: Path, index: int) -> Path:
    return folder / f"{index:05d}.png"


def latents_file(folder: Path, index: int) -> Path:
    return folder / f"{index:05d}.safetensors"


def has_latents(file: Path, shape: tuple[int, ...]) -> bool:
    """Return whether `file` contains latents of `shape`; a damaged file is written again."""
    try:
        return load_file(file)["latents"].shape == shape
    except (OSError, SafetensorError, KeyError):
        return False


def draw(
    folder: Path,
    recipe: ClassImageRecipe,
    count: int,
    accelerator: Accelerator,
    prepared: CachedDataset,
    transformer: Callable[[], Transformer],
    autoencoder: Callable[[], Autoencoder],
    say: Callable[[str], None],
) -> Source:
    """Draw the missing ones of the first `count` images of a recipe, and return all as a source.

    One model is in memory at a time: the transformer computes the latents of all images, which are stored in files,
    then the autoencoder decodes them. Each process does its share.

    Args:
        folder: Parent of the recipe's folder. Raises ValueError if it cannot be written.
        prepared: Cache with the embeddings of the prompts and of the empty prompt.
        transformer, autoencoder: Functions that load the models; called only if needed.
    """
    place = folder / recipe.name
    height, width = recipe.height // PIXELS_PER_TOKEN, recipe.width // PIXELS_PER_TOKEN

    def latents(index: int, model: Transformer) -> None:
        noise = initial_noise([recipe.seed + index], height, width)
        text, empty = (prepared.embeddings([prompt]).to(accelerator.device) for prompt in (recipe.prompt(index), ""))
        noise = noise.to(accelerator.device)
        sampled = sample(model, noise, text, steps=recipe.steps, guidance=recipe.guidance, empty=empty)
        file = latents_file(place, index)
        with atomic_write(file) as temporary, name_write_errors(file):
            save_file({"latents": sampled[0].cpu()}, temporary)

    def picture(index: int, model: Autoencoder) -> None:
        sampled = load_file(latents_file(place, index))["latents"]
        with torch.no_grad():
            (image,) = to_images(model.decode(sampled[None].to(accelerator.device)))
        with atomic_write(picture_file(place, index)) as temporary:
            image.save(temporary, "PNG")
        latents_file(place, index).unlink(missing_ok=True)

    undecoded = [index for index in range(count) if not picture_file(place, index).exists()]
    shape = (TOKEN_CHANNELS, height, width)
    undrawn = [index for index in undecoded if not has_latents(latents_file(place, index), shape)]
    # the first process decides for all: images that another run draws meanwhile must not change the shares
    undecoded, undrawn = broadcast_object_list([undecoded, undrawn])
    if undecoded:
        with name_process_in_errors(accelerator.process_index):
            make_writable(place, "preservation.folder")
            with atomic_write(place / "recipe.json") as temporary:
                temporary.write_text(json.dumps(asdict(recipe), indent=1), encoding="utf-8")
            for index in set(range(count)).difference(undecoded):  # left by a process that was killed after decoding
                latents_file(place, index).unlink(missing_ok=True)
        kept = count - len(undecoded)
        say(f"drawing {many(len(undecoded), 'class image')} into {place}" + (f"; {kept} exist already" if kept else ""))
    _each(undrawn, transformer, latents, accelerator, "drawn", "samples")
    _each(undecoded, autoencoder, picture, accelerator, "decoded", "images")
    return ClassPictureFolder(place, recipe, count)


def _each(
    missing: Sequence[int],
    load: Callable[[], Any],
    make: Callable[[int, Any], None],
    accelerator: Accelerator,
    what: str,
    phase: str,
) -> None:
    """Call `make` with every missing index of this process's share and the loaded model, then free the model."""
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    if mine:
        doing = explain_oom("while drawing class images", phase, accelerator.device)
        bar = ItemProgress(f"class images {what}", shown=accelerator.is_main_process)
        with name_process_in_errors(accelerator.process_index), doing, closing(bar):
            model = load()
            for done, index in enumerate(mine, 1):
                make(index, model)
                bar.update(done, len(mine))
        del model
        free_memory()
    accelerator.wait_for_everyone()
