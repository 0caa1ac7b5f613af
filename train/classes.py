"""The class pictures of a run (train/prior.py): which they are, what is cached of them, and what reads them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from data.loader import Loader
from data.samples import Source
from flux2.model import Transformer
from flux2.pipeline import Pipeline
from flux2.sources import fingerprint
from flux2.weights import load_autoencoder
from train.cache import Needs, Prepared
from train.command import made
from train.prior import ClassPictures, Drawn, PriorPreservation, Recipe, draw, picture_file
from train.trained_data import TrainedData

if TYPE_CHECKING:
    from train.configured import Configured
    from train.run import Run


def class_size(run: Configured) -> tuple[int, int]:
    """(width, height) of class pictures that are drawn, pixels."""
    prior, (width, height) = settings(run), run.buckets.nearest(1, 1)
    return prior.width or width, prior.height or height


def given_classes(run: Run) -> Source | None:
    """The dataset of class pictures, if one is given."""
    if run.prior is None or run.prior.dataset is None:
        return None
    source: Source = made("preservation.dataset", run.prior.dataset)
    return source


def recipe(run: Run) -> Recipe:
    """Of class pictures that are drawn."""
    prior, (width, height) = settings(run), class_size(run)
    return Recipe(
        " ".join(fingerprint(run.source, part) for part in ("transformer", "vae")),
        run.precision.name,
        tuple(prior.prompts),
        prior.seed,
        width,
        height,
        prior.steps or run.variant.steps,
        float(run.variant.guidance if prior.guidance is None else prior.guidance),
    )


def drawn_classes(run: Run, prepared: Prepared) -> Source:
    """Class pictures that the base draws, or drew before. `prepared` has the embeddings of their prompts."""
    prior, device = settings(run), run.accelerator.device
    precision = replace(run.precision, keep_both_layouts=False)  # there is no backward

    def load() -> Transformer:
        if run.processes.sharded:
            raise ValueError(
                "preservation.prompts: the base draws class pictures whole, which shard=true is there to avoid. Draw "
                "them first, in a run without it, with memory.stream_blocks=1.0 if need be: they are kept"
            )
        pipe = Pipeline(run.source, device, precision, False, run.memory.stream_blocks, run.copies)
        transformer = pipe.transformer
        if run.settings.embedding_storage.startswith("projected"):
            transformer.txt_in = nn.Identity()  # it is applied in what is stored
        return transformer

    decoder = partial(load_autoencoder, run.source, device)
    folder = Path(prior.folder).expanduser()
    return draw(folder, recipe(run), prior.count, run.accelerator, prepared, load, decoder, run.say)


def class_needs(run: Run) -> list[Needs]:
    """What is to be cached of the class pictures that are there, if any."""
    if run.prior is None:
        return []
    source = given_classes(run)
    if source is None:
        made_by = recipe(run)
        folder = Path(run.prior.folder).expanduser() / made_by.name
        if not all(picture_file(folder, index).exists() for index in range(run.prior.count)):
            return []
        source = Drawn(folder, made_by, run.prior.count)
    return [replace(run.needs(), samples=source, prompts=[])]


def class_loader(run: Run, **cut: int) -> ClassPictures | None:
    """What gives them to training, once `run.prepare` was called; None if there are none.

    Args:
        cut: how a step is cut into processes and micro-batches, as in `data.loader.Loader`.
    """
    if run.prior is None:
        return None
    assert run.classes is not None
    source, ready = run.classes
    make = partial(
        Loader,
        ready.cache,
        ready.entries,
        [sample.captions for sample in source],
        ready.prompts,
        batch_size=run.prior.beside(run.settings.batch_size),
        weights=[sample.weight for sample in source],
        **cut,
    )
    return ClassPictures(make, run.settings.seed, run.prior.weight, [sample.name for sample in source])


def class_data(run: Run) -> TrainedData | None:
    """What a later start compares them by; None if there are none."""
    if run.classes is None:
        return None
    source, ready = run.classes
    names, captions = [sample.name for sample in source], [sample.captions for sample in source]
    return TrainedData.of(names, ready.entries, captions, [sample.weight for sample in source])


def settings(run: Configured) -> PriorPreservation:
    assert run.prior is not None
    return run.prior
