"""data.sources.encoded_pixels: copies that differ only in metadata have one digest, other pixels another one."""

import io
import struct
import time
from collections.abc import Callable

import numpy as np
import pytest
from image_helpers import DISPLAY_P3, chunk
from PIL import Image

from data.sources import encoded_pixels
from data.sources.images import Picture

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 56, 4), dtype=np.uint8)
TURNED = Image.Exif()
TURNED[274] = 6
TURNED[270] = "a description"


def encoded(kind: str, pixels: np.ndarray = PIXELS, **options: object) -> bytes:
    channels = 3 if kind == "JPEG" else pixels.shape[2]
    stream = io.BytesIO()
    Image.fromarray(pixels[..., :channels].copy()).save(stream, kind, **options)
    return stream.getvalue()


def digests(content: bytes) -> tuple[str, str]:
    picture = Picture("x", lambda: io.BytesIO(content))
    return picture.digest(), picture.pixel_digest(picture.digest())


def with_chunk(content: bytes, kind: bytes, data: bytes, after: bytes = b"IHDR") -> bytes:
    """A PNG with one more chunk behind the first of the kind `after`."""
    start = content.index(after) - 4
    end = start + 12 + struct.unpack_from(">I", content, start)[0]
    return content[:end] + chunk(kind, data) + content[end:]


def with_segment(content: bytes, marker: int, data: bytes) -> bytes:
    return content[:2] + struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data + content[2:]


def with_riff_chunk(content: bytes, kind: bytes, data: bytes) -> bytes:
    body = content[8:] + struct.pack("<4sI", kind, len(data)) + data + b"\0" * (len(data) % 2)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def split_pixels(content: bytes) -> bytes:
    """A PNG whose pixels are in chunks of 500 bytes."""
    start = content.index(b"IDAT") - 4
    (length,) = struct.unpack_from(">I", content, start)
    data = content[start + 8 : start + 8 + length]
    parts = b"".join(chunk(b"IDAT", data[at : at + 500]) for at in range(0, length, 500))
    return content[:start] + parts + content[start + 12 + length :]


PNG, JPEG, WEBP = encoded("PNG"), encoded("JPEG"), encoded("WEBP", lossless=True)
LOSSY, PROGRESSIVE = encoded("WEBP"), encoded("JPEG", progressive=True)
COPIES = {
    "png text": (PNG, with_chunk(PNG, b"tEXt", b"Comment\0a fox")),
    "png itxt behind the pixels": (PNG, with_chunk(PNG, b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<x/>", b"IDAT")),
    "png time": (PNG, with_chunk(PNG, b"tIME", struct.pack(">H5B", 2024, 1, 2, 3, 4, 5))),
    "png exif": (PNG, encoded("PNG", exif=TURNED)),
    "png trailing": (PNG, PNG + b"more of another program"),
    "png private": (PNG, with_chunk(PNG, b"prVt", bytes(100))),
    "png pixels in other chunks": (PNG, split_pixels(PNG)),
    "png profile": (PNG, encoded("PNG", icc_profile=DISPLAY_P3)),
    "png without end": (PNG, PNG[:-12]),
    "jpeg fill bytes": (JPEG, JPEG.replace(b"\xff\xdb", b"\xff\xff\xff\xdb", 1)),
    "png resolution": (PNG, encoded("PNG", dpi=(300, 300))),
    "jpeg comment": (JPEG, with_segment(JPEG, 0xFE, b"a fox \xff\xd9")),
    "jpeg exif": (JPEG, encoded("JPEG", exif=TURNED)),
    "jpeg profile": (JPEG, encoded("JPEG", icc_profile=DISPLAY_P3)),
    "jpeg thumbnail": (JPEG, with_segment(JPEG, 0xE1, b"Exif\0\0" + encoded("JPEG", PIXELS[:8, :8]))),
    "jpeg trailing": (JPEG, JPEG + JPEG[::-1]),
    "jpeg progressive": (PROGRESSIVE, with_segment(PROGRESSIVE, 0xFE, b"a fox") + b"more"),
    "webp exif": (WEBP, encoded("WEBP", lossless=True, exif=TURNED)),
    "webp xmp and profile": (WEBP, encoded("WEBP", lossless=True, xmp=b"<x/>", icc_profile=DISPLAY_P3)),
    "webp with alpha and exif": (LOSSY, encoded("WEBP", exif=TURNED)),
    "webp unknown": (WEBP, with_riff_chunk(WEBP, b"PRVT", b"odd")),
    "webp trailing": (WEBP, WEBP + b"more"),
}


@pytest.mark.parametrize("name", COPIES)
def test_copies_that_differ_in_metadata_share_a_digest_of_pixels(name: str) -> None:
    original, copy = (digests(content) for content in COPIES[name])
    assert original[0] != copy[0]
    assert original[1] == copy[1] != original[0]


def test_other_pixels_have_other_digests() -> None:
    other = PIXELS.copy()
    other[20, 20] ^= 255
    rows = [encoded(kind, pixels) for pixels in (PIXELS, other) for kind in ("PNG", "JPEG", "WEBP")]
    rows += [PROGRESSIVE, WEBP, encoded("JPEG", quality=90)]
    palette = Image.fromarray(PIXELS[..., :3].copy()).quantize(16)
    for colors in (palette.getpalette(), list(range(48))):
        palette.putpalette(colors or [])
        stream = io.BytesIO()
        palette.save(stream, "PNG")
        rows += [stream.getvalue(), with_chunk(stream.getvalue(), b"tRNS", b"\0", b"PLTE")]
    assert len({digests(content)[1] for content in rows}) == len(rows)


@pytest.mark.parametrize("content", [PNG, JPEG, WEBP, LOSSY, PROGRESSIVE])
def test_a_file_that_is_cut_or_damaged_is_hashed_whole(content: bytes) -> None:
    cuts = [encoded_pixels.encoded_pixels(content[:end]) for end in range(len(content) - 12)]
    assert cuts == [None] * len(cuts)
    rng = np.random.default_rng(0)
    for _ in range(500):  # no exception, whatever is in it
        damaged = bytearray(content)
        for at in rng.integers(0, min(len(content), 200), 4):
            damaged[at] = rng.integers(256)
        parts = encoded_pixels.encoded_pixels(bytes(damaged))
        assert parts is None or sum(map(len, parts)) <= len(damaged)


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "GIF"])
def test_a_format_without_known_parts_is_hashed_whole(kind: str) -> None:
    content, more = digests(encoded(kind, PIXELS[..., :3])), digests(encoded(kind, PIXELS[..., :3]) + b"more")
    assert content[0] == content[1] != more[1] == more[0]


def test_a_file_that_is_too_large_is_not_read_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.sources.images.MOST_BYTES", len(PNG) - 1)
    most: list[int] = []

    class Counted(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            most.append(size or 0)
            return super().read(size)

    assert Picture("x", lambda: Counted(PNG)).pixel_digest("whole") == "whole"
    assert most == [len(PNG)]


@pytest.mark.parametrize(
    "hostile",
    [
        lambda: b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sI", 0, b"tEXt", 0) * 200_000,
        lambda: b"\xff\xd8" + b"\xff\xe1\0\2" * 500_000,
        lambda: b"\xff\xd8" + b"\xff" * 4_000_000,
        lambda: b"RIFF" + struct.pack("<I", 4 + 8 * 300_000) + b"WEBP" + struct.pack("<4sI", b"EXIF", 0) * 300_000,
    ],
    ids=["png", "jpeg", "jpeg fill", "webp"],
)
def test_many_tiny_parts_are_passed_in_linear_time(hostile: Callable[[], bytes]) -> None:
    begun = time.process_time()
    encoded_pixels.encoded_pixels(hostile())
    assert time.process_time() - begun < 5
