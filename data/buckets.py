"""Aspect-ratio buckets: the size at which an image is trained, and how it is resized and cropped to it.

A batch is one tensor, so its images share a size; an image keeps most of its content if that size has nearly its
aspect ratio, where a square would distort it or crop away what the caption describes. The buckets of a resolution are
the sizes of at most `resolution`^2 pixels, so that every step costs about the same memory and time.

An image goes to the largest resolution whose bucket it fills. An image that fills none is not enlarged by default,
which would teach the model blur: it gets the largest size that it fills, and is skipped if that is too small.

Sides are multiples of 16 pixels, one latent: the autoencoder halves three times, and 2 x 2 patches once more.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property

from PIL import Image, ImageOps
from PIL.ImageEnhance import Brightness, Color, Contrast

from data.checks import check_flag, check_int

PIXELS_PER_LATENT = 16
MOST_CROPS = 1000  # of an image, each of which is encoded
MOST_COLOR, MOST_ROTATION = 0.5, 20.0
MAX_RESOLUTION = 8192  # a quarter of a million tokens, far more than FLUX.2 is trained for
FIT_VERSION = 2  # in cache keys of latents: increase it when `fit` or data.sources.pixels change pixels of all images

Size = tuple[int, int]  # (width, height) in pixels


@dataclass(frozen=True)
class Cut:
    """The part of an image that is trained on: one of the cached variants.

    `at` is the position of the crop along width and height, in thousandths of the pixels that are cropped away:
    (500, 500) is the center. Integers, because they are part of cache keys.
    """

    at: tuple[int, int] = (500, 500)
    mirrored: bool = False  # flipped horizontally
    turned: int = 0  # counterclockwise, in hundredths of a degree, before it is cropped
    light: tuple[int, int, int] = (1000, 1000, 1000)  # factors of brightness, contrast, saturation, in thousandths

    @property
    def recipe(self) -> dict[str, object]:
        """Fields of a cache key: none for the center crop, so that its entries do not depend on these options."""
        return (
            {}
            if self is MIDDLE
            else {key: value for key, value in asdict(self).items() if value != getattr(MIDDLE, key)}
        )

    @property
    def of_mask(self) -> "Cut":
        """The same part of the image's mask, which has no colors."""
        return replace(self, light=MIDDLE.light)


MIDDLE = Cut()


@dataclass(frozen=True)
class Buckets:
    """The sizes for one or several resolutions, the size of each image, and its crops.

    Raises ValueError, naming the argument, for a value out of range or of a wrong type.
    """

    resolution: int | Sequence[int]  # side of the square bucket in pixels, or several; a square image as large gets it
    step: int = 16  # sides are multiples of it, and it of 16; a larger one: fewer, fuller buckets, more cropping
    max_aspect: float = 2.0  # maximum ratio of the longer to the shorter side; 1.0 leaves only the square
    upscale: bool = False  # enlarge an image that fills no bucket to the smallest resolution, instead of its own size
    # side of a square whose area the own size of an image must have; None: a quarter of the smallest resolution
    min_resolution: int | None = None
    random_crops: int = 0  # number of cached crops of each image, drawn once by its content; 0: only the center
    flip: bool = False  # also cache a mirrored copy of each crop
    color: float = 0.0  # maximum change of brightness, contrast and saturation of random crops, as a share
    rotation: float = 0.0  # maximum angle by which random crops are turned, in degrees
    each_resolution: bool = False  # train an image at every resolution whose bucket it fills, not only the largest

    def __post_init__(self) -> None:
        _check_side("step", self.step, PIXELS_PER_LATENT)
        given = self.resolution if isinstance(self.resolution, list | tuple) else [self.resolution]
        for side in given:
            _check_side("resolution", side, self.step, MAX_RESOLUTION)
        if not given or len(set(given)) < len(given):
            raise ValueError(f"resolution={list(given)!r} must be one side or several different ones")
        if not isinstance(self.max_aspect, int | float) or not 1.0 <= self.max_aspect < math.inf:
            raise ValueError(f"max_aspect={self.max_aspect!r} must be a number of at least 1 (1: only the square)")
        check_flag("each_resolution", self.each_resolution)
        if self.each_resolution and len(given) < 2:
            raise ValueError(f"each_resolution=true has no effect with one resolution, {given[0]}. Give a list of them")
        check_flag("upscale", self.upscale)
        check_flag("flip", self.flip)
        check_int("random_crops", self.random_crops, 0, MOST_CROPS)
        for key, highest in (("color", MOST_COLOR), ("rotation", MOST_ROTATION)):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= highest:
                raise ValueError(f"{key}={value!r} must be a number from 0 to {highest:g}")
            if value and not self.random_crops:
                raise ValueError(f"{key}={value!r} has no effect without random_crops, the number of changed copies")
        least, most = self.min_resolution, self.resolutions[-1]
        if least is not None and (not isinstance(least, int) or isinstance(least, bool) or not 1 <= least <= most):
            raise ValueError(f"min_resolution={least!r} must be from 1 to the smallest resolution, {most}, or null")
        if least is not None and self.upscale:
            raise ValueError(f"min_resolution={least!r} has no effect with upscale=true: no image is too small")

    @cached_property
    def resolutions(self) -> tuple[int, ...]:
        """The resolutions, the largest first."""
        given = self.resolution if isinstance(self.resolution, list | tuple) else [self.resolution]
        return tuple(sorted(given, reverse=True))

    @property
    def largest(self) -> int:
        return self.resolutions[0]

    @property
    def least_pixels(self) -> float:
        """Minimum area, in pixels, of the own size of an image that fills no bucket."""
        return (self.resolutions[-1] / 4 if self.min_resolution is None else self.min_resolution) ** 2

    @cached_property
    def _by_resolution(self) -> dict[int, tuple[Size, ...]]:
        return {resolution: self._sizes_of(resolution) for resolution in self.resolutions}

    def _sizes_of(self, resolution: int) -> tuple[Size, ...]:
        """Return the sizes, widest first: each short side with the longest side within resolution^2 pixels."""
        wide = []
        for height in range(self.step, resolution + 1, self.step):
            width = resolution**2 // height // self.step * self.step
            if width <= self.max_aspect * height:
                wide.append((width, height))
        return (*wide, *((height, width) for width, height in reversed(wide[:-1])))  # the last is the square

    @cached_property
    def sizes(self) -> tuple[Size, ...]:
        """All buckets of all resolutions, each resolution's widest first, without the own sizes of small images."""
        return tuple(dict.fromkeys(size for sizes in self._by_resolution.values() for size in sizes))

    def nearest(self, width: int, height: int, resolution: int | None = None) -> Size:
        """Return the bucket with the aspect ratio nearest to that of an image, by default at the largest resolution."""
        sizes = self._by_resolution[resolution or self.largest]
        aspect = math.log(width / height)
        return min(sizes, key=lambda size: abs(math.log(size[0] / size[1]) - aspect))

    def filled(self, width: int, height: int) -> tuple[int, ...]:
        """Return the resolutions, the largest first, whose bucket of the nearest aspect ratio an image fills."""
        nearest = {resolution: self.nearest(width, height, resolution) for resolution in self.resolutions}
        return tuple(one for one, size in nearest.items() if width >= size[0] and height >= size[1])

    def assign(self, width: int, height: int, resolution: int | None = None) -> Size | None:
        """Return the bucket of an image of these pixels, at a resolution that it fills; None if it is too small.

        By default this is the first bucket that the image fills among those of the nearest aspect ratio (by the ratio
        of the ratios) at each resolution. If it fills none: with `upscale` the one of the smallest resolution,
        otherwise the largest size on the grid within the image and `max_aspect`.
        """
        if filled := self.filled(width, height):
            return self.nearest(width, height, resolution or filled[0])
        return self.nearest(width, height, self.resolutions[-1]) if self.upscale else self._own(width, height)

    def _own(self, width: int, height: int) -> Size | None:
        width, height = (side // self.step * self.step for side in (width, height))
        longest = int(self.max_aspect * min(width, height)) // self.step * self.step
        width, height = min(width, longest), min(height, longest)
        while width * height > self.resolutions[-1] ** 2:  # the image just misses a bucket of more pixels
            width, height = (width - self.step, height) if width > height else (width, height - self.step)
        return (width, height) if width * height >= max(self.least_pixels, 1) else None

    def too_small(self, width: int, height: int) -> str:
        """Return the reason why an image of these pixels has no bucket, and the remedy, to follow its name."""
        if min(width, height) < self.step:
            sides = f"step of {self.step}: a side is shorter"
        else:
            sides = f"min_resolution of {math.isqrt(round(self.least_pixels))}"
        return f"has {width} x {height} pixels, too few for buckets.{sides} (buckets.upscale=true enlarges)"

    def cuts(self, picture: Size, size: Size, digest: str) -> tuple[Cut, ...]:
        """Return the crops of an image, drawn by the digest of its content, from its size and that of its bucket.

        A crop moves only along the side that is cropped: variants may be equal, and then share a cache entry.
        """
        if not self.random_crops and not self.flip:
            return (MIDDLE,)
        crops = [self._draw(picture, size, digest, number) for number in range(self.random_crops)] or [MIDDLE]
        return (*crops, *(replace(crop, mirrored=True) for crop in crops if self.flip))

    def _draw(self, picture: Size, size: Size, digest: str, number: int) -> Cut:
        def draw(what: str, values: int) -> int:
            return int(hashlib.sha256(f"{what} {number} {digest}".encode()).hexdigest()[:8], 16) * values >> 32

        drawn, wider = draw("crop", 1001), picture[0] * size[1] - picture[1] * size[0]
        crop = MIDDLE if wider == 0 else Cut((drawn, 500)) if wider > 0 else Cut((500, drawn))
        most, angle = round(1000 * self.color), round(100 * self.rotation)
        if most:
            brightness, contrast, saturation = (
                1000 - most + draw(what, 2 * most + 1) for what in ("brightness", "contrast", "saturation")
            )
            crop = replace(crop, light=(brightness, contrast, saturation))
        return replace(crop, turned=draw("rotation", 2 * angle + 1) - angle) if angle else crop


def lost(picture: Size, size: Size) -> float:
    """Return the share of an image's area, from 0 to 1, that is cropped away to get the aspect ratio of `size`."""
    one, other = picture[0] * size[1], picture[1] * size[0]
    return 1 - min(one, other) / max(one, other)


def fit(image: Image.Image, size: Size, cut: Cut = MIDDLE) -> Image.Image:
    """Resize (Lanczos) to cover `size` without distortion, and crop to exactly `size`.

    A turned image first loses its corners and a border, so that nothing of the result is outside of it.
    """
    centering = (cut.at[0] / 1000, cut.at[1] / 1000)
    if cut.turned:
        image = turned(image, cut.turned / 100)
    cropped = ImageOps.fit(image, size, method=Image.Resampling.LANCZOS, centering=centering)
    for kind, factor in zip((Brightness, Contrast, Color), cut.light, strict=True):
        if factor != 1000:
            cropped = kind(cropped).enhance(factor / 1000)
    return ImageOps.mirror(cropped) if cut.mirrored else cropped


def turned(image: Image.Image, degrees: float) -> Image.Image:
    """Return an image turned around its center, cropped to the largest part of its aspect ratio within it."""
    angle, (width, height) = math.radians(abs(degrees)), image.size
    share = 1 / (math.cos(angle) + max(width / height, height / width) * math.sin(angle))
    inner = max(math.floor(width * share) - 1, 1), max(math.floor(height * share) - 1, 1)
    left, top = (width - inner[0]) // 2, (height - inner[1]) // 2
    whole = image.rotate(degrees, Image.Resampling.BICUBIC)
    return whole.crop((left, top, left + inner[0], top + inner[1]))


def fit_mask(mask: Image.Image, size: Size, cut: Cut = MIDDLE) -> Image.Image:
    """Crop a mask ("L") as `fit` crops its image, and average it over each latent: width / 16 x height / 16."""
    return fit(mask, size, cut.of_mask).reduce(PIXELS_PER_LATENT)


def reference_size(width: int, height: int, max_pixels: int) -> Size:
    """Return the size of a reference: its own aspect ratio within `max_pixels`, never enlarged.

    Sides are rounded down to multiples of 16, but not below 16. Raises ValueError for max_pixels below 16^2.
    """
    sides = _within(width, height, max_pixels)
    width, height = (max(side // PIXELS_PER_LATENT, 1) * PIXELS_PER_LATENT for side in sides)
    return width, height


def fit_reference(image: Image.Image, max_pixels: int, mirrored: bool = False) -> Image.Image:
    """Return a reference at its `reference_size`: shrunk if it is too large, then center-cropped, as in inference."""
    (width, height), size = _within(*image.size, max_pixels), reference_size(*image.size, max_pixels)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    if min(width, height) < PIXELS_PER_LATENT:
        image = fit(image, size)
    else:
        left, top = (width - size[0]) // 2, (height - size[1]) // 2
        image = image.crop((left, top, left + size[0], top + size[1]))
    return ImageOps.mirror(image) if mirrored else image


def _within(width: int, height: int, max_pixels: int) -> Size:
    if max_pixels < PIXELS_PER_LATENT**2:
        raise ValueError(f"reference max_pixels={max_pixels} must be >= {PIXELS_PER_LATENT**2}, one latent")
    if width * height > max_pixels:  # in integers: a float root just below a multiple of 16 would lose a latent
        return math.isqrt(max_pixels * width // height), math.isqrt(max_pixels * height // width)
    return width, height


def _check_side(key: str, value: object, unit: int, most: float = math.inf) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= most or value % unit:
        limit = "" if most == math.inf else f" up to {most}"
        raise ValueError(f"{key}={value!r} must be a positive multiple of {unit} pixels{limit}")
