"""Where an image is repainted: the region around the mask, its size for the model, and pasting the result back.

White in the mask is repainted, black stays. The model computes a region of the image, `box`, at `size`: the whole image
of at most a megapixel, or with `mask_crop` only the mask and a margin of that many pixels, which shows small regions at
a higher resolution. The result is pasted back through the mask, so everything outside is the image bit for bit.

`flux2.sampling.Start` keeps what is outside of the mask during sampling.
Source: diffusers' Flux2KleinInpaintPipeline.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from flux2.models.pixels import limited_size, to_pixels
from flux2.models.variants import PIXELS_PER_TOKEN
from flux2.utils import checks
from flux2.utils.images import as_rgb

MAX_PIXELS = 1024**2  # of the region as the model computes it, unless a size is given
STRENGTH = 0.8  # with a mask, as in diffusers
Box = tuple[int, int, int, int]  # left, top, right, bottom


@dataclass(frozen=True)
class Inpainting:
    """An image that sampling starts from.

    Attributes:
        image: The image in RGB.
        mask: Of the same size in mode L; None: the whole image is repainted.
        strength: Share of the steps that are computed, above 0 and at most 1.
        box: Region of the image that the model computes.
        size: Width and height at which it does.
    """

    image: Image.Image
    mask: Image.Image | None
    strength: float
    box: Box
    size: tuple[int, int]

    @classmethod
    def from_arguments(
        cls,
        images: Sequence[Image.Image],
        mask: Image.Image | None = None,
        strength: float | None = None,
        mask_crop: int | None = None,
        width: int | None = None,
        height: int | None = None,
    ) -> Self | None:
        """Return how the first of `images` is changed; None without `mask` and `strength`.

        Raise TypeError or ValueError, naming the argument, for what cannot be used.
        """
        strength, mask_crop = checks.inpainting(len(images), mask is not None, strength, mask_crop)
        if strength is None and mask is None:
            return None
        image = as_rgb(images[0])
        size = computed_size(image.size, width, height)
        box = (0, 0, *image.size)
        if mask is not None:
            if not isinstance(mask, Image.Image):
                raise TypeError(f"mask={mask!r} of type {type(mask).__name__} must be an image: open it with PIL.Image")
            mask = as_rgb(mask, "a mask", "black").convert("L")  # transparent is not painted
            if mask.size != image.size:
                raise ValueError(
                    f"the mask has {mask.width} x {mask.height} pixels and its image {image.width} x {image.height}: "
                    "draw it in the size of the image"
                )
            if mask.getextrema()[1] < 128:  # type: ignore[operator]
                raise ValueError("the mask is black everywhere, so nothing is repainted: draw in white what is")
            if mask_crop is not None:
                left, top, right, bottom = mask.getbbox() or (0, 0, *mask.size)
                # what a small region lacks on both sides: its shape is rounded to pixels, none larger than a token
                short = -(-min(size) // PIXELS_PER_TOKEN) - min(right - left, bottom - top)
                box = crop_region(mask, max(mask_crop, -(-short // 2)), size)
        check_shape(box, size)
        return cls(image, mask, STRENGTH if strength is None else strength, box, size)

    def pixels(self) -> Tensor:
        """Return the region as the model sees it: (1, 3, H, W) in [-1, 1]."""
        return to_pixels([resized(self.image.crop(self.box), self.size)])

    def token_mask(self) -> Tensor | None:
        """Return the mask of the region's tokens (1, 1, h, w) in float32: 1 is repainted."""
        if self.mask is None:
            return None
        gray = np.asarray(resized(self.mask.crop(self.box), self.size))
        whole = torch.from_numpy(gray >= 128)[None, None].float()
        sides = [side // PIXELS_PER_TOKEN for side in whole.shape[2:]]
        return F.interpolate(whole, size=sides, mode="bilinear")

    def paste(self, result: Image.Image) -> Image.Image:
        """Return the image with `result` in its region, where the mask is not black; gray mixes the two."""
        if self.mask is None:
            return result
        left, top, right, bottom = self.box
        whole = self.image.copy()
        whole.paste(resized(result, (right - left, bottom - top)), (left, top), self.mask.crop(self.box))
        return whole


def resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.LANCZOS)


def computed_size(image: tuple[int, int], width: int | None, height: int | None) -> tuple[int, int]:
    """Return the width and the height that the model computes for an image of this size, in multiples of 16.

    A side that is missing follows from the other and the shape of the image; both, from the image and `MAX_PIXELS`.
    """
    unit = PIXELS_PER_TOKEN
    if width is None and height is None:
        width, height = (side // unit * unit for side in limited_size(*image, MAX_PIXELS))
    elif width is None:
        width = max(unit, round(height * image[0] / image[1] / unit) * unit)  # type: ignore[operator]
    elif height is None:
        height = max(unit, round(width * image[1] / image[0] / unit) * unit)
    if min(image) < unit:
        raise ValueError(f"an image of {image[0]} x {image[1]} pixels is too small: each side must be at least {unit}")
    checks.size(width, height, unit)
    return width, height  # type: ignore[return-value]


def crop_region(mask: Image.Image, margin: int, size: tuple[int, int]) -> Box:
    """Return the region of what is not black in `mask` with a margin, extended to the shape of `size` where it fits."""
    left, top, right, bottom = mask.getbbox() or (0, 0, *mask.size)
    left, top = max(left - margin, 0), max(top - margin, 0)
    right, bottom = min(right + margin, mask.width), min(bottom + margin, mask.height)
    across, down = right - left, bottom - top
    if across * size[1] > down * size[0]:
        top, bottom = extended(top, bottom, across * size[1] // size[0], mask.height)
    else:
        left, right = extended(left, right, down * size[0] // size[1], mask.width)
    return left, top, right, bottom


def extended(start: int, stop: int, length: int, limit: int) -> tuple[int, int]:
    """Return a range of `length` around this one that lies in 0 to `limit`; all of it if that is shorter."""
    start -= (length - (stop - start)) // 2
    start = max(min(start, limit - length), 0)
    return start, min(start + length, limit)


def check_shape(box: Box, size: tuple[int, int]) -> None:
    """Raise ValueError if scaling the region to `size` would distort it by more than a token."""
    across, down, (width, height) = box[2] - box[0], box[3] - box[1], size
    if min(abs(width - height * across / down), abs(height - width * down / across)) > PIXELS_PER_TOKEN:
        raise ValueError(
            f"width={width}, height={height} have another shape than the {across} x {down} pixels of the image that "
            "are computed: give one of them, or none"
        )
