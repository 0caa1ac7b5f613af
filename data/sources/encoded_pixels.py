"""The parts of an encoded image that hold its pixels, without decoding them: what two copies of one image share.

A program that adds a caption, a date or a camera's EXIF to a file changes its bytes and no pixel. PNG, JPEG and WebP
keep the pixels in chunks or segments of their own, so that only these need to be hashed. Color profiles and the EXIF
orientation are left out as well: a copy that is turned or tagged differently shows the same content, and must not be
validated on if its twin is trained. Other formats, and files that cannot be followed to their end, are hashed whole.
"""

import re
import struct
from collections.abc import Iterator

MOST_BYTES = 1 << 28  # of a file that is read into memory for it
_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_PIXELS = frozenset((b"IHDR", b"PLTE", b"tRNS", b"IDAT"))
_WEBP_PIXELS = frozenset((b"VP8 ", b"VP8L", b"ALPH", b"ANMF"))
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # within pixels 0xff is followed by 0 or a restart marker
_END_OF_IMAGE, _COMMENT = 0xD9, 0xFE
_APPLICATION = range(0xE0, 0xF0)


def encoded_pixels(content: bytes) -> list[memoryview] | None:
    """Return the parts of an encoded file that hold pixels, in order; None if its format is not known or is damaged."""
    if content.startswith(_PNG):
        parts = _png(content)
    elif content.startswith(b"\xff\xd8\xff"):
        parts = _jpeg(content)
    elif content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        parts = _webp(content)
    else:
        return None
    try:
        return list(parts)
    except (struct.error, ValueError):
        return None


def _png(content: bytes) -> Iterator[memoryview]:
    """Yield kind and data of chunks; of the pixels only the data, which a copy may split into other chunks."""
    view, at, previous = memoryview(content), len(_PNG), b""
    while previous != b"IEND" and not (previous == b"IDAT" and at == len(content)):  # decoders do without the end
        length, kind = struct.unpack_from(">I4s", content, at)
        end = at + 8 + length
        if end + 4 > len(content):
            raise ValueError("a chunk is cut")
        if kind in _PNG_PIXELS:
            yield view[at + 8 if kind == previous else at + 4 : end]
            previous = kind
        elif kind == b"IEND":
            previous = kind
        at = end + 4  # after the checksum


def _jpeg(content: bytes) -> Iterator[memoryview]:
    """Yield segments and scans up to the end of the first image, except comments and those of applications."""
    view, at = memoryview(content), 2
    while marker := _JPEG_MARKER.search(content, at):
        end = marker.start()
        while end > at and content[end - 1] == 0xFF:  # which may fill up the space before a marker
            end -= 1
        yield view[at:end]  # of a scan
        kind = content[marker.end() - 1]
        if kind == _END_OF_IMAGE:
            return
        (length,) = struct.unpack_from(">H", content, marker.end())
        at = marker.end() + length
        if length < 2 or at > len(content):
            raise ValueError("a segment is cut")
        if kind != _COMMENT and kind not in _APPLICATION:
            yield view[marker.start() : at]
    raise ValueError("it has no end")


def _webp(content: bytes) -> Iterator[memoryview]:
    """Yield the chunks with pixels. The header of an extended file is left out: it says which metadata follow."""
    view, at = memoryview(content), 12
    end_of_file = 8 + struct.unpack_from("<I", content, 4)[0]
    if end_of_file > len(content):
        raise ValueError("it is cut")
    while at < end_of_file:
        kind, length = struct.unpack_from("<4sI", content, at)
        end = at + 8 + length
        if end > end_of_file:
            raise ValueError("a chunk is cut")
        if kind in _WEBP_PIXELS:
            yield view[at:end]
        at = end + length % 2
