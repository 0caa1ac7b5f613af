"""Encoded images of named formats, and the 8-bit sRGB pixels or the transparency that training reads from them.

All images are opened here. Pillow chooses a decoder by the content of a file, not by its name, and would pass
PostScript to another program; so only raster formats are opened, which it decodes itself. `flux2.utils.images` has the
same rules for inference, and its tests compare both.
"""

import io
import logging
from functools import lru_cache
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps

from data.sources.misread_pixels import correct_pixels
from data.sources.stated_colors import stated_colors, warn_of_colors

# TGA has no mark of its own, so it is tried last; a phone's MPO is opened as JPEG
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "AVIF", "JPEG2000", "PPM", "QOI", "TGA")
COLOR_SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}  # of an ICC profile for pixels of a mode
log = logging.getLogger(__name__)


class TransparentEverywhere(ValueError):  # noqa: N818
    """An image of which nothing is left on white."""


def open_image(stream: BinaryIO) -> Image.Image:
    """Return an encoded image, of which only the header is read. Raise Pillow's exceptions for any other format."""
    return Image.open(stream, formats=FORMATS)


def is_image(stream: BinaryIO) -> bool:
    """Return whether a file begins like an image, whatever its name. TGA, which begins like other data, is not."""
    try:
        with Image.open(stream, formats=FORMATS[:-1]):
            return True
    except Exception:  # Pillow's decoders raise OSError, SyntaxError, struct.error, EOFError and more
        return False


def decode_rgb(image: Image.Image, name: str = "an image") -> Image.Image:
    """Return 8-bit sRGB: EXIF orientation and stated colors applied, on white, 16-bit gray scaled, not clipped.

    Raise ValueError for 32-bit and float images, whose white is not defined, for HDR, and for an image that is
    transparent everywhere. Warnings contain `name`.
    """
    colors = stated_colors(image)
    if colors.is_hdr:
        raise ValueError(colors.problem)
    if colors.problem:
        warn_of_colors(colors.problem, name)
    image.info["icc_profile"] = colors.profile
    image = to_srgb(_decoded(image), name)
    return _on_white(image) if image.mode == "RGBA" else image.convert("RGB")


def decode_gray(image: Image.Image) -> Image.Image:
    """Return the pixels as 8-bit gray, on white. They are weights and no colors: a profile does not change them.

    Raise ValueError as `decode_rgb` does, except for HDR.
    """
    image = _decoded(image)
    if image.mode in ("LA", "RGBA"):
        image = _on_white(image.convert("RGBA"))
    return (image if image.mode == "L" else image.convert("RGB")).convert("L")


def decode_alpha(image: Image.Image) -> Image.Image:
    """Return the alpha channel, 8-bit gray; 255 everywhere if nothing is transparent."""
    image = _decoded(image)
    return image.getchannel("A") if image.mode in ("LA", "RGBA") else Image.new("L", image.size, 255)


def _on_white(image: Image.Image) -> Image.Image:
    if image.getchannel("A").getextrema() == (0, 0):
        raise TransparentEverywhere("is transparent everywhere, so only white would be left of it")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def to_srgb(image: Image.Image, name: str) -> Image.Image:
    """Return an image with its ICC profile applied (perceptual intent, as viewers do), and without it.

    A profile that is damaged, or of another color space than the pixels, is ignored, as viewers do, with a warning.
    """
    profile, alpha = image.info.get("icc_profile"), None
    colors = image
    if image.mode in ("LA", "RGBA"):
        colors, alpha = image.convert(image.mode[:-1]), image.getchannel("A")
    if profile and colors.mode == "L" and profile[16:20] == b"RGB ":
        colors = colors.convert("RGB")
    transform = None
    try:
        transform = _transform(profile, colors.mode) if profile else None
    except (OSError, ValueError, ImageCms.PyCMSError) as error:
        warn_of_colors(f"its color profile cannot be applied ({error}) and is ignored", name)
    result = colors.convert("RGB") if transform is None else transform.apply(colors)
    result.info.clear()  # of the profile and the transparent color
    if alpha is not None:
        result.putalpha(alpha)
    return result


@lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the transform of a profile to sRGB; None for that of sRGB itself, so that its pixels stay as they are.

    Raise ValueError for a profile of another color space than the pixels, exceptions of Pillow for a damaged one.
    """
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = source.profile.xcolor_space.strip()
    if space != COLOR_SPACES[mode]:
        raise ValueError(f"it is for {space} and the image has {COLOR_SPACES[mode]} pixels")
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    if mode == "CMYK":
        return transform
    levels = np.arange(256, dtype=np.uint8) if mode == "L" else np.linspace(0, 255, 17).astype(np.uint8)
    probe = levels[:, None] if mode == "L" else np.stack(np.meshgrid(levels, levels, levels), -1).reshape(-1, 17, 3)
    given = Image.fromarray(probe)
    change = np.asarray(given.convert("RGB")).astype(int) - np.asarray(transform.apply(given))
    return transform if np.abs(change).max() > 1 else None  # rounding differs by one


def _decoded(image: Image.Image) -> Image.Image:
    """Return an opened image, turned as EXIF says, in one of the modes L, LA, RGB, RGBA and CMYK."""
    image = correct_pixels(image)
    if isinstance(key := image.info.get("transparency"), int):
        image.info["transparency"] = _key_of_pixels(key, image)
    white, is_inverted = _gray_scale(image)
    image = ImageOps.exif_transpose(image)
    profile = image.info.get("icc_profile")
    if image.mode.startswith("I;16"):
        levels = np.asarray(image)
        linear = (white - levels if is_inverted else levels).astype(np.uint32)
        gray = Image.fromarray(((linear * 510 + white) // (2 * white)).astype(np.uint8))  # rounded; white -> 255
        if (key := image.info.get("transparency")) is not None:
            gray.putalpha(Image.fromarray(np.where(levels == key, 0, 255).astype(np.uint8)))
        image = gray
    elif image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} has no defined white: save it with 8 or 16 bits per channel")
    elif image.has_transparency_data:
        image = image if image.mode in ("LA", "RGBA") else image.convert("LA" if image.mode in ("1", "L") else "RGBA")
    elif image.mode not in ("L", "CMYK", "RGB"):
        profile = None if image.mode == "LAB" else profile  # which converts to sRGB
        image = image.convert("L" if image.mode == "1" else "RGB")
    image.info.pop("icc_profile", None)
    if profile:
        image.info["icc_profile"] = profile
    return image


def _gray_scale(image: Image.Image) -> tuple[int, bool]:
    """Return the largest value of 16-bit gray, and whether 0 is white: Pillow applies neither of a TIFF's two tags."""
    tags = getattr(image, "tag_v2", {})
    bits = tags.get(ExifTags.Base.BitsPerSample, (16,))
    return (4095 if bits == (12,) else 65535), tags.get(ExifTags.Base.PhotometricInterpretation) == 0


def _key_of_pixels(key: int, image: Image.Image) -> int:
    """Return the transparent gray of a PNG in the values of its pixels: Pillow scales 2 and 4 bits to 8."""
    tiles = getattr(image, "tile", None)
    mode = tiles[0].args if tiles else None
    return key * (85 if mode == "L;2" else 17 if mode == "L;4" else 1)
