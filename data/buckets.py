"""Aspect-ratio buckets: which size a picture is trained at, and how it gets there.

A batch is one tensor, so its pictures share a size; a picture keeps most of its frame if that size has nearly its
shape. The buckets of a resolution are the sizes of at most `resolution`^2 pixels, so that every step costs about the
same memory and time. Squashing everything to a square instead would distort or crop away what the caption talks about.

A picture goes to the largest resolution whose bucket it fills. One that fills none is not enlarged, which would teach
the model blur, unless that is asked for: it gets the largest size within it, and is left out if that is too small.

Sides are multiples of 16 pixels, the side of one latent: the autoencoder halves three times, and 2 x 2 patches halve
once more.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from PIL import Image, ImageOps

PIXELS_PER_LATENT = 16
MAX_RESOLUTION = 8192  # a quarter of a million tokens, far beyond what FLUX.2 is made for
FIT_VERSION = 1  # part of latents' cache keys: raise it when `fit` or decoding (data.sources.images) gives other pixels

Size = tuple[int, int]  # (width, height) in pixels


@dataclass(frozen=True)
class Cut:
    """Which part of a picture is trained on: one of the variants that are cached.

    Attributes:
        at: where the crop lies along the width and the height, in thousandths of what is cut off: (500, 500) is the
            middle. Whole numbers, because they are a part of cache keys.
        mirrored: left and right change places, after the crop.
    """

    at: tuple[int, int] = (500, 500)
    mirrored: bool = False

    @property
    def recipe(self) -> dict[str, object]:
        """What it adds to a cache key: nothing for the middle, so that entries do not depend on these options."""
        moved: dict[str, object] = {} if self.at == (500, 500) else {"at": self.at}
        return moved | ({"mirrored": True} if self.mirrored else {})


MIDDLE = Cut()


@dataclass(frozen=True)
class Buckets:
    """The sizes for one or several resolutions, which of them a picture gets, and how it is cut to it.

    Args:
        resolution: side of the square bucket, pixels, or a list of such. A square picture that is as large gets
            (resolution, resolution) exactly.
        step: sides are multiples of it, pixels. A larger step makes fewer buckets: better filled, at more cropping.
        max_aspect: no bucket is longer than this times its shorter side; 1.0 leaves only the square.
        upscale: enlarge a picture that fills no bucket to the smallest resolution, in place of a bucket of its own.
        min_resolution: a picture's own bucket has at least this side's square of pixels; None: a quarter of the
            smallest resolution. Smaller pictures are left out.
        random_crops: how many crops of each picture are cached, drawn once by its content; 0 is the middle alone.
        flip: cache each crop mirrored, too.

    Raises ValueError, naming the argument, for a step that is no multiple of 16, a resolution that is none of the step,
    max_aspect < 1, min_resolution above the smallest resolution, or a wrong type.
    """

    resolution: int | Sequence[int]
    step: int = 16
    max_aspect: float = 2.0
    upscale: bool = False
    min_resolution: int | None = None
    random_crops: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        _check_side("step", self.step, PIXELS_PER_LATENT)
        if isinstance(self.resolution, list | tuple):
            if not self.resolution or len(set(self.resolution)) < len(self.resolution):
                raise ValueError(f"resolution={list(self.resolution)!r} must be one side or several different ones")
            for side in self.resolution:
                _check_side("resolution", side, self.step, MAX_RESOLUTION)
        else:
            _check_side("resolution", self.resolution, self.step, MAX_RESOLUTION)
        if not isinstance(self.max_aspect, int | float) or not 1.0 <= self.max_aspect < math.inf:
            raise ValueError(f"max_aspect={self.max_aspect!r} must be a number of at least 1 (1: only the square)")
        for key in ("upscale", "flip"):
            if not isinstance(getattr(self, key), bool):
                raise ValueError(f"{key}={getattr(self, key)!r} must be true or false")
        if not _is_whole(self.random_crops) or self.random_crops < 0:
            raise ValueError(f"random_crops={self.random_crops!r} must be a whole number from 0 (0: the middle)")
        least, most = self.min_resolution, self.resolutions[-1]
        if least is not None and not (_is_whole(least) and 1 <= least <= most):
            raise ValueError(f"min_resolution={least!r} must be from 1 to the smallest resolution, {most}, or null")
        if least is not None and self.upscale:
            raise ValueError(f"min_resolution={least!r} does nothing with upscale=true: no picture is too small")

    @cached_property
    def resolutions(self) -> tuple[int, ...]:
        """The largest first."""
        given = self.resolution if isinstance(self.resolution, list | tuple) else [self.resolution]
        return tuple(sorted(given, reverse=True))

    @property
    def largest(self) -> int:
        return self.resolutions[0]

    @property
    def least_pixels(self) -> float:
        """Area below which a picture's own bucket is too small."""
        return (self.resolutions[-1] / 4 if self.min_resolution is None else self.min_resolution) ** 2

    @cached_property
    def _by_resolution(self) -> dict[int, tuple[Size, ...]]:
        return {resolution: self._sizes_of(resolution) for resolution in self.resolutions}

    def _sizes_of(self, resolution: int) -> tuple[Size, ...]:
        """Widest first: with each short side goes the longest side within resolution^2 pixels."""
        wide = []
        for height in range(self.step, resolution + 1, self.step):
            width = resolution**2 // height // self.step * self.step
            if width <= self.max_aspect * height:
                wide.append((width, height))
        return (*wide, *((height, width) for width, height in reversed(wide[:-1])))  # the last is the square

    @cached_property
    def sizes(self) -> tuple[Size, ...]:
        """All buckets of all resolutions, each resolution's widest first; not those of pictures that fill none."""
        return tuple(dict.fromkeys(size for sizes in self._by_resolution.values() for size in sizes))

    def nearest(self, width: int, height: int, resolution: int | None = None) -> Size:
        """Of one resolution's buckets, the largest's by default, that of the aspect ratio nearest to a picture's."""
        sizes = self._by_resolution[resolution or self.largest]
        aspect = math.log(width / height)
        return min(sizes, key=lambda size: abs(math.log(size[0] / size[1]) - aspect))

    def assign(self, width: int, height: int) -> Size | None:
        """The bucket for a picture of these pixels; None if it is too small.

        Of each resolution the bucket of the nearest aspect ratio, by the ratio of the ratios, is looked at, and the
        first that the picture fills is taken. If it fills none: with `upscale` that of the smallest resolution, else
        the largest size on the grid within the picture and `max_aspect`.
        """
        for resolution in self.resolutions:
            size = self.nearest(width, height, resolution)
            if width >= size[0] and height >= size[1]:
                return size
        return size if self.upscale else self._own(width, height)

    def _own(self, width: int, height: int) -> Size | None:
        width, height = (side // self.step * self.step for side in (width, height))
        longest = int(self.max_aspect * min(width, height)) // self.step * self.step
        width, height = min(width, longest), min(height, longest)
        while width * height > self.resolutions[-1] ** 2:  # it misses a bucket of more pixels by a hair
            width, height = (width - self.step, height) if width > height else (width, height - self.step)
        return (width, height) if width * height >= max(self.least_pixels, 1) else None

    def too_small(self, width: int, height: int) -> str:
        """Why a picture of these pixels has no bucket, and what to do; to follow its name."""
        if min(width, height) < self.step:
            sides = f"step of {self.step}: a side is shorter"
        else:
            sides = f"min_resolution of {math.isqrt(round(self.least_pixels))}"
        return f"has {width} x {height} pixels, too few for buckets.{sides} (buckets.upscale=true enlarges)"

    def cuts(self, picture: Size, size: Size, digest: str) -> tuple[Cut, ...]:
        """The variants of a picture: its size, that of its bucket, and the digest of its content, which draws them.

        A crop can move only along the side that more is cut off from: variants may be equal, and then share an entry.
        """
        crops = [_draw(picture, size, digest, number) for number in range(self.random_crops)] or [MIDDLE]
        return (*crops, *(Cut(crop.at, mirrored=True) for crop in crops if self.flip))


def _draw(picture: Size, size: Size, digest: str, number: int) -> Cut:
    drawn = int(hashlib.sha256(f"crop {number} {digest}".encode()).hexdigest()[:8], 16) * 1001 >> 32  # 0 to 1000
    wider = picture[0] * size[1] - picture[1] * size[0]
    return MIDDLE if wider == 0 else Cut((drawn, 500)) if wider > 0 else Cut((500, drawn))


def lost(picture: Size, size: Size) -> float:
    """The share of a picture's area that is cut off to give it the shape of `size`, from 0 to 1."""
    one, other = picture[0] * size[1], picture[1] * size[0]
    return 1 - min(one, other) / max(one, other)


def fit(image: Image.Image, size: Size, cut: Cut = MIDDLE) -> Image.Image:
    """Resizes (Lanczos) to cover `size`, and cuts out the middle, or another part: exactly `size`, undistorted."""
    at = (cut.at[0] / 1000, cut.at[1] / 1000)
    found = ImageOps.fit(image, size, method=Image.Resampling.LANCZOS, centering=at)
    return ImageOps.mirror(found) if cut.mirrored else found


def fit_mask(mask: Image.Image, size: Size, cut: Cut = MIDDLE) -> Image.Image:
    """A mask ("L") cut as `fit` cuts its picture, then averaged over each latent: width / 16 x height / 16."""
    return fit(mask, size, cut).reduce(PIXELS_PER_LATENT)


def reference_size(width: int, height: int, max_pixels: int) -> Size:
    """The size for a reference picture: its own shape within `max_pixels`, never enlarged.

    Sides are floored to multiples of 16; only one below 16 pixels, less than a latent, is raised to 16. Raises
    ValueError for max_pixels below 16^2.
    """
    width, height = _within(width, height, max_pixels)
    return _floor(width), _floor(height)


def fit_reference(image: Image.Image, max_pixels: int, mirrored: bool = False) -> Image.Image:
    """A reference at its `reference_size`: shrunk if it is too large, then its middle cut out, as inference does."""
    if mirrored:
        return ImageOps.mirror(fit_reference(image, max_pixels))
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


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_side(key: str, value: object, unit: int, most: float = math.inf) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= most or value % unit:
        limit = "" if most == math.inf else f" up to {most}"
        raise ValueError(f"{key}={value!r} must be a positive whole multiple of {unit} pixels{limit}")
