"""One encoded image that is opened on demand: header, 8-bit RGB pixels, alpha channel, digest.

All exceptions of Pillow's decoders for a damaged file become a `BadPicture` with a name and a reason, so that sources
and caches can list all errors of a dataset instead of stopping at the first file.
"""

import hashlib
import io
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

from PIL import ExifTags, Image, UnidentifiedImageError

from data.files import open_regular
from data.sources.encoded_pixels import MOST_BYTES, encoded_pixels
from data.sources.misread_pixels import PADDING, misreading
from data.sources.pixels import FORMATS, TransparentEverywhere, decode_alpha, decode_gray, decode_rgb, open_image
from data.sources.stated_colors import is_recolored

# fmt: off
SUFFIXES = frozenset((
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".mpo", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff",
    ".avif", ".avifs", ".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm", ".qoi",
    ".tga", ".icb", ".vda", ".vst",
))
# photographs, drawings and films that are not opened: an error, not skipped. Pillow opens a raw photograph as a TIFF,
# and so its thumbnail.
UNREADABLE = frozenset((
    ".heic", ".heif", ".hif", ".jxl", ".jxr", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2", ".pef",
    ".srw", ".psd", ".psb", ".xcf", ".kra", ".clip", ".exr", ".hdr", ".dds", ".ico", ".svg", ".eps", ".pdf", ".ai",
    ".mp4", ".mov", ".webm", ".mkv", ".avi", ".m4v",
))
# fmt: on

MOST_SHRUNK = 50_000_000  # pixels that are decoded for a thumbnail


class BadPicture(ValueError):  # noqa: N818
    """An image that cannot be used: its name in messages, and a reason that follows the name ("cannot be read")."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"image {shorten(name)} {reason}. Replace or remove it")
        self.name, self.reason = name, reason


class Header(NamedTuple):
    """Properties of an image that are known without decoding its pixels."""

    size: tuple[int, int]  # (width, height) in pixels, after the EXIF rotation
    mode: str  # Pillow's mode
    animated: bool  # has more than one frame or page
    transparent: bool  # has an alpha channel or a transparent color


@dataclass(frozen=True, slots=True)
class Picture:
    """One image that is opened on demand. All methods raise BadPicture if it cannot be read."""

    name: str  # in messages: a path, or "row 12 of X, column image"
    open: Callable[[], BinaryIO] = field(repr=False)  # returns a new stream of the encoded file
    alpha: bool = False  # use the alpha channel as gray pixels: black where transparent, white where opaque
    # what is known of it once it was read, or recalled from an earlier start
    _header: Header | None = field(default=None, init=False, repr=False, compare=False)
    digests: bytes | None = field(default=None, init=False, repr=False, compare=False)  # of content and of pixels

    def load(self) -> Image.Image:
        """Return the first frame as 8-bit sRGB, as `data.sources.pixels.decode_rgb` converts it."""
        return self._decoded(partial(decode_rgb, name=self.name)).convert("RGB")

    def thumbnail(self, side: int) -> Image.Image:
        """Return the image, or with `alpha` its mask, as 8-bit RGB, shrunk to at most `side` pixels per side.

        A JPEG is decoded at the scale that is needed, with a fraction of the time and the memory.
        """

        def decode(image: Image.Image) -> Image.Image:
            image.draft(None, (2 * side, 2 * side))
            if image.width * image.height > MOST_SHRUNK:
                raise BadPicture(self.name, f"has {image.width} x {image.height} pixels, too many to show it small")
            return decode_alpha(image) if self.alpha else decode_rgb(image, name=self.name)

        found = self._decoded(decode).convert("RGB")
        found.thumbnail((side, side), Image.Resampling.LANCZOS)
        return found

    def load_mask(self) -> Image.Image:
        """Return the pixels as a mask, 8-bit gray ("L"), of the size `size`: the weight of each pixel in the loss."""
        return self._decoded(decode_gray)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels of the result of `load`, from the header alone."""
        return self.header.size

    @property
    def header(self) -> Header:
        """The header, which is read once."""
        if self._header is None:
            self.remember(self._read_header(), self.digests)
        assert self._header is not None
        return self._header

    def remember(self, header: Header, digests: bytes | None) -> None:
        """Take these as the header and the digests of this image, 64 bytes."""
        object.__setattr__(self, "_header", header)
        object.__setattr__(self, "digests", digests)

    def _read_header(self) -> Header:
        with self._stream() as stream, open_image(stream) as image:
            # Pillow decodes a whole PNG to look for EXIF after its pixels, where few files have it.
            header_suffices = image.format == "PNG" and not self._metadata_follows_pixels()
            exif = Image.Image.getexif(image) if header_suffices else image.getexif()
            # for a TIFF Pillow's size is already the rotated one
            sideways = image.format != "TIFF" and exif.get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
            # the further frames of a phone's MPO are depth or brightness
            animated = image.format != "MPO" and bool(getattr(image, "is_animated", False))
            width, height = image.size
            size = (height, width) if sideways else (width, height)
            transparent = misreading(image) != PADDING and image.has_transparency_data
            return Header(size, image.mode, animated, transparent)

    def digest(self) -> str:
        """Return the hexadecimal sha256 of the encoded file, which cache entries and draws depend on.

        It differs from that with `alpha`, and for an image whose stated colors older versions ignored or whose pixels
        they misread: its cached latents are of other pixels.
        """
        digest = hashlib.sha256()
        with self._stream() as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
            stream.seek(0)
            with open_image(stream) as image:
                prefix = b"alpha " if self.alpha else b"colors 1 " if is_recolored(image) else b""
                prefix += b"pixels 1 " if misreading(image) else b""
        return hashlib.sha256(prefix + digest.digest()).hexdigest() if prefix else digest.hexdigest()

    def pixel_digest(self, digest: str) -> str:
        """Return a digest that copies share whose files differ only in metadata; `digest` if that cannot be known."""
        with self._stream() as stream:
            content = stream.read(MOST_BYTES + 1)
        parts = encoded_pixels(content) if len(content) <= MOST_BYTES else None
        if parts is None:
            return digest
        pixels = hashlib.sha256()
        for part in parts:
            pixels.update(part)
        return pixels.hexdigest()

    def is_same_file(self, other: "Picture") -> bool:
        """Return whether both are one file, also by a link, or one cell or file of a shard."""
        if self.name == other.name:
            return True
        with self._stream() as ours, other._stream() as theirs:
            try:
                return os.path.sameopenfile(ours.fileno(), theirs.fileno())
            except io.UnsupportedOperation:  # they are not files of their own, so their names tell them apart
                return False

    def unchanged(self, digest: str) -> "Picture":
        """Return this image, read into memory once. Raise BadPicture if its content does not have this digest."""
        with self._stream() as stream:
            content = stream.read()
        held = replace(self, open=lambda: io.BytesIO(content))
        if held.digest() != digest:
            raise BadPicture(self.name, "was changed after this run had read its digest (start again)")
        return held

    def transparency(self) -> "Picture":
        """Return the alpha channel of this image."""
        return replace(self, name=f"the alpha channel of {self.name}", alpha=True)

    @contextmanager
    def _stream(self) -> Iterator[BinaryIO]:
        """Context manager that opens the encoded file and turns exceptions into BadPicture."""
        try:
            with self.open() as stream:
                yield stream
        except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, EOFError and more
            raise self._bad(error) from error

    def _decoded(self, decode: Callable[[Image.Image], Image.Image]) -> Image.Image:
        with self._stream() as stream, open_image(stream) as image:
            return (decode_alpha if self.alpha else decode)(image)

    def _metadata_follows_pixels(self) -> bool:
        """Return whether EXIF or text (XMP) follows the first IDAT chunk of a PNG; reads only the chunk headers."""
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

    def _bad(self, error: Exception) -> BadPicture:
        if isinstance(error, BadPicture):
            return error
        if isinstance(error, TransparentEverywhere):
            return BadPicture(self.name, str(error))
        if isinstance(error, FileNotFoundError):
            hint = ": its name has a backslash, and folders are separated by /" if "\\" in self.name else ""
            return BadPicture(self.name, f"does not exist{hint}")
        with suppress(OSError, ValueError), self.open() as stream:
            if not stream.read(1):
                return BadPicture(self.name, "cannot be read (it is empty: 0 bytes)")
        if isinstance(error, UnidentifiedImageError):  # its message names the stream object
            return BadPicture(
                self.name, f"cannot be read: it is damaged, or in none of the formats {', '.join(FORMATS)}"
            )
        what = re.sub(r" '?<[\w.]+[ >].*", "", str(error))  # Pillow's messages contain the repr of the stream
        return BadPicture(self.name, f"cannot be read ({type(error).__name__}: {shorten(what)})")


class KnownFiles(Protocol):
    """What earlier starts found out about files (data/cache/image_digests.py)."""

    def recall(self, pictures: Iterable[Picture]) -> None:
        """Give pictures their headers and digests if these are known and their files have not changed since."""

    def listing(self, path: str, read: Callable[[], Any]) -> Any:
        """Return a JSON value that describes a file: the stored one, or if there is none the result of `read`."""


KNOWN_FILES: ContextVar[KnownFiles | None] = ContextVar("KNOWN_FILES", default=None)  # of sources that are opened now


def file_picture(path: str | Path) -> Picture:
    """Return the image in a file, named by its path."""
    return Picture(str(path), FileOpener(str(path)))


@dataclass(frozen=True, slots=True)
class FileOpener:
    """Function that opens a file or a part of it; with 100,000 images a closure takes three times the memory."""

    path: str
    offset: int = 0
    length: int | None = None

    @property
    def place(self) -> tuple[str, str]:
        """The file and the part of it that is read, for `data.cache.image_digests`."""
        return self.path, "" if self.length is None else f"{self.length} bytes from {self.offset}"

    def __call__(self) -> BinaryIO:
        if self.length is None:
            return open_regular(self.path)
        return io.BufferedReader(_FilePart(self.path, self.offset, self.length))


class _FilePart(io.RawIOBase):
    def __init__(self, path: str, offset: int, length: int) -> None:
        self._file = open_regular(path)
        self._offset, self._length, self._place = offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._length}[whence]
        self._place = max(start + offset, 0)
        return self._place

    def readinto(self, buffer: "bytearray | memoryview") -> int:  # type: ignore[override]
        wanted = min(len(buffer), max(self._length - self._place, 0))
        self._file.seek(self._offset + self._place)
        read = self._file.readinto(memoryview(buffer)[:wanted])
        self._place += read
        return read

    def close(self) -> None:
        self._file.close()
        super().close()


def printable(text: str) -> str:
    """Return a text with escapes for control characters and for bytes of a file name that are not UTF-8."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else ascii(one)[1:-1] for one in text)


def shorten(name: str, most: int = 300) -> str:
    """Return `name` for a message, printable, without its middle if it is longer than `most` characters."""
    name = printable(name)
    return name if len(name) <= most else f"{name[: most - 60]}...{name[-57:]}"
