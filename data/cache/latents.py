"""Cache entries of the samples' images: their sizes, crops and keys, and filling them.

A sample has one entry for its target, one for each reference and one for its mask; with random crops or mirrored
copies it has several such variants, drawn once by the content of the image, and each step of training draws one of
them. So a run that reads them from the cache sees the same as one that crops and encodes again: no draw depends on the
state of a generator.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache as memoized
from itertools import chain
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
from data.cache.image_digests import Digests, content_digest
from data.cache.store import Cache, Progress, Shape, check_finite, fill_share, share_of
from data.memory import in_parts, without_collection
from data.sources import Sample
from data.sources.images import BadPicture, Picture, shorten

LATENT_CHANNELS = 128
AT_ONCE = 1000  # samples whose images are looked up together
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LatentEntry:
    """Sizes in pixels, (width, height), and cache keys of one sample's images."""

    size: Size
    key: str
    reference_sizes: tuple[Size, ...] = ()
    reference_keys: tuple[str, ...] = ()
    mask_key: str | None = None
    rejected_key: str | None = None
    others: tuple["LatentEntry", ...] = ()  # further variants of the same sizes: other crops and mirrored ones

    @property
    def bucket(self) -> tuple[Size, tuple[Size, ...]]:
        """Sizes of target and references; samples with equal buckets can share a batch."""
        return self.size, self.reference_sizes

    @property
    def variants(self) -> tuple["LatentEntry", ...]:
        return (self, *self.others)

    @property
    def keys(self) -> set[str]:
        """Cache keys of all variants."""
        own = {self.key, *self.reference_keys} | {key for key in (self.mask_key, self.rejected_key) if key is not None}
        return own.union(*(other.keys for other in self.others))


class Work(NamedTuple):
    """An image to encode, or a mask to store, with its size and crop."""

    picture: Picture
    kind: str  # target, reference or mask
    size: Size
    cut: Cut

    @property
    def name(self) -> str:
        """Name of the tensor in its entry."""
        return "mask" if self.kind == "mask" else "latents"

    @property
    def shape(self) -> tuple[int, int, int]:
        return mask_shape(self.size) if self.kind == "mask" else latent_shape(self.size)

    @property
    def is_enlarged(self) -> bool:
        original = self.picture.size
        return self.size[0] > original[0] or self.size[1] > original[1]

    def image(self, reference_max_pixels: int) -> Image.Image:
        """Return the pixels that are encoded, or the mask that is stored. Raise BadPicture if it cannot be used."""
        # otherwise changed content would be stored under the old key
        picture = self.picture.unchanged(content_digest(self.picture))
        if self.kind == "mask":
            mask = fit_mask(picture.load_mask(), self.size, self.cut)
            if mask.getbbox() is None:
                raise BadPicture(picture.name, "is a mask that is black in the whole crop, so nothing would be learned")
            return mask
        image = picture.load()
        if self.kind == "reference":
            return fit_reference(image, reference_max_pixels, self.cut.mirrored)
        return fit(image, self.size, self.cut)


@dataclass
class BucketRow:
    """One line of the bucket table: the number of images, and the share of each that is cropped away."""

    pictures: int = 0
    lost: float = 0.0  # sum of the shares
    most: float = 0.0  # the largest share
    own: bool = False  # a bucket for images that fill no bucket of a resolution
    references: Counter[tuple[Size, ...]] = field(default_factory=Counter)  # samples by the sizes of their references

    def add(self, share: float) -> None:
        self.pictures, self.lost, self.most = self.pictures + 1, self.lost + share, max(self.most, share)


@dataclass(frozen=True)
class LatentPlan:
    """Cache entries of all samples that are not `bad`, in sample order, and their images."""

    cache: Cache
    entries: tuple[LatentEntry, ...]
    work: Mapping[str, Work]  # image to encode for each key
    reference_max_pixels: int
    bad: Mapping[int, str]  # reason for each bad sample by its index, to be read after the sample's name
    table: Mapping[Size, BucketRow]  # line of the bucket table for each bucket
    middles: int  # number of samples with references, whose center is used although random crops are requested

    @property
    def lacking(self) -> list[str]:
        """The keys of the entries that are missing from the cache, incomplete or of another shape."""
        return self.cache.lacking(list(self.work), self.expected)

    @property
    def missing(self) -> int:
        return len(self.lacking)

    def missing_in(self, process_index: int, num_processes: int) -> int:
        """Return the number of missing entries in one process's share."""
        keys = share_of(self.cache, list(self.work), process_index, num_processes)
        return len(self.cache.lacking(keys, self.expected))

    def expected(self, key: str) -> tuple[str, Shape]:
        """Return name and shape of an entry's tensor."""
        work = self.work[key]
        return work.name, work.shape

    def size(self, key: str) -> int:
        """Return the bytes of an entry's tensor: 1 per number of a mask, 4 per number of latents."""
        work = self.work[key]
        return math.prod(work.shape) * (1 if work.kind == "mask" else 4)

    def fill(
        self,
        encode: Callable[[list[Image.Image]], Tensor],
        process_index: int = 0,
        num_processes: int = 1,
        progress: Progress | None = None,
    ) -> dict[str, BadPicture]:
        """Compute this process's share of the missing entries and store each as soon as it is ready.

        `encode` takes one RGB image, in a list, of width W and height H and returns (1, 128, H/16, W/16) in any float
        dtype, on any device; it is not called for masks. Latents are stored as "latents" (128, H/16, W/16), masks as
        "mask" (1, H/16, W/16), 0 to 255.

        Returns the errors of images that cannot be decoded, by key; `without` removes their samples.
        Raises ValueError, naming the image, for latents that are not finite.
        """
        bad = {}

        def compute(key: str) -> int:
            work = self.work[key]
            try:
                image = work.image(self.reference_max_pixels)
            except BadPicture as error:
                bad[key] = error
                return 0
            if work.kind == "mask":
                tensor = torch.from_numpy(np.array(image))[None]  # (1, H/16, W/16)
            else:
                latents, expected = encode([image]), (1, *latent_shape(image.size))
                assert tuple(latents.shape) == expected, f"encode returned {tuple(latents.shape)} for {expected}"
                check_finite(latents, f"the autoencoder's latents of image {work.picture.name}")
                tensor = latents[0]
            return self.cache.put(key, {work.name: tensor}, {"picture": work.picture.name})

        fill_share(self.cache, self.expected, list(self.work), compute, process_index, num_processes, progress)
        return bad

    def without(self, bad: Mapping[str, BadPicture]) -> "LatentPlan":
        """Return the plan without the samples that need one of these keys; they are `bad` in the new plan."""
        good, reasons = [], {}
        for number, entry in enumerate(self.entries):
            if hit := bad.keys() & entry.keys:
                reasons[number] = _reason(self.work[entry.key].picture, bad[min(hit)])
            else:
                good.append(entry)
        work = {key: work for key, work in self.work.items() if key not in bad}
        return replace(self, entries=tuple(good), work=work, bad=reasons)


@without_collection()
def plan_latents(
    cache: Cache,
    samples: Sequence[Sample],
    buckets: Buckets,
    encoder_id: str,
    reference_max_pixels: int,
    digests: Digests | None = None,
) -> LatentPlan:
    """Return the plan with the bucket and the keys of every image, without decoding any.

    A sample whose image has no readable header or is too small, or whose mask has another size, is listed in `bad`.
    Logs one warning with the number of images that are scaled up. Raises ValueError for random crops if no sample can
    have any.

    Args:
        encoder_id: Fingerprint of the autoencoder's weights and dtype.
        reference_max_pixels: Maximum area of a reference, which keeps its aspect ratio.
        digests: Known digests and sizes; without it the header and content of each image is read.
    """
    planner = _Planner(buckets, encoder_id, reference_max_pixels, digests or Digests())
    entries, bad = [], {}
    for number, sample in enumerate(chain.from_iterable(map(planner.recalled, in_parts(samples, AT_ONCE)))):
        try:
            entries.append(planner.entry(sample))
        except BadPicture as error:
            bad[number] = _reason(sample.target, error)
    middles = sum(bool(entry.reference_sizes) for entry in entries) if buckets.random_crops else 0
    if entries and middles == len(entries):
        raise ValueError(
            f"buckets.random_crops={buckets.random_crops} has no effect: all samples have references, which are not "
            "cropped with their images, so the center is used. Remove it"
        )
    table: dict[Size, BucketRow] = {}
    for entry in entries:
        if (row := table.get(entry.size)) is None:
            row = table[entry.size] = BucketRow(own=entry.size not in buckets.sizes)
        row.add(lost(planner.work[entry.key].picture.size, entry.size))
        row.references[entry.reference_sizes] += 1
    images = [work for work in planner.work.values() if work.kind != "mask"]
    if enlarged := [work for work in images if work.is_enlarged]:
        example = "{}, {} x {}".format(shorten(enlarged[0].picture.name), *enlarged[0].picture.size)
        log.warning(
            "%d of %d images are smaller than the size that they are trained at and are scaled up, such as %s",
            *(len(enlarged), len(images), example),
        )
    return LatentPlan(cache, tuple(entries), planner.work, reference_max_pixels, bad, table, middles)


def plan_sample(sample: Sample, buckets: Buckets, reference_max_pixels: int) -> tuple[LatentEntry, dict[str, Work]]:
    """Return the entry of one sample of a plan and its images by key, which name no encoder."""
    planner = _Planner(buckets, "", reference_max_pixels, Digests())
    return planner.entry(sample), planner.work


class _Planner:
    """Plans one sample after the other, and collects the images to encode in `work`."""

    def __init__(self, buckets: Buckets, encoder_id: str, reference_max_pixels: int, digests: Digests) -> None:
        self.buckets, self.encoder_id = buckets, encoder_id
        self.reference_max_pixels, self.digests = reference_max_pixels, digests
        self.assign, self.key_of = memoized(buckets.assign), memoized(self._keys)
        self.work: dict[str, Work] = {}

    def recalled(self, samples: list[Sample]) -> list[Sample]:
        """Return the same, with what earlier starts know of the images."""
        self.digests.recall(picture for sample in samples for picture in sample.pictures)
        return samples

    def entry(self, sample: Sample) -> LatentEntry:
        """Return the entry of a sample. Raise BadPicture, without planning anything, if it cannot be used."""
        for picture in sample.pictures:
            if picture.digests is None:
                self.digests.look(picture)
        original = sample.target.size
        caps = tuple(reference_size(*picture.size, self.reference_max_pixels) for picture in sample.references)
        if sample.mask is not None and sample.mask.size != original:
            sizes = "{} x {} pixels, but its image {} x {}".format(*sample.mask.size, *original)
            raise BadPicture(sample.mask.name, f"is a mask and has {sizes}")
        size = self.assign(*original, sample.resolution)
        if size is None:
            raise BadPicture(sample.target.name, self.buckets.too_small(*original))
        cuts = self.buckets.cuts(original, size, content_digest(sample.target))
        if sample.references:  # which are not cropped with their image
            cuts = tuple(dict.fromkeys(Cut(mirrored=cut.mirrored) for cut in cuts))
        variants = []
        for cut in cuts:
            key = self.add(Work(sample.target, "target", size, cut))
            reference_keys = tuple(
                self.add(Work(picture, "reference", cap, cut))
                for picture, cap in zip(sample.references, caps, strict=True)
            )
            mask_key = None if sample.mask is None else self.add(Work(sample.mask, "mask", size, cut.of_mask))
            rejected_key = None if sample.rejected is None else self.add(Work(sample.rejected, "target", size, cut))
            variants.append(LatentEntry(size, key, caps, reference_keys, mask_key, rejected_key))
        return replace(variants[0], others=tuple(variants[1:])) if len(variants) > 1 else variants[0]

    def add(self, work: Work) -> str:
        """Collect an image to encode, unless it is known, and return its key."""
        key = self.key_of(work.kind, work.size, work.cut)(content_digest(work.picture))
        self.work.setdefault(key, work)
        return key

    def _keys(self, kind: str, size: Size, cut: Cut) -> Callable[[str], str]:
        """Return a function from the digest of an image to its key."""
        recipe = {"size": size, "fit": FIT_VERSION, **cut.recipe}
        if kind == "mask":
            return Cache.keys("mask", "picture", **recipe)
        recipe |= {"encoder": self.encoder_id, "reference": kind == "reference"}
        return Cache.keys("latents", "picture", **recipe)


def _reason(target: Picture, error: BadPicture) -> str:
    """Return the reason why a sample is bad, to be read after the name of its target."""
    return error.reason if error.name == target.name else f"has {shorten(error.name)}, which {error.reason}"


def latent_shape(size: Size) -> tuple[int, int, int]:
    """Return the shape of the latents of an image of `size` pixels, (width, height)."""
    return LATENT_CHANNELS, size[1] // PIXELS_PER_LATENT, size[0] // PIXELS_PER_LATENT


def mask_shape(size: Size) -> tuple[int, int, int]:
    """Return the shape of the mask of an image of `size` pixels, (width, height)."""
    return 1, size[1] // PIXELS_PER_LATENT, size[0] // PIXELS_PER_LATENT
