"""Two ways to see how training goes: a sheet of pictures, and a loss at fixed noise and times.

The training loss jumps with the drawn times far more than it falls. At the same noise and times for the same samples
it becomes a curve that can be read, above all on samples set aside.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, TypeGuard

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor, nn

from data.cache.latents import LatentEntry
from data.cache.prepared import CachedDataset
from data.loader import Batch
from data.sampler import derived_generator
from data.sources.base import Sample
from flux2.models.autoencoder import Autoencoder
from flux2.models.transformer import Transformer
from flux2.models.variants import PIXELS_PER_TOKEN, Variant
from flux2.pipeline import render
from flux2.utils.checks import MAX_GUIDANCE, MAX_STEPS
from train.checks import check_count, check_seed, is_number
from train.loss import Noised, flow_loss, noise_at
from train.masking import masked
from train.validation.sheet import LAYOUT, sheet

WIDEST = 8192  # pixels of a picture on a sheet
TIMES = (0.15, 0.35, 0.55, 0.75, 0.95)

Share = Callable[[Callable[[Any], Any], Sequence[Any]], list[Any]]


def alone(do: Callable[[Any], Any], work: Sequence[Any]) -> list[Any]:
    """`do` of each of `work`, in this process; of several, `Processes.map` shares it."""
    return [do(one) for one in work]


@dataclass(frozen=True)
class ValidationSettings:
    """Which samples the validation loss is measured on, at which times and noise.

    Attributes:
        held_out: samples that are set aside for it.
        samples: how many of the training samples it is measured on, if none are set aside.
        seed: of that choice and of the noise; apart from the run's own, so that runs of other seeds can be compared.
        times: of the noise, from 0 (the picture) to 1 (noise); each is also reported by itself.
    """

    held_out: int = 0
    samples: int = 8
    seed: int = 0
    times: Sequence[float] = TIMES

    def __post_init__(self) -> None:
        check_count("validation.held_out", self.held_out)
        check_count("validation.samples", self.samples)
        check_seed("validation.seed", self.seed)
        times = self.times if isinstance(self.times, list | tuple) else []
        if not times or not all(is_number(time, 0, 1) for time in times) or len({f"{t:g}" for t in times}) < len(times):
            raise ValueError(f"validation.times={self.times!r} must be a list of different numbers from 0 to 1")

    def split(self, contents: Sequence[str]) -> tuple[list[int], list[int]]:
        """Indices to train on, in order, and to validate on.

        Args:
            contents: a digest of each sample. A sample is set aside for what it is, not for its place: in another order
                it is the same ones, and pictures that are added or taken away change little.
        """
        count = len(contents)
        if self.held_out >= count:
            raise ValueError(f"validation.held_out={self.held_out} leaves none of the {count} samples to train on")
        ranks = [hashlib.sha256(f"{self.seed} held out {content}".encode()).hexdigest() for content in contents]
        order = sorted(range(count), key=lambda i: ranks[i])
        if not self.held_out:
            return list(range(count)), order[: self.samples]
        return sorted(order[self.held_out :]), order[: self.held_out]


@dataclass(frozen=True)
class Validated:
    """A sample of the validation loss: its cache entry and caption, and the digest that its noise comes from."""

    name: str
    entry: LatentEntry
    caption: str
    content: str


def chosen_samples(samples: Sequence[Sample], prepared: CachedDataset, indices: Sequence[int]) -> list[Validated]:
    """What is measured of the samples with these indices."""
    return [Validated(samples[i].name, prepared.entries[i], samples[i].caption, prepared.contents[i]) for i in indices]


@dataclass(frozen=True)
class FixedNoiseLoss:
    """The flow loss over `chosen` samples and `times`, at noise that is a function of the seed, sample and time."""

    prepared: CachedDataset
    chosen: Sequence[Validated]
    seed: int
    times: Sequence[float] = TIMES
    share: Share = alone
    rows: int = 1

    def __call__(self, model: nn.Module, guidance: float | None) -> Tensor:
        """(samples, times) float64 on the CPU."""
        losses = self.share(lambda sample: self.of(sample, model, guidance), self.chosen)
        return torch.stack(losses).double()

    @torch.no_grad()
    def of(self, sample: Validated, model: nn.Module, guidance: float | None) -> Tensor:
        """(times,) on the CPU; `rows` predictions at a time, so that it needs no more memory than training."""
        noised, text = self.sample(sample, next(model.parameters()).device)
        parts = [slice(start, start + self.rows) for start in range(0, len(self.times), self.rows)]
        predicted = torch.cat([noised.predict(model, text[part], guidance, part) for part in parts])
        losses = []
        for row in range(len(self.times)):
            at = slice(row, row + 1)
            mask = None if noised.mask is None else noised.mask[at]
            losses.append(flow_loss(predicted[at], noised.target[at], mask))
        return torch.stack(losses).cpu()

    def sample(self, sample: Validated, device: torch.device) -> tuple[Noised, Tensor]:
        """One sample at all times, and its caption's embeddings (times, T, D)."""
        count = len(self.times)

        def read(key: str, name: str = "latents") -> Tensor:
            tensor = self.prepared.cache.get(key)[name].to(device, torch.float32)
            return tensor.expand(count, *tensor.shape)

        entry, rows = sample.entry, list(range(count))
        latents = read(entry.key)
        mask = None if entry.mask_key is None else read(entry.mask_key, "mask") / 255
        text = self.prepared.embeddings([sample.caption]).to(device).expand(count, -1, -1)
        references = [read(key) for key in entry.reference_keys]
        batch = Batch(latents, references, text, [sample.caption] * count, rows, rows, mask)
        generators = [derived_generator(self.seed, "validation", sample.content, f"{time:g}") for time in self.times]
        noise = torch.stack([torch.randn(latents.shape[1:], generator=generator) for generator in generators])
        return noise_at(batch, torch.tensor(self.times, device=device), noise.to(device)), text

    def report(self, losses: Tensor) -> dict[str, float]:
        """What is logged of (samples, times) losses: their mean, and that of each time."""
        bands = {f"validation_loss/{time:g}": loss for time, loss in zip(self.times, losses.mean(0), strict=True)}
        return {"validation_loss": losses.mean().item()} | {key: loss.item() for key, loss in bands.items()}

    def record(self, losses: Tensor) -> dict[str, Any]:
        """What is kept of them, to compare steps sample by sample."""
        rounded = [[float(f"{loss:.8g}") for loss in row] for row in losses.tolist()]
        return {"times": list(self.times), "samples": [sample.name for sample in self.chosen], "losses": rounded}


# ------------------------------------------------------------------ sheets


def is_texts(value: object) -> TypeGuard[Sequence[str]]:
    """Whether `value` is a list of texts."""
    return isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)


@dataclass(frozen=True)
class SampleSettings:
    """What a sheet shows.

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
    """Makes the sheets of a run, through the same function as inference.

    Args:
        text: (P, T, text_width) embeddings of the prompts; empty: (1, T, text_width).
        references: latents (1, 128, h, w) of the pictures that each prompt edits.
        sizes: (width, height) in pixels of each prompt's picture.
        share: spreads the pictures over the processes; all of them then call `sheet`.
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

    def sheet(self, model: Transformer, file: Path, *, write: bool = True) -> None:
        """Write the pictures with their prompts to `file`; of several processes one does."""
        pictures = self.pictures(model)
        if write:
            file.parent.mkdir(parents=True, exist_ok=True)
            page = sheet([pictures], columns=list(self.settings.prompts))
            info = PngInfo()  # for the report, which shows the pictures one by one
            prompts = masked(list(self.settings.prompts))
            info.add_itxt(LAYOUT, json.dumps({"prompts": prompts, "boxes": page.info["boxes"]}))
            page.save(file, pnginfo=info)
