"""Samples of the adapter while it trains: prompts, references, seeds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import TypeGuard

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from flux2.models.autoencoder import Autoencoder
from flux2.models.transformer import Transformer
from flux2.models.variants import PIXELS_PER_TOKEN, Variant
from flux2.pipeline import render
from flux2.utils.checks import MAX_GUIDANCE, MAX_STEPS
from train.distributed.processes import Share, alone
from train.utils.checks import check_count, check_seed, is_number
from train.utils.redact import masked
from train.validation.sample_grid import LAYOUT, sample_grid

WIDEST = 8192  # pixels of a picture on a sample grid


def is_texts(value: object) -> TypeGuard[Sequence[str]]:
    """Whether `value` is a list of texts."""
    return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)


@dataclass(frozen=True)
class SampleSettings:
    """What a sample grid shows.

    Attributes:
        prompts: one picture each.
        references: files that the prompts edit: a list for all prompts, or a list of such lists, one for each prompt.
        seed: of the first prompt, the next ones counting up.
        width, height: pixels; None takes the bucket of the first reference's shape, else the training resolution.
        steps, guidance: None takes the model's own.
    """

    prompts: Sequence[str] = field(default_factory=list)
    references: Sequence[str] | Sequence[Sequence[str]] = field(default_factory=list)
    seed: int = 0
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance: float | None = None

    def __post_init__(self) -> None:
        if not is_texts(self.prompts):
            raise ValueError(f"sample.prompts={self.prompts!r} must be a list of texts")
        if not is_texts(self.references):
            if not isinstance(self.references, list | tuple) or not all(is_texts(item) for item in self.references):
                raise ValueError(
                    f"sample.references={self.references!r} must be a list of files for all prompts, or a list of such "
                    "lists, one for each prompt"
                )
            if len(self.references) != len(self.prompts):
                raise ValueError(
                    f"sample.references={self.references!r} has {len(self.references)} lists for "
                    f"{len(self.prompts)} sample.prompts: give one for each, which may be empty"
                )
        check_seed("sample.seed", self.seed)
        for key in ("width", "height"):
            value = getattr(self, key)
            good = isinstance(value, int) and PIXELS_PER_TOKEN <= value <= WIDEST and not value % PIXELS_PER_TOKEN
            if value is not None and not good:
                raise ValueError(
                    f"sample.{key}={value!r} must be a multiple of {PIXELS_PER_TOKEN} pixels up to {WIDEST}"
                )
        if self.steps is not None:
            check_count("sample.steps", self.steps, 1, MAX_STEPS)
        if self.guidance is not None and not is_number(self.guidance, 0, MAX_GUIDANCE):
            raise ValueError(f"sample.guidance={self.guidance!r} must be a number from 0 to {MAX_GUIDANCE:g}")

    @property
    def edits(self) -> list[list[str]]:
        """The files that each prompt edits."""
        lists = [self.references] * len(self.prompts) if is_texts(self.references) else self.references
        return [list(paths) for paths in lists]

    @property
    def files(self) -> list[str]:
        """Every reference once, also where there is no prompt yet."""
        lists = [self.references] if is_texts(self.references) else self.references
        return list(dict.fromkeys(chain(*lists)))


class Sampler:
    """Makes the sample grids of a run, through the same function as inference.

    Args:
        text: (P, T, text_width) embeddings of the prompts; empty: (1, T, text_width).
        references: latents (1, 128, h, w) of the pictures that each prompt edits.
        sizes: (width, height) in pixels of each prompt's picture.
        share: spreads the pictures over the processes; all of them then call `write_grid`.
    """

    def __init__(
        self,
        settings: SampleSettings,
        variant: Variant,
        autoencoder: Autoencoder,
        text: Tensor,
        empty: Tensor,
        references: Sequence[Sequence[Tensor]],
        sizes: Sequence[tuple[int, int]],
        share: Share = alone,
    ) -> None:
        self.settings, self.autoencoder = settings, autoencoder
        self.text, self.empty, self.references, self.sizes = text, empty, references, sizes
        self.share = share
        self.steps = settings.steps or variant.steps
        self.guidance = variant.guidance if settings.guidance is None else settings.guidance

    def picture(self, model: Transformer, i: int, seed: int) -> Image.Image:
        """That of the prompt number `i`, from its size, references and `seed` alone."""
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
        """One picture a prompt; each depends on its own seed, not on the others."""
        return self.share(lambda i: self.picture(model, i, self.settings.seed + i), range(len(self.sizes)))

    def write_grid(self, model: Transformer, file: Path, *, write: bool = True) -> None:
        """Write the pictures with their prompts to `file`; of several processes one does."""
        pictures = self.pictures(model)
        if write:
            file.parent.mkdir(parents=True, exist_ok=True)
            page = sample_grid([pictures], columns=list(self.settings.prompts))
            info = PngInfo()  # for the report, which shows the pictures one by one
            prompts = masked(list(self.settings.prompts))
            info.add_itxt(LAYOUT, json.dumps({"prompts": prompts, "boxes": page.info["boxes"]}))
            page.save(file, pnginfo=info)
