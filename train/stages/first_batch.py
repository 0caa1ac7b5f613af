"""The first samples of a run on one sheet, as they are trained: in their bucket, with mask, references and caption.

A run writes it before the model is loaded, and train/plan.py without one. What is trained comes from the loader, and
the pixels from the function that the autoencoder's input comes from (`data.cache.latents.Work.image`).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data.buckets import MIDDLE, Cut
from data.cache.embeddings import PromptKeys
from data.cache.latents import LatentEntry, Work, plan_sample
from data.cache.prepared import CachedDataset
from data.files import user_path
from data.loader import DrawnSample, Loader
from data.sources import Sample
from data.sources.images import BadPicture, FileOpener, Picture
from train.checkpoints.resume import RunLocation
from train.config.run_config import RunConfig
from train.encoding.prepare import CacheRequest
from train.objective.objective import check_pairs
from train.objective.prior import ClassPictures
from train.objective.target import Slider
from train.reports.batch_sheet import FIRST_BATCH, SIDE, Card, Tile, batch_sheet, scaled, with_mask
from train.stages.class_data import class_dataset
from train.stages.data import PreparedData, TrainingData, cache_request, make_loaders
from train.utils.console import warn
from train.utils.files import make_writable, reason, write_whole
from train.utils.text import many

MOST, ENOUGH = 16, 8  # samples of a sheet: at most, and from which number on no further step is added
SECONDS = 15.0  # after which images are left out
# of decoders, fonts and disks
FAILURES = (
    OSError, ValueError, TypeError, LookupError, ArithmeticError, ImportError, MemoryError, RuntimeError, SyntaxError
)  # fmt: skip
UNDECODED = "If a run leaves out an image whose pixels are damaged, other samples follow: here headers alone are read."
NO_TIME = f"left out: the images before it took more than {SECONDS:g} seconds"


@dataclass(frozen=True)
class FirstBatch:
    """What a run trains first.

    Attributes:
        samples: The samples that the loader's indices mean.
        classes: The class images, likewise.
        notes: What is not on the sheet.
    """

    config: RunConfig
    loader: Loader
    samples: Sequence[Sample]
    prior: ClassPictures | None = None
    classes: Sequence[Sample] = ()
    notes: Sequence[str] = ()

    @property
    def drawn(self) -> list[tuple[int, DrawnSample, bool]]:
        """The step, from 0, and the draw of each sample in the order of training, and whether it is a class image."""
        found: list[tuple[int, DrawnSample, bool]] = []
        for step in range(self.config.settings.steps):
            if found and len(found) >= ENOUGH:
                break
            found += [(step, one, False) for one in self.loader.drawn_samples(step)]
            if self.prior is not None:
                found += [(step, one, True) for one in self.prior.loader.drawn_samples(step)]
        return found[:MOST]

    @property
    def shown(self) -> list[Sample]:
        """The samples on the sheet."""
        return [(self.classes if is_class else self.samples)[one.index] for _, one, is_class in self.drawn]

    def sheet(self, clock: Callable[[], float] = time.monotonic) -> Image.Image:
        """Draw the sheet."""
        drawn, until = self.drawn, clock() + SECONDS
        cards = [
            self.card(*one, sample, lambda: clock() > until) for one, sample in zip(drawn, self.shown, strict=True)
        ]
        which = "Step 1" if (last := drawn[-1][0] + 1) == 1 else f"Steps 1 to {last}"
        cut = f"; here are the first {MOST}" if len(drawn) == MOST else ""
        size = many(self.loader.sampler.size(0), "sample")
        title = f"{which} of {self.config.settings.steps:,}, as trained, with {size} a step{cut}"
        return batch_sheet(cards, title, self.notes)

    def card(self, step: int, drawn: DrawnSample, is_class: bool, sample: Sample, is_late: Callable[[], bool]) -> Card:
        """Return one sample of a step as it is trained. `is_late` tells whether no more images are to be decoded."""
        config = self.config
        loader = self.prior.loader if is_class and self.prior is not None else self.loader
        limit = config.settings.reference_resolution**2
        drops_references = bool(sample.references) and loader.drops_references(step)
        planned, work = plan_sample(sample, config.buckets, limit)
        entry = planned.variants[drawn.variant]
        assert entry.bucket == drawn.entry.bucket
        facts = [f"step {step + 1}{', class image' if is_class else ''}", *facts_of(work[entry.key])]
        weights = None
        if sample.mask is not None and entry.mask_key is not None:
            if config.loss.drops_mask(loader.seed, step, drawn.position):
                facts.append("mask: not used in this step, as drawn (loss.unmasked_probability)")
            else:
                weights, said = self.weights(work[entry.mask_key], limit, is_late())
                facts.append(said)
        if sample.loss_weight != 1:
            facts.append(f"its loss counts {sample.loss_weight:g} times (dataset.loss_weight)")
        if drops_references:
            facts.append("references: left out in this step, as drawn (reference_dropout)")
        tiles = [tile(role, work[key], limit, weights, is_late) for role, key in self.targets(entry)]
        if not drops_references:
            references = enumerate(entry.reference_keys, 1)
            tiles += [tile(f"reference {number}", work[key], limit, None, is_late) for number, key in references]
        return Card(tiles, name_of(sample.target), facts, self.texts(drawn, is_class))

    def targets(self, entry: LatentEntry) -> list[tuple[str, str]]:
        """Return the images that are denoised, one or both of a pair: what each is to it, and its key."""
        if entry.rejected_key is None:
            return [("trained", entry.key)]
        ends = ("scale 1", "scale -1") if self.config.target.uses_pairs else ("preferred", "rejected")
        return [(ends[0], entry.key), (ends[1], entry.rejected_key)]

    def weights(self, mask: Work, limit: int, is_late: bool) -> tuple[np.ndarray | None, str]:
        """Return the weights of a mask in the loss, and a line about them."""
        if is_late:
            return None, f"mask: {NO_TIME}"
        try:
            found = torch.from_numpy(np.array(mask.image(limit))).float() / 255
        except BadPicture as error:
            return None, f"mask: {error.name} {error.reason}"
        weights = self.config.loss.token_weights(found)
        least = f"{weights.min():.2g} to {weights.max():.2g}"
        return weights.numpy(), f"mask: {weights.mean():.0%} of the image counts (weights {least})"

    def texts(self, drawn: DrawnSample, is_class: bool) -> list[str]:
        """Return the texts that the sample is trained with."""
        caption = drawn.caption or ("(no caption: dropped)" if drawn.drops_caption else "(empty caption)")
        prompts = [] if is_class else self.config.target.prompts_for([drawn.caption])
        if not isinstance(self.config.target, Slider) or not prompts:
            return [caption]
        return [
            f"{name}: {prompt[0]}" for name, prompt in zip(("positive", "negative", "trained"), prompts, strict=True)
        ]


def name_of(picture: Picture) -> str:
    """Return the name of an image, of a file without its folders."""
    opener = picture.open
    return Path(picture.name).name if isinstance(opener, FileOpener) and opener.length is None else picture.name


def facts_of(work: Work) -> Iterator[str]:
    """Yield lines about the size and the crop of a sample's image."""
    (width, height), (wide, high) = work.picture.size, work.size
    yield f"bucket {wide} x {high}, from {width} x {height} pixels"
    if changes := changes_of(work.cut):
        yield ", ".join(changes)


def changes_of(cut: Cut) -> list[str]:
    """Return what a variant changes of the center crop."""
    found = [] if cut.at == MIDDLE.at else [f"crop at {cut.at[0] / 10:g} % across and {cut.at[1] / 10:g} % down"]
    found += ["mirrored"] if cut.mirrored else []
    found += [f"turned by {cut.turned / 100:g} degrees"] if cut.turned else []
    names = ("brightness", "contrast", "saturation")
    return found + [f"{name} x {value / 1000:g}" for name, value in zip(names, cut.light, strict=True) if value != 1000]


def tile(role: str, work: Work, limit: int, weights: np.ndarray | None, is_late: Callable[[], bool]) -> Tile:
    """Return an image as it is encoded, with its mask over it; shrunk, so that few large ones are in memory."""
    label = f"{role}, {work.size[0]} x {work.size[1]}"
    if is_late():
        return Tile(label, None, NO_TIME)
    try:
        image = work.image(limit)
    except BadPicture as error:
        return Tile(label, None, f"{error.name} {error.reason}. Its latents are in the cache, or training reports it")
    if weights is not None:
        image = with_mask(image, weights)
    return Tile(label, scaled(image, SIDE) if max(image.size) > SIDE else image)


def write_first_batch(config: RunConfig, location: RunLocation, data: TrainingData) -> None:
    """Write the sheet of a new run into its folder; a failure is a warning. A resumed run keeps what it has."""
    file = location.folder / FIRST_BATCH
    if not config.accelerator.is_main_process or location.checkpoint is not None:
        return
    classes = () if data.prepared.classes is None else data.prepared.classes[0]
    try:
        file.unlink(missing_ok=True)  # of a start that saved nothing, perhaps with other captions
        write_whole(file, FirstBatch(config, data.loader, data.samples, data.prior, classes).sheet())
        config.say(f"the first batch, as it is trained: {file}")
    except FAILURES as error:
        what = reason(error) if isinstance(error, OSError) else str(error)
        warn(f"{file} was not written ({type(error).__name__}: {what}). The run goes on without it")


def planned(request: CacheRequest) -> CachedDataset:
    """Return the cached form of samples of which nothing is cached; the keys of it are those of no model."""
    plan = request.plan_latents("")  # skips bad samples
    captions = [caption for sample in request.samples for caption in sample.captions]
    return CachedDataset.from_plan(plan, PromptKeys([*captions, ""], {}))


def plan_first_batch(config: RunConfig) -> FirstBatch:
    """Return what a run would train first, without encoding anything. Raises ValueError for bad data as the run does.

    Images are read for their digests, on which crops and the held-out samples depend. No files of a model are needed.
    """
    request = cache_request(config)
    check_pairs(config.loss, config.target, request.samples)
    cached, classes, notes = planned(request), None, list[str]()
    if config.prior is not None and (found := class_dataset(config)) is not None:
        classes = found, planned(replace(request, samples=found))
    elif config.prior is not None:
        notes.append("Each step also trains class images, which the base draws before training (preservation=prior).")
    request.digests.save()
    request.digests.close()
    training, _ = config.validation.split(cached.contents, cached.references, cached.pixels)
    processes = config.planned_processes or config.accelerator.num_processes
    prepared = PreparedData(request.samples, cached, classes)
    loader, prior = make_loaders(config, prepared, training, processes)
    samples = [request.samples[i] for i in training]
    return FirstBatch(config, loader, samples, prior, () if classes is None else classes[0], notes)


def check_new(preview: object) -> Path:
    """Return the file of `preview=batch.png`. Raise ValueError for what is none, and for one that exists."""
    file = user_path(preview) if isinstance(preview, str) and preview.lower().endswith(".png") else None
    if file is None:
        raise ValueError(f"preview={preview!r} must be the name of a PNG file to write. Write +preview=batch.png.")
    if os.path.lexists(file):
        raise ValueError(f"preview={preview!r} exists and is not overwritten. Give another name, or remove it.")
    make_writable(file.parent, "the folder of preview")
    return file
