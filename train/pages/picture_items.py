"""What the page of pictures shows of one sample: sizes, bucket, what is cropped away, and its other images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple
from urllib.parse import urlencode

from data.buckets import Buckets, Size, lost, reference_size
from data.sources.base import CaptionPlace
from data.sources.images import BadPicture, Picture
from train.pages.datasets import Chosen, OpenedDataset, key_of
from train.pages.thumbnails import SIDES, stamp
from train.utils.caption_files import is_writable, state_of


class View(NamedTuple):
    """An image: what it is to its sample, the addresses of a small and a large JPEG, and its size in words."""

    role: str
    name: str
    small: str
    large: str
    size: Size | None
    text: str


class Bucket(NamedTuple):
    """A training size of an image, the share that is cropped away, and whether it is enlarged."""

    size: Size
    lost: float
    is_enlarged: bool


@dataclass(frozen=True)
class Item:
    """A sample as the page shows it."""

    key: str
    state: str
    name: str
    reason: str  # why training cannot use it; empty if it can
    target: View
    others: Sequence[View]
    buckets: Sequence[Bucket]
    kept: str  # what the first bucket keeps of the image: distances from its sides, as a style
    text: str  # captions as they are written, one a line
    is_list: bool
    is_writable: bool
    place: str
    trained: Sequence[str]  # captions as they are trained, if that is something else
    group: int  # number of the group of images that look alike; 0 for none
    said: str


def view(chosen: Chosen, role: str, picture: Picture, text: str = "") -> View:
    """Return an image for the page. What cannot be read has no size."""
    given = {**asdict(chosen), "name": picture.name, "v": stamp(picture)}
    small, large = (f"/pictures/image?{urlencode({**given, 'side': side}, errors='surrogateescape')}" for side in SIDES)
    try:
        size = picture.size
    except BadPicture:
        return View(role, picture.name, small, large, None, "")
    return View(role, picture.name, small, large, size, f"{size[0]} x {size[1]}{text}")


def buckets_of(buckets: Buckets, size: Size) -> list[Bucket]:
    """Return the training sizes of an image: several with each_resolution."""
    sides = buckets.filled(*size) if buckets.each_resolution else ()
    found = [buckets.assign(*size, side) for side in sides or (None,)]
    return [Bucket(one, lost(size, one), one[0] > size[0] or one[1] > size[1]) for one in found if one is not None]


def kept(picture: Size, size: Size) -> str:
    """Return the style of the part of an image that a center crop to the shape of `size` keeps."""
    wide, high = picture[0] * size[1], picture[1] * size[0]
    across, down = (50 * (1 - min(1, high / wide)), 50 * (1 - min(1, wide / high)))
    return f"inset: {down:.2f}% {across:.2f}%"


def others_of(opened: OpenedDataset, place: CaptionPlace) -> list[View]:
    """Return the references of a sample, its mask and the image that it is preferred over."""
    sample, found = place.sample, list[View]()
    for number, picture in enumerate(sample.references, 1):
        made = view(opened.chosen, f"reference {number}", picture)
        if made.size is not None:
            trained = reference_size(*made.size, opened.reference_pixels)
            if trained != made.size:
                made = made._replace(text=f"{made.text}, trained at {trained[0]} x {trained[1]}")
        found.append(made)
    for role, other in (("mask", sample.mask), ("rejected", sample.rejected)):
        if other is not None:
            found.append(view(opened.chosen, role, other))
    return found


def item_of(opened: OpenedDataset, place: CaptionPlace, *, group: int, said: str) -> Item:
    """Return a sample for the page."""
    target = view(opened.chosen, "image", place.sample.target)
    buckets = [] if target.size is None else buckets_of(opened.buckets, target.size)
    written = [text.strip() for text in place.written]
    is_list = isinstance(place.row.get(place.column), list)
    trained = [text for text in place.sample.captions if not place.reason]
    where = "" if place.file is None else str(place.file) if place.line is None else f"{place.file} line {place.line}"
    return Item(
        key_of(place),
        state_of(place),
        place.sample.name,
        opened.reasons.get(place.sample.name, ""),
        target,
        others_of(opened, place),
        buckets,
        kept(target.size, buckets[0].size) if target.size is not None and buckets else "",
        "\n".join(written),
        is_list,
        is_writable(place) and not (is_list and any("\n" in text for text in written)),
        where,
        [] if trained == written else trained,
        group,
        said,
    )
