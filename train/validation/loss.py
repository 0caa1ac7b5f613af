"""Two ways to see how training goes: a sample grid, and a loss at fixed noise and times.

The training loss jumps with the drawn times far more than it falls. At the same noise and times for the same samples
it becomes a curve that can be read, above all on samples set aside.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from data.cache.latents import LatentEntry
from data.cache.prepared import CachedDataset
from data.loader import Batch
from data.sampler import derived_generator
from data.sources.base import Sample
from train.distributed.processes import Share, alone
from train.objective.loss import Noised, flow_loss, noise_at
from train.utils.checks import check_count, check_seed, is_number

TIMES = (0.15, 0.35, 0.55, 0.75, 0.95)


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
