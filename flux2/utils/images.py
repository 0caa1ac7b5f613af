"""Pictures from files and to files: read by the rules that training reads them by, and where they can be written.

An adapter that was trained on edits knows its references as training decoded them, so the same file must give the same
pixels here: `tests/flux2/utils/test_images.py` compares this module with `data.sources.images` mode by mode.
"""

from __future__ import annotations

import errno
import os
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from flux2.utils.files import temporary_path


def as_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB: turned as its EXIF says, transparency over white, 16-bit grey scaled and not clipped.

    Raises ValueError for the modes I and F, of 32 bits a pixel: which value is white is not defined.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F"):
        raise ValueError(f"its mode {image.mode} has no defined white: save it with 8 or 16 bits a channel")
    if image.mode.startswith("I;16"):
        levels = np.asarray(image).astype(np.float64) / 257  # 65535 is 255
        image = Image.fromarray(np.floor(levels + 0.5).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    ground = Image.new("RGBA", layer.size, "white")
    ground.alpha_composite(layer)
    return ground.convert("RGB")


def read_picture(path: Path, what: str) -> Image.Image:
    """The picture in a file, as `as_rgb` gives it. Raises ValueError that begins with `what`, such as `--image x`."""
    if not path.exists():
        raise ValueError(f"{what} does not exist")
    if not path.is_file():
        raise ValueError(f"{what} is not a file")
    try:
        with path.open("rb") as stream, Image.open(stream) as image:
            return as_rgb(image)
    except Exception as error:  # decoders raise OSError, SyntaxError, EOFError, DecompressionBombError and more
        raise ValueError(f"{what} cannot be read as a picture ({reason(error)})") from error


def reason(error: Exception) -> str:
    """What a decoder complained of, without the stream that it calls the file."""
    return str(error).partition(" <_io.")[0] if "<_io." in str(error) else f"{type(error).__name__}: {error}"


def check_writable(path: Path, what: str) -> None:
    """Raises ValueError, beginning with `what`, unless an RGB picture can be saved at `path`; writes nothing.

    The ending must be of a format that Pillow writes in RGB, the path no folder, and it or the nearest folder that is
    there must be writable.
    """
    ending = path.suffix.lower()
    kind = Image.registered_extensions().get(ending)
    if kind is None:
        raise ValueError(f"{what} must end in a picture's extension, such as .png or .jpg")
    try:
        Image.new("RGB", (16, 16)).save(BytesIO(), kind)
    except Exception as error:  # an unknown format is a KeyError, a mode it does not know an OSError
        raise ValueError(f"{what}: pictures cannot be saved as {ending}, give .png or .jpg") from error
    check_place(path, what)


def check_place(path: Path, what: str) -> None:
    """Raises ValueError, beginning with `what`, unless a file can be written at `path`; writes nothing."""
    check_length(path, what)
    if path.is_dir():
        raise ValueError(f"{what} is a folder: give the name of a file")
    place = path
    while not place.exists() and place != place.parent:
        place = place.parent
    if place != path and not place.is_dir():
        raise ValueError(f"{what} cannot be written: {place} is not a folder")
    if not os.access(place, os.W_OK):
        raise ValueError(f"{what} cannot be written: {place} is read-only")


def check_length(path: Path, what: str) -> None:
    """Raises ValueError, beginning with `what`, if the name of `path`, or its temporary name, is too long.

    Otherwise that would be found when the first picture is done.
    """
    folder = next((place for place in path.absolute().parents if place.is_dir()), Path("/"))
    try:
        temporary_path(folder / path.name).lstat()  # the file system itself says what it takes
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # of any other error, what is tried next says it
            raise ValueError(f"{what} cannot be written: File name too long, give a shorter one") from error
