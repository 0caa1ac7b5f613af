"""Conversion between images and the pixel tensors of the autoencoder, and the size of reference images."""

from collections.abc import Sequence
from math import isqrt

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flux2.models.variants import PIXELS_PER_TOKEN
from flux2.utils.images import as_rgb


def to_pixels(images: Sequence[Image.Image]) -> Tensor:
    """Equal-sized images -> (B, 3, H, W) float32 in [-1, 1]."""
    arrays = [np.asarray(image.convert("RGB"), dtype=np.float32) for image in images]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2) / 127.5 - 1


def to_images(pixels: Tensor) -> list[Image.Image]:
    """(B, 3, H, W), clipped to [-1, 1] -> images. Raise ValueError for NaN and infinite values."""
    if not bool(torch.isfinite(pixels).all()):
        raise ValueError(
            "the computed image has NaN or infinite pixels: an adapter, its scale or the guidance is too strong, the "
            "precision is too low, or the weights are damaged"
        )
    array = ((pixels.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(image) for image in array]


def limited_size(width: int, height: int, max_pixels: int) -> tuple[int, int]:
    """Return the size of an image that is scaled down to at most `max_pixels`."""
    if width * height <= max_pixels:
        return width, height
    # integers: a float root just below a multiple of 16 would lose a token
    return isqrt(max_pixels * width // height), isqrt(max_pixels * height // width)


def reference_image(image: Image.Image, max_pixels: int) -> Image.Image:
    """Return a reference as the model sees it: at most `max_pixels`, center-cropped to multiples of 16."""
    image = as_rgb(image)
    width, height = limited_size(*image.size, max_pixels)
    if min(width, height) < PIXELS_PER_TOKEN:
        raise ValueError(f"a reference of {width} x {height} pixels is too small: each side must be at least 16")
    if (width, height) != image.size:
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    left, top = width % PIXELS_PER_TOKEN // 2, height % PIXELS_PER_TOKEN // 2
    right, bottom = left + width - width % PIXELS_PER_TOKEN, top + height - height % PIXELS_PER_TOKEN
    return image.crop((left, top, right, bottom))
