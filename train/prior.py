"""Prior preservation: what the base knows of a class is kept by training on pictures of that class beside one's own.

A LoRA of one dog makes all dogs look like it. So beside every micro-batch another one of class pictures ("a photo of a
dog", without the trigger word) is trained, with a weight of its own. (DreamBooth, Ruiz et al. 2023, section 3.2.) The
class pictures are given as a dataset, or drawn by the base before training.

They have a loader of their own, so they need not have the shape of the other samples; which are trained, and with what
noise, is a function of (seed, step, position) as everywhere. Pictures that the base draws are kept in a folder named by
what they depend on. The next run finds them there, and one that was stopped goes on where it was.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from data.loader import Batch, Loader
from data.pictures import Picture
from data.sampler import derived_generator
from data.samples import Sample, Source
from data.source import BadData
from flux2.autoencoder import Autoencoder
from flux2.checks import MAX_GUIDANCE, MAX_PIXELS, MAX_STEPS
from flux2.model import Transformer
from flux2.pipeline import to_images
from flux2.sampling import initial_noise, sample
from flux2.variants import PIXELS_PER_TOKEN, TOKEN_CHANNELS
from train.cache import Prepared
from train.checks import check_seed, is_count, is_number
from train.command import own_errors
from train.folder import make_writable
from train.outofmemory import watched
from train.progress import Count
from train.wording import many

MOST = 100_000  # class pictures that are drawn


@dataclass(frozen=True)
class PriorPreservation:
    """The settings.

    Args:
        weight: of the class pictures' loss, beside that of the others.
        share: class pictures for each sample, up to 1; a share, so that they are the same however a step is cut into
            micro-batches and processes.
        dataset: the settings of a dataset of class pictures; without it they are drawn.
        prompts: of the pictures that are drawn, in turn; also their captions.
        count: how many are drawn.
        folder: where they are kept.
        seed: of the first, the next ones counting up.
        width, height: pixels; None: the training resolution.
        steps, guidance: of sampling; None takes the model's own.
    """

    weight: float = 1.0
    share: float = 1.0
    dataset: Mapping[str, Any] | None = None
    prompts: Sequence[str] = field(default_factory=list)
    count: int = 100
    folder: str = "outputs/class_pictures"
    seed: int = 0
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance: float | None = None

    def __post_init__(self) -> None:
        def refuse(key: str, what: str) -> None:
            raise ValueError(f"preservation.{key}={getattr(self, key)!r} must be {what}")

        if not is_number(self.weight, low=0) or self.weight == 0:
            refuse("weight", "a positive number (preservation=none is without)")
        if not is_number(self.share, low=0, high=1) or self.share == 0:
            refuse("share", "a number above 0, up to 1")
        check_seed("preservation.seed", self.seed)
        if not is_count(self.count, 1) or self.count > MOST:
            refuse("count", f"a whole number from 1 to {MOST}")
        if not isinstance(self.prompts, list | tuple) or not all(isinstance(prompt, str) for prompt in self.prompts):
            refuse("prompts", "a list of texts")
        if any(not prompt.strip() for prompt in self.prompts):
            refuse("prompts", "texts with words in them: each names the class that is drawn")
        if len({prompt.strip() for prompt in self.prompts}) < len(self.prompts):
            refuse("prompts", "different texts: they are drawn in turn, each as often as the others")
        if self.dataset is not None and not isinstance(self.dataset, Mapping):
            refuse("dataset", "the settings of a dataset: +dataset@preservation.dataset=folder")
        if (self.dataset is None) == (not self.prompts):
            raise ValueError(
                f"preservation=prior takes class pictures (+dataset@preservation.dataset=folder) or class prompts that "
                f"the base draws (preservation.prompts), one of them: prompts={list(self.prompts)!r}, "
                f"dataset={'given' if self.dataset else None}"
            )
        if not isinstance(self.folder, str) or not self.folder:
            refuse("folder", "a folder")
        for key in ("width", "height"):
            value = getattr(self, key)
            if value is not None and (not is_count(value, PIXELS_PER_TOKEN) or value % PIXELS_PER_TOKEN):
                refuse(key, f"a multiple of {PIXELS_PER_TOKEN} pixels")
        if (self.width or 1) * (self.height or 1) > MAX_PIXELS:
            raise ValueError(
                f"preservation.width={self.width} with preservation.height={self.height} must be at most 8192 x 8192 "
                "pixels"
            )
        if self.steps is not None and (not is_count(self.steps, 1) or self.steps > MAX_STEPS):
            refuse("steps", f"a whole number from 1 to {MAX_STEPS}")
        if self.guidance is not None and not is_number(self.guidance, 0, MAX_GUIDANCE):
            refuse("guidance", f"a number from 0 to {MAX_GUIDANCE:g}")

    def beside(self, samples: int) -> int:
        """How many class pictures are trained beside so many samples. Raises ValueError if it is no whole number."""
        count = round(self.share * samples)
        if not math.isclose(count, self.share * samples, abs_tol=1e-6) or not count:
            raise ValueError(
                f"preservation.share={self.share:g} of batch_size={samples} is {self.share * samples:g} class pictures"
                ": let it be a whole number from 1"
            )
        return count

    @property
    def draws(self) -> bool:
        """Whether the base draws them."""
        return self.dataset is None


class ClassPictures:
    """Class pictures in training: a loader, whose draws are others than those of the samples beside it.

    Args:
        make: `data.loader.Loader`, but for its seed.
        names: of the pictures.
    """

    def __init__(self, make: Callable[..., Loader], seed: int, weight: float, names: Sequence[str]) -> None:
        self.seed = int(torch.randint(2**31, (), generator=derived_generator(seed, "class pictures")))
        self.weight, self.names = weight, names
        self.loader = make(seed=self.seed)

    def micro_batches(self, step: int) -> list[Batch]:
        """This process's, of a step."""
        return self.loader.micro_batches(step)

    def samples(self, step: int) -> list[str]:
        """The names of those of a step, in all processes."""
        return [self.names[index] for index in self.loader.sampler.batch(step)]


# ------------------------------------------------------------------ drawing


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


class Drawn(Source):
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


def write_whole(file: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` write a file of its own, which then takes the place of `file` once it is on the disk."""
    unfinished = file.with_name(f".{os.getpid()}.{file.name}")
    try:
        write(unfinished)
        with unfinished.open("rb") as written:
            os.fsync(written.fileno())
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


def draw(
    folder: Path,
    recipe: Recipe,
    count: int,
    accelerator: Accelerator,
    prepared: Prepared,
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
        write_whole(latents_file(own, index), partial(save_file, {"latents": made[0].cpu()}))

    def picture(index: int, model: Autoencoder) -> None:
        made = load_file(latents_file(own, index))["latents"]
        with torch.no_grad():
            (image,) = to_images(model.decode(made[None].to(accelerator.device)))
        write_whole(picture_file(own, index), partial(image.save, format="PNG"))
        latents_file(own, index).unlink(missing_ok=True)

    undecoded = [index for index in range(count) if not picture_file(own, index).exists()]
    shape = (TOKEN_CHANNELS, height, width)
    undrawn = [index for index in undecoded if not are_whole(latents_file(own, index), shape)]
    # one has looked for all: what another run draws meanwhile must not move the shares
    undecoded, undrawn = broadcast_object_list([undecoded, undrawn])
    if undecoded:
        with own_errors(accelerator.process_index):
            make_writable(own, "preservation.folder")
            write_whole(own / "recipe.json", partial(_write_text, json.dumps(asdict(recipe), indent=1)))
            for index in set(range(count)).difference(undecoded):  # decoded, and killed before they were removed
                latents_file(own, index).unlink(missing_ok=True)
        kept = count - len(undecoded)
        say(f"drawing {many(len(undecoded), 'class picture')} into {own}" + (f"; {kept} there already" if kept else ""))
    _each(undrawn, transformer, latents, accelerator, "drawn", "samples")
    _each(undecoded, autoencoder, picture, accelerator, "decoded", "pictures")
    return Drawn(own, recipe, count)


def _write_text(text: str, file: Path) -> None:
    file.write_text(text)


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
        bar = Count(f"class pictures {what}", shown=accelerator.is_main_process)
        with own_errors(accelerator.process_index), doing, closing(bar):
            model = load()
            for done, index in enumerate(mine, 1):
                make(index, model)
                bar.update(done, len(mine))
        del model
        gc.collect()
        if accelerator.device.type == "cuda":
            torch.cuda.empty_cache()
    accelerator.wait_for_everyone()
