"""Which cache entries the pictures of the samples need, in which sizes and cuts, and how they are filled.

A sample has one entry for its target, one for each reference and one for its mask; with random crops or mirrored
copies it has several such variants, drawn once by the content of the picture, and training draws one of them each time.
A run that reads them from the cache thus sees what one would that cut and encoded them anew: neither draws from a
generator that runs on.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache as memoised
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.buckets import (
    FIT_VERSION,
    PIXELS_PER_LATENT,
    Buckets,
    Cut,
    Size,
    fit,
    fit_mask,
    fit_reference,
    lost,
    reference_size,
)
from data.cache.image_digests import Digests
from data.cache.store import Cache, Progress, check_finite, each, share
from data.sources import Sample
from data.sources.images import BadPicture, Picture, shortened

LATENT_CHANNELS = 128
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LatentEntry:
    """Sizes in pixels, (width, height), and cache keys of one sample's target, references and mask.

    `others` are further variants of the sample, of the same sizes: crops in other places, mirrored ones.
    """

    size: Size
    key: str
    reference_sizes: tuple[Size, ...] = ()
    reference_keys: tuple[str, ...] = ()
    mask_key: str | None = None
    others: tuple["LatentEntry", ...] = ()

    @property
    def bucket(self) -> tuple[Size, tuple[Size, ...]]:
        """Samples of equal buckets stack into one batch."""
        return self.size, self.reference_sizes

    @property
    def variants(self) -> tuple["LatentEntry", ...]:
        return (self, *self.others)

    @property
    def keys(self) -> set[str]:
        """Of all variants."""
        own = {self.key, *self.reference_keys} | ({self.mask_key} if self.mask_key else set())
        return own.union(*(other.keys for other in self.others))


class Work(NamedTuple):
    """A picture to encode, or a mask to store, and how it is cut."""

    picture: Picture
    kind: str  # target, reference or mask
    size: Size
    cut: Cut
    digest: str  # of the content that is planned

    @property
    def name(self) -> str:
        """Of the tensor in its entry."""
        return "mask" if self.kind == "mask" else "latents"

    @property
    def shape(self) -> tuple[int, int, int]:
        return mask_shape(self.size) if self.kind == "mask" else latent_shape(self.size)


@dataclass
class BucketRow:
    """One line of the bucket table: how many pictures, and what share of each is cut off."""

    pictures: int = 0
    lost: float = 0.0  # summed over them
    most: float = 0.0
    own: bool = False  # of pictures that fill no bucket

    def add(self, share: float) -> None:
        self.pictures, self.lost, self.most = self.pictures + 1, self.lost + share, max(self.most, share)


@dataclass(frozen=True)
class LatentPlan:
    """`entries` in sample order, of those samples that are not `bad`, and the pictures behind them.

    Attributes:
        work: for each key, what is to be encoded.
        bad: what is wrong with the others, by number of the sample; to be read on from the sample's name.
        table: by bucket.
        middles: samples with references that keep their middle although random crops are asked for.
    """

    cache: Cache
    entries: tuple[LatentEntry, ...]
    work: Mapping[str, Work]
    reference_max_pixels: int
    bad: Mapping[int, str] = field(default_factory=dict)
    table: Mapping[Size, BucketRow] = field(default_factory=dict)
    middles: int = 0

    @property
    def lacking(self) -> list[str]:
        """The keys of the entries that are not in the cache now, or not whole, or not of their shape."""
        return [key for key in self.work if self.lacks(key)]

    @property
    def missing(self) -> int:
        return len(self.lacking)

    def lacks(self, key: str) -> bool:
        work = self.work[key]
        return not self.cache.holds(key, work.name, work.shape)

    def size(self, key: str, bytes_each: int = 4) -> int:
        """Bytes of an entry's content, with latents of `bytes_each` bytes a number."""
        work = self.work[key]
        return math.prod(work.shape) * (1 if work.kind == "mask" else bytes_each)

    def fill(
        self,
        encode: Callable[[list[Image.Image]], Tensor],
        process_index: int = 0,
        num_processes: int = 1,
        progress: Progress | None = None,
    ) -> dict[str, BadPicture]:
        """Computes this process's share of the missing entries, storing each as soon as it is there.

        `encode` takes one RGB picture, in a list, of width W and height H and returns (1, 128, H/16, W/16), any float
        dtype and device; for masks it is not called. Latents are stored as "latents", (128, H/16, W/16), masks as
        "mask", (1, H/16, W/16), 0 to 255.

        Returns what is wrong with the pictures that cannot be decoded, by key: `without` leaves their samples out.
        Raises ValueError, naming the picture, for latents that are not finite.
        """
        bad = {}

        def compute(key: str) -> int:
            work = self.work[key]
            try:
                image = self._image(work)
            except BadPicture as error:
                bad[key] = error
                return 0
            tensor = self._mask(image) if work.kind == "mask" else self._latents(encode, image, work)
            return self.cache.put(key, {work.name: tensor}, {"picture": work.picture.name})

        self.cache.sweep()
        each(compute, share(self.cache, self.lacks, list(self.work), process_index, num_processes), 1, progress)
        return bad

    def without(self, bad: Mapping[str, BadPicture]) -> "LatentPlan":
        """The plan without the samples that need one of these keys: they are the `bad` ones of the new plan."""
        good, reasons = [], {}
        for number, entry in enumerate(self.entries):
            if hit := bad.keys() & entry.keys:
                reasons[number] = _reason(self.work[entry.key].picture, bad[min(hit)])
            else:
                good.append(entry)
        work = {key: work for key, work in self.work.items() if key not in bad}
        return replace(self, entries=tuple(good), work=work, bad=reasons)

    def _image(self, work: Work) -> Image.Image:
        picture = work.picture.unchanged(work.digest)  # or another content would be kept under this one's name
        if work.kind == "mask":
            mask = fit_mask(picture.load_mask(), work.size, work.cut)
            if mask.getbbox() is None:
                reason = "is a mask and black all over in what is trained, so that nothing would be learned"
                raise BadPicture(picture.name, reason)
            return mask
        image = picture.load()
        if work.kind == "reference":
            return fit_reference(image, self.reference_max_pixels, work.cut.mirrored)
        return fit(image, work.size, work.cut)

    def _mask(self, image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(image))[None]  # (1, H/16, W/16)

    def _latents(self, encode: Callable[[list[Image.Image]], Tensor], image: Image.Image, work: Work) -> Tensor:
        latents = encode([image])
        expected = (1, *latent_shape(image.size))
        assert tuple(latents.shape) == expected, f"encode returned {tuple(latents.shape)} for {expected}"
        check_finite(latents, f"the autoencoder's latents of picture {work.picture.name}")
        return latents[0]


def plan_latents(
    cache: Cache,
    samples: Sequence[Sample],
    buckets: Buckets,
    encoder_id: str,
    reference_max_pixels: int,
    digests: Digests | None = None,
) -> LatentPlan:
    """Finds the bucket and the keys of every picture; decodes nothing.

    Args:
        encoder_id: a fingerprint of the autoencoder's weights and dtype.
        reference_max_pixels: references keep their shape, up to this area each.
        digests: what is known of the pictures; without it each header and content is read.

    A sample with a picture whose header cannot be read, one that is too small, or a mask of another size than its
    picture is listed in `bad`. Logs one warning, with their number, of pictures that are scaled up. Raises ValueError
    for random crops of which no sample can have any.
    """
    planner = _Planner(cache, buckets, encoder_id, reference_max_pixels, digests or Digests())
    entries, bad = [], {}
    for number, sample in enumerate(samples):
        try:
            entries.append(planner.entry(sample))
        except BadPicture as error:
            bad[number] = _reason(sample.target, error)
    if buckets.random_crops and entries and planner.middles == len(entries):
        raise ValueError(
            f"buckets.random_crops={buckets.random_crops} does nothing: all samples have references, which are not cut "
            "with their pictures, so these keep their middle. Leave it out"
        )
    if planner.enlarged:
        log.warning(
            "%d of %d pictures are smaller than the size that they are trained at and are scaled up, such as %s",
            len(planner.enlarged),
            len(planner.work),
            next(iter(planner.enlarged.values())),
        )
    return LatentPlan(
        cache,
        tuple(entries),
        planner.work,
        reference_max_pixels,
        bad,
        planner.table,
        planner.middles if buckets.random_crops else 0,
    )


class _Planner:
    """Plans one sample after the other; what they share is kept here."""

    def __init__(
        self, cache: Cache, buckets: Buckets, encoder_id: str, reference_max_pixels: int, digests: Digests
    ) -> None:
        self.cache, self.buckets, self.encoder_id = cache, buckets, encoder_id
        self.reference_max_pixels, self.digests = reference_max_pixels, digests
        self.assign = memoised(buckets.assign)
        self.work: dict[str, Work] = {}
        self.table: dict[Size, BucketRow] = {}
        self.enlarged: dict[str, str] = {}
        self.middles = 0

    def entry(self, sample: Sample) -> LatentEntry:
        """BadPicture for a sample that cannot be used; nothing of it is planned then."""
        digest, before = self.digests.look(sample.target)
        references = [(picture, *self.digests.look(picture)) for picture in sample.references]
        mask = None if sample.mask is None else (sample.mask, *self.digests.look(sample.mask))
        if mask is not None and mask[2] != before:
            sizes = " but its picture {} x {}".format(*before)
            raise BadPicture(mask[0].name, "is a mask and has {} x {} pixels,".format(*mask[2]) + sizes)
        size = self.assign(*before)
        if size is None:
            raise BadPicture(sample.target.name, self.buckets.too_small(*before))
        self.table.setdefault(size, BucketRow(own=size not in self.buckets.sizes)).add(lost(before, size))
        cuts = self.buckets.cuts(before, size, digest)
        if references:  # which are not cut with their picture
            self.middles += 1
            cuts = tuple(dict.fromkeys(Cut(mirrored=cut.mirrored) for cut in cuts))
        caps = tuple(reference_size(*own, self.reference_max_pixels) for _, _, own in references)
        variants = []
        for cut in cuts:
            mirror = Cut(mirrored=cut.mirrored)
            variants.append(
                LatentEntry(
                    size,
                    self.latents(sample.target, digest, before, Work(sample.target, "target", size, cut, digest)),
                    caps,
                    tuple(
                        self.latents(picture, content, own, Work(picture, "reference", cap, mirror, content))
                        for (picture, content, own), cap in zip(references, caps, strict=True)
                    ),
                    None if mask is None else self.mask(mask[1], Work(mask[0], "mask", size, cut, mask[1])),
                )
            )
        first, *others = variants
        return replace(first, others=tuple(others)) if others else first

    def latents(self, picture: Picture, digest: str, before: Size, work: Work) -> str:
        size = work.size
        recipe = {"picture": digest, "size": size, "fit": FIT_VERSION, "encoder": self.encoder_id}
        key = self.cache.key("latents", reference=work.kind == "reference", **recipe, **work.cut.recipe)
        self.work.setdefault(key, work)
        if size[0] > before[0] or size[1] > before[1]:
            self.enlarged[key] = f"{shortened(picture.name)}, {before[0]} x {before[1]}"
        return key

    def mask(self, digest: str, work: Work) -> str:
        key = self.cache.key("mask", picture=digest, size=work.size, fit=FIT_VERSION, **work.cut.recipe)
        self.work.setdefault(key, work)
        return key


def _reason(target: Picture, error: BadPicture) -> str:
    """What is wrong with a sample, to be read on from the name of its target."""
    return error.reason if error.name == target.name else f"has {shortened(error.name)}, which {error.reason}"


def latent_shape(size: Size) -> tuple[int, int, int]:
    """Of the latents of a picture of `size` pixels, (width, height)."""
    return LATENT_CHANNELS, size[1] // PIXELS_PER_LATENT, size[0] // PIXELS_PER_LATENT


def mask_shape(size: Size) -> tuple[int, int, int]:
    """Of its mask."""
    return 1, size[1] // PIXELS_PER_LATENT, size[0] // PIXELS_PER_LATENT
