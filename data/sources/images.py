"""One encoded picture, opened only when asked: its header, its pixels in 8-bit RGB, its transparency, its digest.

Whatever Pillow's decoders raise for a damaged file becomes one `BadPicture` with a name and a reason, so that sources
and caches can list what is wrong with a dataset instead of stopping at the first file. Only the formats of photographs
and drawings are opened: what a file holds is not what its name says, and Pillow would hand PostScript to another
program.
"""

import hashlib
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageOps

SUFFIXES = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"))
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "PPM")  # a phone's MPO is opened as JPEG
UNREADABLE = frozenset((".heic", ".heif", ".jxl"))  # photographs that Pillow cannot open: refused, not skipped


class BadPicture(ValueError):  # noqa: N818
    """A picture that cannot be used: `name` is what it is called, `reason` reads on from it ("cannot be read")."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"picture {shortened(name)} {reason}: replace or remove it")
        self.name, self.reason = name, reason


class Header(NamedTuple):
    """What is known of a picture before its pixels are decoded."""

    size: tuple[int, int]  # (width, height) in pixels, turned as EXIF says
    mode: str  # Pillow's
    animated: bool  # more than one frame, or page
    transparent: bool  # it has an alpha channel, or a transparent color


@dataclass(frozen=True)
class Picture:
    """One picture, opened only when asked.

    `name` is what errors call it: a path, or "row 12 of X, column image". `open` returns a fresh binary stream of the
    encoded file. With `alpha` its pixels are its transparency, as gray: black where it is clear, white where solid. All
    methods raise BadPicture when it cannot be read.
    """

    name: str
    open: Callable[[], BinaryIO] = field(repr=False)
    alpha: bool = False

    def load(self) -> Image.Image:
        """The pixels, 8-bit RGB: EXIF orientation applied, transparency over white, 16-bit gray scaled, not clipped.

        Of several frames the first.
        """
        return self._decoded(lambda image: (_alpha(image) if self.alpha else _rgb(image)).convert("RGB"))

    def load_mask(self) -> Image.Image:
        """The pixels as a mask, 8-bit gray ("L") in the size that `size` says: how much each place counts."""
        return self._decoded(lambda image: _alpha(image) if self.alpha else _rgb(image).convert("L"))

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels as `load` gives them, from the header: pixels are not decoded."""
        return self.header.size

    @cached_property
    def header(self) -> Header:
        """Read once."""
        try:
            with self.open() as stream, Image.open(stream, formats=FORMATS) as image:
                # Pillow decodes a whole PNG to look for EXIF behind its pixels, where hardly any file has it.
                header_suffices = image.format == "PNG" and not self._metadata_follows_pixels()
                exif = Image.Image.getexif(image) if header_suffices else image.getexif()
                width, height = image.size
                mode, transparent = image.mode, image.has_transparency_data
                # a phone's MPO holds depth or brightness beside its picture
                animated = image.format != "MPO" and bool(getattr(image, "is_animated", False))
                turned = image.format != "TIFF"  # Pillow gives the turned size of a TIFF before it turns the pixels
        except Exception as error:
            raise self._bad(error) from error
        sideways = exif.get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        return Header((height, width) if sideways and turned else (width, height), mode, animated, transparent)

    def digest(self) -> str:
        """sha256 of the encoded file, as hexadecimal: the same for equal content wherever it lies.

        That of its transparency is another than its own.
        """
        try:
            with self.open() as stream:
                digest = hashlib.sha256()
                while block := stream.read(1 << 20):
                    digest.update(block)
        except (OSError, ValueError) as error:
            raise self._bad(error) from error
        return hashlib.sha256(b"alpha " + digest.digest()).hexdigest() if self.alpha else digest.hexdigest()

    def unchanged(self, digest: str) -> "Picture":
        """This picture, read into memory once. BadPicture if its content is no more that of `digest`."""
        try:
            with self.open() as stream:
                content = stream.read()
        except (OSError, ValueError) as error:
            raise self._bad(error) from error
        held = replace(self, open=lambda: BytesIO(content))
        if held.digest() != digest:
            raise BadPicture(self.name, "was changed after this run had looked at it (start again)")
        return held

    def transparency(self) -> "Picture":
        """The same file, of which the alpha channel counts."""
        return replace(self, name=f"the transparency of {self.name}", alpha=True)

    def _decoded(self, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
        try:
            with self.open() as stream, Image.open(stream, formats=FORMATS) as image:
                return convert(ImageOps.exif_transpose(image))
        except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, EOFError and more
            raise self._bad(error) from error

    def _metadata_follows_pixels(self) -> bool:
        """Walks a PNG's chunks without reading them: True if EXIF or text (XMP) comes after the first IDAT."""
        pixels_seen = False
        with self.open() as stream:
            stream.seek(8)
            while len(head := stream.read(8)) == 8:
                length, kind = struct.unpack(">I4s", head)
                if pixels_seen and kind in (b"eXIf", b"iTXt", b"tEXt", b"zTXt"):
                    return True
                pixels_seen |= kind == b"IDAT"
                stream.seek(length + 4, 1)  # data and checksum
        return False

    def _is_empty(self) -> bool:
        try:
            with self.open() as stream:
                return not stream.read(1)
        except (OSError, ValueError):
            return False

    def _bad(self, error: Exception) -> BadPicture:
        if isinstance(error, BadPicture):
            return error
        if isinstance(error, FileNotFoundError):
            return BadPicture(self.name, "does not exist")
        if self._is_empty():
            return BadPicture(self.name, "cannot be read (it is empty: 0 bytes)")
        what = re.sub(r" '?<_?io\..*", "", str(error))  # Pillow calls a stream by its Python name
        return BadPicture(self.name, f"cannot be read ({type(error).__name__}: {shortened(what)})")


def file_picture(path: str | Path) -> Picture:
    """The picture in a file, called by its path."""
    return Picture(str(path), _Opener(str(path)))


def bytes_picture(name: str, content: bytes) -> Picture:
    """The picture that `content` encodes."""
    return Picture(name, lambda: BytesIO(content))


class _Opener:
    """Opens a file. A closure over its path would take three times the memory, and there may be 100,000."""

    __slots__ = ("path",)

    def __init__(self, path: str) -> None:
        self.path = path

    @property
    def place(self) -> tuple[str, str]:
        """As `data.cache.image_digests` asks for it: the file, and which part of it (all)."""
        return self.path, ""

    def __call__(self) -> BinaryIO:
        return open(self.path, "rb")


def shortened(name: str, most: int = 300) -> str:
    """`name` for a message: its middle is left out if it is longer than `most` characters."""
    return name if len(name) <= most else f"{name[: most - 60]}...{name[-57:]}"


def _rgb(image: Image.Image) -> Image.Image:
    """Any Pillow mode to RGB. ValueError for 32-bit and float pictures, whose white is not defined."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))  # 65535 -> 255
    elif image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} has no defined white: save it with 8 or 16 bits a channel")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _alpha(image: Image.Image) -> Image.Image:
    """How solid each place is, "L"; 255 everywhere if nothing is transparent."""
    if image.has_transparency_data:
        return image.convert("RGBA").getchannel("A")
    return Image.new("L", image.size, 255)
