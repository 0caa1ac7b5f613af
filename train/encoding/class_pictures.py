"""Class pictures that the base draws before training, kept in a folder named by what they depend on.

The next run finds them there, and one that was stopped goes on where it was. What they are for is in
train/objective/prior.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from data.cache.prepared import CachedDataset
from data.files import atomic_write
from data.sources import Sample, Source
from data.sources.base import BadData
from data.sources.images import Picture
from flux2.models.autoencoder import Autoencoder
from flux2.models.pixels import to_images
from flux2.models.transformer import Transformer
from flux2.models.variants import PIXELS_PER_TOKEN, TOKEN_CHANNELS
from flux2.sampling import initial_noise, sample
from train.utils.console import own_errors
from train.utils.files import make_writable
from train.utils.memory import free_memory, watched
from train.utils.progress import ItemProgress
from train.utils.text import many


@dataclass(frozen=True)
class Recipe:
    """What drawn pictures depend on, but for how many there are: picture i has prompt i (in turn) and seed + i."""

    model: str  # a fingerprint of its transformer and autoencoder
    precision: str
    prompts: tuple[str, ...]
    seed: int
    width: int
    height: int
    steps: int
    guidance: float

    @property
    def name(self) -> str:
        """Of the folder."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def prompt(self, index: int) -> str:
        return self.prompts[index % len(self.prompts)]


class ClassPictureFolder(Source):
    """The first `count` pictures that the base drew, with their prompts."""

    def __init__(self, folder: Path, recipe: Recipe, count: int) -> None:
        super().__init__(str(folder), None, None, False, 0)
        files = [picture_file(folder, index) for index in range(count)]
        self._take(
            Sample(Picture(str(file), partial(open_file, file)), (recipe.prompt(index),))
            for index, file in enumerate(files)
        )

    def _check_bad(self, new: Sequence[object]) -> None:
        if self.bad:
            listed = "".join(f"\n  {bad}" for bad in self.bad)
            raise BadData(
                f"{len(self.bad)} class pictures in {self.where} cannot be used:{listed}\n"
                "Delete these files, and they are drawn again"
            )


def open_file(file: Path) -> BinaryIO:
    return file.open("rb")


def picture_file(folder: Path, index: int) -> Path:
    return folder / f"{index:05d}.png"


def latents_file(folder: Path, index: int) -> Path:
    return folder / f"{index:05d}.safetensors"


def are_whole(file: Path, shape: tuple[int, ...]) -> bool:
    """Whether there are latents of `shape` in `file`; if it is damaged they are made again."""
    try:
        return load_file(file)["latents"].shape == shape
    except (OSError, SafetensorError, KeyError):
        return False


def draw(
    folder: Path,
    recipe: Recipe,
    count: int,
    accelerator: Accelerator,
    prepared: CachedDataset,
    transformer: Callable[[], Transformer],
    autoencoder: Callable[[], Autoencoder],
    say: Callable[[str], None],
) -> Source:
    """The first `count` pictures of a recipe, drawing those that are missing in its folder.

    One model is in memory at a time: the transformer gives the latents of all, which are kept in files, then the
    autoencoder decodes them. Each process does its share.

    Args:
        folder: `recipe.name` is made in it.
        prepared: has the embeddings of the prompts, and of the empty one.
        transformer, autoencoder: load them; called only if they are needed.

    Raises ValueError for a folder that cannot be written.
    """
    own = folder / recipe.name
    height, width = recipe.height // PIXELS_PER_TOKEN, recipe.width // PIXELS_PER_TOKEN

    def latents(index: int, model: Transformer) -> None:
        noise = initial_noise([recipe.seed + index], height, width)
        text, empty = (prepared.embeddings([prompt]).to(accelerator.device) for prompt in (recipe.prompt(index), ""))
        noise = noise.to(accelerator.device)
        made = sample(model, noise, text, steps=recipe.steps, guidance=recipe.guidance, empty=empty)
        with atomic_write(latents_file(own, index)) as temporary:
            save_file({"latents": made[0].cpu()}, temporary)

    def picture(index: int, model: Autoencoder) -> None:
        made = load_file(latents_file(own, index))["latents"]
        with torch.no_grad():
            (image,) = to_images(model.decode(made[None].to(accelerator.device)))
        with atomic_write(picture_file(own, index)) as temporary:
            image.save(temporary, "PNG")
        latents_file(own, index).unlink(missing_ok=True)

    undecoded = [index for index in range(count) if not picture_file(own, index).exists()]
    shape = (TOKEN_CHANNELS, height, width)
    undrawn = [index for index in undecoded if not are_whole(latents_file(own, index), shape)]
    # one has looked for all: what another run draws meanwhile must not move the shares
    undecoded, undrawn = broadcast_object_list([undecoded, undrawn])
    if undecoded:
        with own_errors(accelerator.process_index):
            make_writable(own, "preservation.folder")
            with atomic_write(own / "recipe.json") as temporary:
                temporary.write_text(json.dumps(asdict(recipe), indent=1))
            for index in set(range(count)).difference(undecoded):  # decoded, and killed before they were removed
                latents_file(own, index).unlink(missing_ok=True)
        kept = count - len(undecoded)
        say(f"drawing {many(len(undecoded), 'class picture')} into {own}" + (f"; {kept} there already" if kept else ""))
    _each(undrawn, transformer, latents, accelerator, "drawn", "samples")
    _each(undecoded, autoencoder, picture, accelerator, "decoded", "pictures")
    return ClassPictureFolder(own, recipe, count)


def _each(
    missing: Sequence[int],
    load: Callable[[], Any],
    make: Callable[[int, Any], None],
    accelerator: Accelerator,
    what: str,
    phase: str,
) -> None:
    """Call `make` with every missing index of this process's share and the model that `load` gives; then free it."""
    mine = missing[accelerator.process_index :: accelerator.num_processes]
    if mine:
        doing = watched("while drawing class pictures", phase, accelerator.device)
        bar = ItemProgress(f"class pictures {what}", shown=accelerator.is_main_process)
        with own_errors(accelerator.process_index), doing, closing(bar):
            model = load()
            for done, index in enumerate(mine, 1):
                make(index, model)
                bar.update(done, len(mine))
        del model
        free_memory()
    accelerator.wait_for_everyone()
