"""Rare image files whose pixels Pillow reads otherwise than the file states them.

They decode without an error, so a dataset of them would be trained with wrong pixels. `correct_pixels` applies what a
file states where that is simple, and refuses it otherwise. `data.sources.misread_pixels` and
`flux2.utils.misread_pixels` are the same file, because training and inference import nothing of each other and must
read the same pixels.
"""

import numpy as np
from PIL import ExifTags, Image, ImagePalette
from PIL.PngImagePlugin import PngImageFile

PADDING = "padding"  # TGA: a fourth channel, or a 16th bit, that its header does not declare as alpha
PALETTE = "palette"  # TIFF: a color map of values up to 255 instead of 65535, as old programs wrote it
KEY = "key"  # PNG of 16 bits per channel: of a transparent color Pillow keeps the high bytes
SIGNED, PREMULTIPLIED, PLANAR = 2, 1, 2  # of the TIFF tags SampleFormat, ExtraSamples, PlanarConfiguration


def misreading(image: Image.Image) -> str | None:
    """Return what Pillow reads wrongly of an opened image, whose pixels are not loaded yet; None if it is right.

    Raise ValueError for pixels that have no simple right reading.
    """
    stream = getattr(image, "fp", None)
    if stream is None:
        return None
    if image.format == "TGA" and image.has_transparency_data:
        before = stream.tell()
        stream.seek(17)
        alpha_bits = stream.read(1)[0] & 0x0F
        stream.seek(before)
        return None if alpha_bits else PADDING
    if image.format == "TIFF":
        return _misreading_of_tiff(image)
    if image.format == "PNG" and isinstance(image.info.get("transparency"), tuple):
        return KEY if image.tile and image.tile[0].args == "RGB;16B" else None  # type: ignore[attr-defined]
    return None


def correct_pixels(image: Image.Image) -> Image.Image:
    """Return an opened image, whose pixels are not loaded yet, so that its pixels are those that the file states.

    Raise ValueError for pixels that have no simple right reading.
    """
    kind = misreading(image)
    if kind == PADDING:
        image.putalpha(255)
    elif kind == PALETTE:
        image.palette = ImagePalette.raw("RGB;L", bytes(image.tag_v2[ExifTags.Base.ColorMap]))  # type: ignore[attr-defined]
    elif kind == KEY:
        alpha = _alpha_of_key(image)
        image.putalpha(alpha)
        del image.info["transparency"]
    return image.convert("LA") if image.mode == "La" else image  # from which Pillow converts to no other mode


def _misreading_of_tiff(image: Image.Image) -> str | None:
    tags = image.tag_v2  # type: ignore[attr-defined]
    if SIGNED in tags.get(ExifTags.Base.SampleFormat, ()) and image.mode not in ("I", "F"):
        raise ValueError("its numbers are signed, so none is defined as white: save it with unsigned numbers")
    planes = tags.get(ExifTags.Base.PlanarConfiguration)
    if planes == PLANAR and PREMULTIPLIED in tags.get(ExifTags.Base.ExtraSamples, ()):
        raise ValueError("its channels are stored one after the other, with premultiplied alpha: save it as PNG")
    colors = tags.get(ExifTags.Base.ColorMap, ())
    return PALETTE if image.mode == "P" and 0 < max(colors, default=0) < 256 else None


def _alpha_of_key(image: Image.Image) -> Image.Image:
    """Return the transparency of a PNG of 16 bits per channel with a transparent color, which all bits decide."""
    key = np.array(image.info["transparency"])
    assert image.fp is not None  # type: ignore[attr-defined]
    stream = image.fp  # type: ignore[attr-defined]
    before = stream.tell()
    stream.seek(0)
    second = PngImageFile(stream)
    second.tile = [tile._replace(args="RGB;16L") for tile in second.tile]  # of big-endian values, the low bytes
    low = np.asarray(second)
    stream.seek(before)
    is_key = (np.asarray(image) == key >> 8).all(-1) & (low == (key & 255)).all(-1)
    return Image.fromarray(np.where(is_key, 0, 255).astype(np.uint8))
