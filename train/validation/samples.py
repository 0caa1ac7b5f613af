"""Sample grids during training: settings, and drawing them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, TypeGuard

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from flux2.adapters.loading import scaled
from flux2.models.autoencoder import Autoencoder
from flux2.models.transformer import Transformer
from flux2.models.variants import PIXELS_PER_TOKEN, Variant
from flux2.pipeline import render
from flux2.utils.checks import MAX_GUIDANCE, MAX_STEPS
from flux2.utils.cli import is_out_of_memory
from flux2.utils.files import name_write_errors
from train.distributed.processes import ProcessesDiverged, Share, map_serially
from train.utils.checks import check_count, check_seed, is_number
from train.utils.console import warn_unsaved
from train.utils.redact import masked
from train.validation.sample_grid import LAYOUT, REFERENCES, sample_grid
from train.validation.twin import Twin

SCALES = (-10.0, 10.0)
MAX_CAPTIONS = 64  # of the dataset in a sample grid
WIDEST = 8192  # maximum width and height of an image in a sample grid


def is_string_list(value: object) -> TypeGuard[Sequence[str]]:
    """Return whether `value` is a list of strings."""
    return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)


@dataclass(frozen=True)
class SampleSettings:
    """Contents of a sample grid."""

    prompts: Sequence[str] = field(default_factory=list)  # with one image each
    # files that the prompts edit: a list for all prompts, or one list for each prompt
    references: Sequence[str] | Sequence[Sequence[str]] = field(default_factory=list)
    captions: int = 1  # of the dataset, drawn if there are no prompts
    seed: int = 0  # of the first prompt, incremented for each further one
    width: int | None = None  # pixels; None: the bucket of the first reference, or the training resolution
    height: int | None = None
    steps: int | None = None  # None: the model's own, as of guidance
    guidance: float | None = None
    scales: Sequence[float] = (1.0,)  # of the adapter, with a row of images each
    model: str | None = None  # that draws with the adapter instead of the one that trains: its distilled twin
    path: str | None = None  # of that model, as model.path

    def __post_init__(self) -> None:
        for key in ("model", "path"):
            if not isinstance(value := getattr(self, key), str | None):
                raise ValueError(f"sample.{key}={value!r} must be a string or null")
        if self.path is not None and self.model is None:
            raise ValueError(f"sample.path={self.path!r} has no effect without sample.model, whose files it names")
        if not is_string_list(self.prompts):
            raise ValueError(f"sample.prompts={self.prompts!r} must be a list of strings")
        if not is_string_list(self.references):
            if not isinstance(self.references, list | tuple) or not all(map(is_string_list, self.references)):
                raise ValueError(
                    f"sample.references={self.references!r} must be a list of files for all prompts, or a list of "
                    "lists, one for each prompt"
                )
            if len(self.references) != len(self.prompts):
                raise ValueError(
                    f"sample.references={self.references!r} has {len(self.references)} lists for "
                    f"{len(self.prompts)} sample.prompts. Give a list, which may be empty, for each prompt"
                )
        if self.references and not self.prompts:
            raise ValueError(
                f"sample.references={self.references!r} has no effect without sample.prompts, which edit these images. "
                "Give both"
            )
        check_count("sample.captions", self.captions, 0, MAX_CAPTIONS)
        check_seed("sample.seed", self.seed)
        for key in ("width", "height"):
            value = getattr(self, key)
            valid = isinstance(value, int) and PIXELS_PER_TOKEN <= value <= WIDEST and not value % PIXELS_PER_TOKEN
            if value is not None and not valid:
                raise ValueError(
                    f"sample.{key}={value!r} must be a multiple of {PIXELS_PER_TOKEN} pixels up to {WIDEST}"
                )
        if self.steps is not None:
            check_count("sample.steps", self.steps, 1, MAX_STEPS)
        if self.guidance is not None and not is_number(self.guidance, 0, MAX_GUIDANCE):
            raise ValueError(f"sample.guidance={self.guidance!r} must be a number from 0 to {MAX_GUIDANCE:g}")

        scales = self.scales if isinstance(self.scales, list | tuple) else []
        if not scales or not all(is_number(scale, *SCALES) for scale in scales) or len(set(scales)) < len(scales):
            low, high = SCALES
            raise ValueError(
                f"sample.scales={self.scales!r} must be a list of different numbers from {low:g} to {high:g}"
            )

    @property
    def count(self) -> int:
        """The number of images of each scale, at most."""
        return len(self.prompts) or self.captions

    @property
    def edits(self) -> list[list[str]]:
        """The reference files of each prompt."""
        lists = [self.references] * len(self.prompts) if is_string_list(self.references) else self.references
        return [list(paths) for paths in lists]

    @property
    def files(self) -> list[str]:
        """All distinct reference files."""
        lists = [self.references] if is_string_list(self.references) else self.references
        return list(dict.fromkeys(chain(*lists)))


@dataclass(frozen=True, eq=False)
class Sampler:
    """Draws the sample grids of a run with the same function as inference."""

    settings: SampleSettings
    variant: Variant  # of the model that draws
    autoencoder: Autoencoder
    text: Tensor  # (P, T, text_width) embeddings of the prompts
    empty: Tensor  # (1, T, text_width) embedding of the empty prompt
    references: Sequence[Sequence[Tensor]]  # latents (1, 128, h, w) of the references of each prompt
    sizes: Sequence[tuple[int, int]]  # (width, height) in pixels of each prompt's image
    edited: Sequence[Image.Image | None] = ()  # what each prompt edits, as the grid shows it
    twin: Twin | None = None  # the model that draws, of `variant`
    share: Share = map_serially  # distributes the images over the processes, all of which must call `write_grid`

    @property
    def steps(self) -> int:
        return self.settings.steps or self.variant.steps

    @property
    def guidance(self) -> float:
        return self.variant.guidance if self.settings.guidance is None else self.settings.guidance

    def picture(self, model: Transformer, i: int, seed: int) -> Image.Image:
        """Draw the image of prompt `i`, which depends only on its size, references and `seed`."""
        return render(
            model,
            self.autoencoder,
            self.text[i : i + 1],
            seeds=[seed],
            width=self.sizes[i][0],
            height=self.sizes[i][1],
            steps=self.steps,
            guidance=self.guidance,
            references=self.references[i],
            empty=self.empty,
        )[0]

    def pictures(self, model: Transformer) -> list[Image.Image]:
        """Draw one image for each prompt, independent of the others."""
        return self.share(lambda i: self.picture(model, i, self.settings.seed + i), range(len(self.sizes)))

    def rows(self, model: Transformer) -> list[list[Image.Image]]:
        """Draw the images at each scale of the adapter."""
        rows = []
        with nullcontext(model) if self.twin is None else self.twin.loaded() as drawing:
            for scale in self.settings.scales:
                with nullcontext() if scale == 1 else scaled(drawing, scale):
                    rows.append(self.pictures(drawing))
        return rows

    @property
    def row_names(self) -> list[str]:
        """The model that draws and the scale of each row, if they are not the one that trains and 1."""
        model, scales = [self.variant.name] if self.twin else [], self.settings.scales
        names = [", ".join([*model, *([f"scale {scale:g}"] if list(scales) != [1] else [])]) for scale in scales]
        return names if any(names) else []

    def page(self, rows: Sequence[Sequence[Image.Image]]) -> tuple[Image.Image, dict[str, Any]]:
        """Return the images with their prompts, below what these edit, and where each lies, for the report."""
        prompts, names = masked(list(self.settings.prompts)), self.row_names
        blank, edited = Image.new("RGB", (1, 1), "white"), list[Image.Image]()
        if any(image is not None for image in self.edited):
            edited = [blank if image is None else image for image in self.edited]
            rows, names = [edited, *rows], ["reference", *(names or ["image"])]
        page = sample_grid(rows, columns=prompts, names=names)
        boxes, scales = page.info["boxes"], self.settings.scales
        marks = [f" (scale {scale:g})" if scale != 1 else "" for scale in scales]
        layout = {"prompts": [prompt + mark for mark in marks for prompt in prompts], "boxes": boxes[len(edited) :]}
        if edited:
            layout[REFERENCES] = [None if image is None else boxes[i] for i, image in enumerate(self.edited)]
        return page, layout

    def write_grid(self, model: Transformer, file: Path, *, write: bool = True) -> None:
        """Draw the images and write them with their prompts to `file`, in one of several processes."""
        rows = self.rows(model)
        if write:
            file.parent.mkdir(parents=True, exist_ok=True)
            page, layout = self.page(rows)
            info = PngInfo()  # for the report, which shows the images one by one
            info.add_itxt(LAYOUT, json.dumps(layout))
            with name_write_errors(file):
                page.save(file, pnginfo=info)

    def write_or_warn(self, model: Transformer, file: Path, *, write: bool = True) -> bool:
        """Write the grid and return whether that succeeded. A full disk is no reason to lose the training."""
        try:
            self.write_grid(model, file, write=write)
        except Exception as error:
            if is_out_of_memory(error) or isinstance(error, ProcessesDiverged):
                raise
            if write:
                step = int(file.stem.rpartition("_")[2])  # of step_000250.png
                warn_unsaved(f"no grid of step {step} ({type(error).__name__}: {error}); training continues")
            return False
        return True
