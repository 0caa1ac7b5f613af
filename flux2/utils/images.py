"""Image files: reading by the rules of training, and checks of where a file can be written.

An adapter trained on edits knows its references as training decoded them, so a file must give the same pixels here.
`tests/flux2/utils/test_images.py` compares this module with `data.sources.images` for each image mode.
"""

import errno
import os
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from flux2.utils.files import temporary_path


def as_rgb(image: Image.Image) -> Image.Image:
    """Return 8-bit RGB: rotated as EXIF says, transparency over white, 16-bit gray scaled instead of clipped.

    Raise ValueError for the modes I and F with 32 bits per pixel, in which no value is defined as white.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F"):
        raise ValueError(f"its mode {image.mode} has no defined white: save it with 8 or 16 bits per channel")
    if image.mode.startswith("I;16"):
        levels = np.asarray(image).astype(np.float64) / 257  # 65535 becomes 255
        image = Image.fromarray(np.floor(levels + 0.5).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def read_image(path: Path, what: str) -> Image.Image:
    """Return the image in a file as `as_rgb` converts it. Raise ValueError, starting with `what`: `--image x`."""
    if not path.exists():
        raise ValueError(f"{what} does not exist")
    if not path.is_file():
        raise ValueError(f"{what} is not a file")
    try:
        with path.open("rb") as stream, Image.open(stream) as image:
            return as_rgb(image)
    except Exception as error:  # decoders raise OSError, SyntaxError, EOFError, DecompressionBombError and more
        raise ValueError(f"{what} cannot be read as an image ({describe_decoding_error(error)})") from error


def describe_decoding_error(error: Exception) -> str:
    """Return the message of a decoder without the stream object that it names as the file."""
    return str(error).partition(" <_io.")[0] if "<_io." in str(error) else f"{type(error).__name__}: {error}"


def check_writable(path: Path, what: str) -> None:
    """Raise ValueError, starting with `what`, unless Pillow can save an RGB image at `path`. Write nothing."""
    extension = path.suffix.lower()
    image_format = Image.registered_extensions().get(extension)
    if image_format is None:
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
