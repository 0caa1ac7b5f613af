"""Validation loss at fixed noise and timesteps.

The training loss varies with the drawn timesteps far more than it falls. With fixed noise and timesteps for the same
samples the curve becomes readable, above all on held-out samples.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from data.cache.latents import LatentEntry
from data.cache.prepared import CachedDataset
from data.loader import Batch
from data.sampler import derived_generator
from data.sources.base import Sample
from flux2.adapters.loading import scaled
from train.distributed.processes import Share, map_serially
from train.objective.loss import flow_loss
from train.objective.noise import Noised, noise_at
from train.utils.checks import check_count, check_seed, is_number

TIMES = (0.15, 0.35, 0.55, 0.75, 0.95)
MOST_SAMPLES = 10_000  # each takes a prediction for every timestep, at every validation


@dataclass(frozen=True)
class ValidationSettings:
    """Samples, timesteps and noise of the validation loss."""

    held_out: int = 0  # number of samples that are held out from training
    samples: int = 8  # number of training samples to measure if none are held out
    seed: int = 0  # of that choice and of the noise; not the run's, so that runs with other seeds can be compared
    times: Sequence[float] = TIMES  # from 0 (the image) to 1 (noise); the loss at each is also reported separately

    def __post_init__(self) -> None:
        check_count("validation.held_out", self.held_out, 0, MOST_SAMPLES)
        check_count("validation.samples", self.samples, 0, MOST_SAMPLES)
        check_seed("validation.seed", self.seed)
        times = self.times if isinstance(self.times, list | tuple) else []
        if not times or not all(is_number(time, 0, 1) for time in times) or len({f"{t:g}" for t in times}) < len(times):
            raise ValueError(f"validation.times={self.times!r} must be a list of different numbers from 0 to 1")

    def split(
        self, contents: Sequence[str], references: Sequence[Sequence[str]] = (), pixels: Sequence[str] = ()
    ) -> tuple[Sequence[int], list[int]]:
        """Return the indices to train on, in order, and those to validate on.

        Samples are held out by `contents`, the digests of their images: order does not matter, and adding images
        changes little. Samples of one image, and samples of which one's image is among the other's `references`, are
        held out together, which may be more than `held_out`. One image is what has equal digests in `pixels`, which
        `references` consist of, because copies may differ in metadata; by default these are `contents`. They decide
        nothing else, so that a run without such copies has the samples that it had before there were any.
        """
        count = len(contents)

        def rank(i: int) -> bytes:
            return hashlib.sha256(f"{self.seed} held out {contents[i]}".encode()).digest()

        if not self.held_out:
            return range(count), heapq.nsmallest(self.samples, range(count), key=rank)
        order = sorted(range(count), key=rank)
        groups = groups_of(pixels or contents, references)
        held_out = dict[int, None]()  # in order
        for i in order:
            if len(held_out) < self.held_out:
                held_out |= dict.fromkeys(groups[i])
        if len(held_out) >= count:
            linked = f", which are held out with {len(held_out)} of the same images," * (self.held_out < count)
            raise ValueError(
                f"validation.held_out={self.held_out}{linked} leaves none of the {count} samples to train on. Set a "
                "lower one"
            )
        return [i for i in range(count) if i not in held_out], list(held_out)


def groups_of(contents: Sequence[str], references: Sequence[Sequence[str]] = ()) -> list[list[int]]:
    """Return for each sample those that show its image, as their target or as an edit of it; itself is among them."""
    of_image: dict[str, int] = {}  # the first sample of each target
    parents = list(range(len(contents)))

    def root(i: int) -> int:
        while parents[i] != i:
            parents[i] = i = parents[parents[i]]
        return i

    for i, content in enumerate(contents):
        parents[root(i)] = root(of_image.setdefault(content, i))
    for i, shown in enumerate(references):
        for content in shown:
            if content in of_image:
                parents[root(i)] = root(of_image[content])
    members: dict[int, list[int]] = defaultdict(list)
    for i in range(len(contents)):
        members[root(i)].append(i)
    return [members[root(i)] for i in range(len(contents))]


@dataclass(frozen=True)
class Validated:
    """A sample of the validation loss: its cache entry and caption, and the digest that determines its noise.

    With `both_ends`, its loss is the mean of that of its image and that of its rejected one at scale -1 of the adapter.
    """

    name: str
    entry: LatentEntry
    caption: str
    content: str
    both_ends: bool = False


def chosen_samples(
    samples: Sequence[Sample], prepared: CachedDataset, indices: Sequence[int], both_ends: bool = False
) -> list[Validated]:
    """Return the validation samples with these indices."""
    return [
        Validated(samples[i].name, prepared.entries[i], samples[i].caption, prepared.contents[i], both_ends)
        for i in indices
    ]


@dataclass(frozen=True)
class FixedNoiseLoss:
    """The flow loss over `chosen` samples and `times`, with noise that is a function of seed, sample and timestep."""

    prepared: CachedDataset
    chosen: Sequence[Validated]
    seed: int
    times: Sequence[float] = TIMES
    share: Share = map_serially
    rows: int = 1

    def __call__(self, model: nn.Module, guidance: float | None) -> Tensor:
        """Return the losses (samples, times) in float64 on the CPU."""
        losses = self.share(lambda sample: self.sample_losses(sample, model, guidance), self.chosen)
        return torch.stack(losses).double()

    @torch.no_grad()
    def sample_losses(self, sample: Validated, model: nn.Module, guidance: float | None) -> Tensor:
        """Return the losses (times,) of a sample on the CPU."""
        losses = self.image_losses(sample, model, guidance)
        if not sample.both_ends:
            return losses
        assert sample.entry.rejected_key is not None
        other = replace(sample, entry=replace(sample.entry, key=sample.entry.rejected_key))
        with scaled(model, -1.0):
            return (losses + self.image_losses(other, model, guidance)) / 2

    def image_losses(self, sample: Validated, model: nn.Module, guidance: float | None) -> Tensor:
        """Return the losses (times,) of the target of a sample on the CPU.

        The model predicts `rows` timesteps at a time, so that validation needs no more memory than training.
        """
        noised, text = self.inputs(sample, next(model.parameters()).device)
        parts = [slice(start, start + self.rows) for start in range(0, len(self.times), self.rows)]
        predicted = torch.cat([noised.predict(model, text[part], guidance, part) for part in parts])
        masks = [None] * len(self.times) if noised.mask is None else noised.mask.split(1)
        rows = zip(predicted.split(1), noised.target.split(1), masks, strict=True)
        return torch.stack([flow_loss(*row) for row in rows]).cpu()

    def inputs(self, sample: Validated, device: torch.device) -> tuple[Noised, Tensor]:
        """Return a sample at all timesteps, and its caption's embeddings (times, T, D)."""
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
        """Return the logged values of (samples, times) losses: the mean, and the mean at each timestep."""
        by_time = zip(self.times, losses.mean(0).tolist(), strict=True)
        return {"validation_loss": losses.mean().item()} | {f"validation_loss/{time:g}": loss for time, loss in by_time}

    def record(self, losses: Tensor) -> dict[str, Any]:
        """Return the record of losses in validation.jsonl, to compare steps sample by sample."""
        rounded = [[float(f"{loss:.8g}") for loss in row] for row in losses.tolist()]
        return {"times": list(self.times), "samples": [sample.name for sample in self.chosen], "losses": rounded}
