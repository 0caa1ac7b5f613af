"""Aspect-ratio buckets: which size a picture is trained at, and how it gets there.

A batch is one tensor, so its pictures share a size; a picture keeps most of its frame if that size has nearly its
shape. The buckets of a resolution are the sizes of at most `resolution`^2 pixels, so that every step costs about the
same memory and time. Squashing everything to a square instead would distort or crop away what the caption talks about.

Sides are multiples of 16 pixels, the side of one latent: the autoencoder halves three times, and 2 x 2 patches halve
once more.
"""

import math
from dataclasses import dataclass

from PIL import Image, ImageOps

PIXELS_PER_LATENT = 16
FIT_VERSION = 1  # part of latents' cache keys: raise it when `fit` or decoding (data.pictures) gives other pixels

Size = tuple[int, int]  # (width, height) in pixels


@dataclass(frozen=True)
class Buckets:
    """The sizes for one resolution, and which of them a picture gets.

    Args:
        resolution: side of the square bucket, pixels. A square picture gets (resolution, resolution) exactly.
        step: sides are multiples of it, pixels. A larger step makes fewer buckets: better filled, at more cropping.
        max_aspect: no bucket is longer than this times its shorter side; 1.0 leaves only the square.

    Raises ValueError, naming the argument, for a step that is no multiple of 16, a resolution that is none of the step,
    or max_aspect < 1.
    """

    resolution: int
    step: int = 16
    max_aspect: float = 2.0

    def __post_init__(self) -> None:
        for key, value, unit in (("step", self.step, PIXELS_PER_LATENT), ("resolution", self.resolution, self.step)):
            if not isinstance(value, int) or isinstance(value, bool) or value <= 0 or value % unit:
                raise ValueError(f"{key}={value!r} must be a positive whole multiple of {unit} pixels")
        if not isinstance(self.max_aspect, int | float) or not self.max_aspect >= 1.0:
            raise ValueError(f"max_aspect={self.max_aspect!r} must be a number of at least 1 (1: only the square)")

    @property
    def sizes(self) -> tuple[Size, ...]:
        """All buckets, widest first: with each short side goes the longest side within resolution^2 pixels."""
        wide = []
        for height in range(self.step, self.resolution + 1, self.step):
            width = self.resolution**2 // height // self.step * self.step
            if width <= self.max_aspect * height:
                wide.append((width, height))
        return (*wide, *((height, width) for width, height in reversed(wide[:-1])))  # the last is the square

    def assign(self, width: int, height: int) -> Size:
        """The bucket of the nearest aspect ratio, by the ratio of the ratios, for a picture of these pixels."""
        aspect = math.log(width / height)
        return min(self.sizes, key=lambda size: abs(math.log(size[0] / size[1]) - aspect))


def fit(image: Image.Image, size: Size) -> Image.Image:
    """Resizes (Lanczos) to cover `size`, and cuts out the middle: exactly `size`, undistorted, without padding."""
    return ImageOps.fit(image, size, method=Image.Resampling.LANCZOS)


def reference_size(width: int, height: int, max_pixels: int) -> Size:
    """The size for a reference picture: its own shape within `max_pixels`, never enlarged.

    Sides are floored to multiples of 16; only one below 16 pixels, less than a latent, is raised to 16. Raises
    ValueError for max_pixels below 16^2.
    """
    width, height = _within(width, height, max_pixels)
    return _floor(width), _floor(height)


def fit_reference(image: Image.Image, max_pixels: int) -> Image.Image:
    """A reference at its `reference_size`: shrunk if it is too large, then its middle cut out, as inference does."""
    width, height = _within(*image.size, max_pixels)
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    size = _floor(width), _floor(height)
    if min(width, height) < PIXELS_PER_LATENT:
        return fit(image, size)
    left, top = (width - size[0]) // 2, (height - size[1]) // 2
    return image.crop((left, top, left + size[0], top + size[1]))


def _within(width: int, height: int, max_pixels: int) -> Size:
    if max_pixels < PIXELS_PER_LATENT**2:
        raise ValueError(f"reference max_pixels={max_pixels} must be at least {PIXELS_PER_LATENT**2}, one latent")
    if width * height > max_pixels:  # in whole numbers: a float root a hair below a multiple of 16 loses a latent
        return math.isqrt(max_pixels * width // height), math.isqrt(max_pixels * height // width)
    return width, height


def _floor(side: int) -> int:
    return max(side // PIXELS_PER_LATENT, 1) * PIXELS_PER_LATENT
