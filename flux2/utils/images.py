"""Image files: reading by the rules of training, and checks of where a file can be written.

An adapter trained on edits knows its references as training decoded them, so a file must give the same pixels here.
`tests/flux2/utils/test_images.py` compares this module with `data.sources.pixels` for each image mode.

Only raster formats are opened, which Pillow decodes itself: for PostScript, which it recognizes by the content, it
would start another program.
"""

import errno
import logging
import os
from functools import lru_cache
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError

from flux2.utils.files import temporary_path
from flux2.utils.misread_pixels import correct_pixels
from flux2.utils.stated_colors import stated_colors, warn_of_colors

# TGA has no mark of its own, so it is tried last; a phone's MPO is opened as JPEG
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "AVIF", "JPEG2000", "PPM", "QOI", "TGA")
log = logging.getLogger(__name__)


def open_image(path: Path) -> Image.Image:
    """Return the image in a regular file, of which only the header is read. Raise Pillow's exceptions, or OSError."""
    if path.exists() and not path.is_file():
        raise OSError("it is not a regular file")  # reading a pipe would never end
    return Image.open(path, formats=FORMATS)


def as_rgb(image: Image.Image, name: str = "an image", background: str = "white") -> Image.Image:
    """Return 8-bit sRGB: EXIF rotation and stated colors applied, transparency over `background`, 16-bit gray scaled.

    Give the image as `Image.open` returned it: what Pillow does not read of its colors is in the file, which loading
    the pixels closes. Warnings contain `name`. Raise ValueError for HDR, for an image that is transparent everywhere,
    and for the modes I and F with 32 bits per pixel, in which no value is defined as white.
    """
    stated = stated_colors(image)
    if stated.is_hdr:
        raise ValueError(stated.problem)
    if stated.problem:
        warn_of_colors(stated.problem, name)
    image = correct_pixels(image)
    key = image.info.get("transparency")
    tiles = getattr(image, "tile", None)
    bits = tiles[0].args if tiles else None  # Pillow scales 2 and 4 bits to 8, but not the key
    if isinstance(key, int) and bits in ("L;2", "L;4"):
        key *= 85 if bits == "L;2" else 17
    tags = getattr(image, "tag_v2", {})  # of a TIFF, whose gray Pillow neither scales from 12 bits nor inverts
    white = 4095 if tags.get(ExifTags.Base.BitsPerSample) == (12,) else 65535
    zero_is_white = tags.get(ExifTags.Base.PhotometricInterpretation) == 0
    image = ImageOps.exif_transpose(image)
    image.info.pop("icc_profile", None)
    if image.mode in ("I", "F"):
        raise ValueError(f"its mode {image.mode} has no defined white: save it with 8 or 16 bits per channel")
    if image.mode.startswith("I;16"):
        depths = np.asarray(image)
        shares = (white - depths if zero_is_white else depths).astype(np.float64) / (white / 255)
        levels = np.floor(shares + 0.5).astype(np.uint8)  # white becomes 255
        image = Image.fromarray(levels)
        if key is not None:
            image.putalpha(Image.fromarray(np.where(depths == key, 0, 255).astype(np.uint8)))
    elif key is not None:
        image.info["transparency"] = key
    is_gray = image.mode in ("1", "L", "LA")
    if image.has_transparency_data:
        image = image.convert("LA" if is_gray else "RGBA")
        colors, alpha = _in_srgb(image.convert("L" if is_gray else "RGB"), stated.profile, name), image.getchannel("A")
        if alpha.getextrema() == (0, 0):
            raise ValueError(f"it is transparent everywhere, so only {background} would be left of it")
        colors.putalpha(alpha)
        return Image.alpha_composite(Image.new("RGBA", image.size, background), colors).convert("RGB")
    if image.mode == "LAB":
        return image.convert("RGB")
    colors = image if image.mode == "CMYK" else image.convert("L" if is_gray else "RGB")
    return _in_srgb(colors, stated.profile, name)


def _in_srgb(image: Image.Image, profile: bytes | None, name: str) -> Image.Image:
    """Return an image of the mode L, RGB or CMYK as RGB, with its ICC profile applied.

    As viewers do, ignore a profile that is damaged or of another color space than the pixels, and warn about it.
    """
    if profile and image.mode == "L" and profile[16:20] == b"RGB ":
        image = image.convert("RGB")
    transform = None
    try:
        transform = _transform(profile, image.mode) if profile else None
    except (OSError, ValueError, ImageCms.PyCMSError) as error:
        warn_of_colors(f"its color profile cannot be applied ({error}) and is ignored", name)
    result = image.convert("RGB") if transform is None else transform.apply(image)
    result.info.clear()  # of the profile and the transparent color
    return result


@lru_cache(maxsize=64)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the transform of an ICC profile to sRGB with perceptual intent; None for sRGB itself.

    Raise ValueError for a profile of another color space than the pixels, exceptions of Pillow for a damaged one.
    """
    source = ImageCms.ImageCmsProfile(BytesIO(profile))
    space, wanted = source.profile.xcolor_space.strip(), {"L": "GRAY"}.get(mode, mode)
    if space != wanted:
        raise ValueError(f"it is for {space} and the image has {wanted} pixels")
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    if mode == "CMYK":
        return transform
    steps = np.linspace(0, 255, 256 if mode == "L" else 17).astype(np.uint8)
    colors = steps[None] if mode == "L" else np.stack(np.meshgrid(steps, steps, steps), -1).reshape(17, -1, 3)
    probe = Image.fromarray(colors)
    difference = np.asarray(probe.convert("RGB")).astype(int) - np.asarray(transform.apply(probe))
    return transform if np.abs(difference).max() > 1 else None  # rounding differs by one


def read_image(path: Path, what: str, background: str = "white") -> Image.Image:
    """Return the image in a file as `as_rgb` converts it. Raise ValueError, starting with `what`: `--image x`."""
    if not path.exists():
        raise ValueError(f"{what} does not exist")
    if not path.is_file():
        raise ValueError(f"{what} is not a file")
    try:
        with open_image(path) as image:
            return as_rgb(image, str(path), background)
    except Exception as error:  # decoders raise OSError, SyntaxError, EOFError, DecompressionBombError and more
        raise ValueError(f"{what} cannot be read as an image ({describe_decoding_error(error)})") from error


def describe_decoding_error(error: Exception) -> str:
    """Return the message of a decoder without the file that it names."""
    if isinstance(error, UnidentifiedImageError):
        return f"it is damaged, or in none of the formats {', '.join(FORMATS)}"
    return f"{type(error).__name__}: {error}"


def check_writable(path: Path, what: str) -> None:
    """Raise ValueError, starting with `what`, unless Pillow can save an RGB image at `path`. Write nothing."""
    extension = path.suffix.lower()
    image_format = Image.registered_extensions().get(extension)
    if image_format in (None, "ICO", "ICNS"):  # icons are scaled to sizes of their own
        raise ValueError(f"{what} must end in an image extension, such as .png or .jpg")
    try:
        Image.new("RGB", (16, 16)).save(BytesIO(), image_format)
    except Exception as error:  # an unknown format is a KeyError, an unsupported mode an OSError
        raise ValueError(f"{what}: images cannot be saved as {extension}, give .png or .jpg") from error
    check_target_file(path, what)
    if path.exists() and not os.access(path, os.W_OK):
        raise ValueError(f"{what} cannot be written: {path} is read-only")


def check_target_file(path: Path, what: str) -> None:
    """Raise ValueError, starting with `what`, unless a file can be written at `path`. Write nothing."""
    folder = next((parent for parent in path.absolute().parents if parent.is_dir()), Path("/"))
    try:
        temporary_path(folder / path.name).lstat()  # the file system itself knows the longest name it accepts
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # any other error is reported by the checks below
            raise ValueError(f"{what} cannot be written: File name too long, give a shorter one") from error
    if path.is_dir():
        raise ValueError(f"{what} is a folder: give the name of a file")
    existing = next(place for place in (path, *path.parents) if place.exists())
    if existing != path and not existing.is_dir():
        raise ValueError(f"{what} cannot be written: {existing} is not a folder")
    place = existing if existing.is_dir() else existing.parent  # files are replaced by renaming a temporary one
    if not os.access(place, os.W_OK):
        raise ValueError(f"{what} cannot be written: {place} is read-only")
