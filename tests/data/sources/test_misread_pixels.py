"""data.sources.misread_pixels: pixels are those that the file states, also where Pillow reads others."""

import hashlib
import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data_helpers import encoded, write
from image_helpers import chunk
from PIL import Image

from data.sources.base import BadData
from data.sources.folders import Folder
from data.sources.images import BadPicture, Picture
from data.sources.misread_pixels import misreading
from flux2.utils import images

ROOT = Path(__file__).resolve().parents[3]
BLUE, CLEAR_BLUE = (60, 100, 200), (157, 177, 227)  # opaque, and half transparent on white
SIDE, PIXELS = 32, 32 * 32


def picture(content: bytes) -> Picture:
    return Picture("x.img", lambda: io.BytesIO(content))


def in_training(content: bytes) -> Image.Image:
    return picture(content).load()


def in_inference(content: bytes) -> Image.Image:
    return images.as_rgb(Image.open(io.BytesIO(content), formats=images.FORMATS), "x.img")


both = pytest.mark.parametrize("load", [in_training, in_inference])


def tga(bits: int, alpha_bits: int, pixel: bytes, *, kind: int = 2, palette: bytes = b"") -> bytes:
    """A TGA of one color, from the top left."""
    depth = 8 * len(palette)
    head = struct.pack("<BBBHHBHHHHBB", 0, bool(palette), kind, 0, bool(palette), depth, 0, 0, SIDE, SIDE, bits, 0)
    return head[:-1] + bytes([0x20 | alpha_bits]) + palette + pixel * PIXELS


def tiff(pixels: bytes, channels: int, photometric: int, more: dict[int, list[int]]) -> bytes:
    """A little-endian TIFF of 8 bits for each channel, with one strip, or one for each channel if they are planar."""
    strips = channels if more.get(284) == [2] else 1
    size, start = len(pixels) // strips, 8
    tags = {256: [SIDE], 257: [SIDE], 258: [8] * channels, 259: [1], 262: [photometric], 277: [channels], 278: [SIDE]}
    tags |= {273: [start + size * i for i in range(strips)], 279: [size] * strips} | more
    at = start + len(pixels) + 2 + 12 * len(tags) + 4
    entries = outside = b""
    for tag, values in sorted(tags.items()):
        form, code = ("I", 4) if tag in (273, 279) else ("H", 3)
        content = struct.pack(f"<{len(values)}{form}", *values)
        entries += struct.pack("<HHI", tag, code, len(values))
        entries += content.ljust(4, b"\0") if len(content) <= 4 else struct.pack("<I", at + len(outside))
        outside += content if len(content) > 4 else b""
    head = b"II*\0" + struct.pack("<I", start + len(pixels))
    return head + pixels + struct.pack("<H", len(tags)) + entries + bytes(4) + outside


def deep_png(colors: list[tuple[int, int, int]], key: tuple[int, int, int]) -> bytes:
    """A PNG of 16 bits per channel, with 16 columns of each color and a transparent one."""
    row = b"\0" + b"".join(struct.pack(">3H", *color) * 16 for color in colors)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 16 * len(colors), SIDE, 16, 2, 0, 0, 0))
    content = head + chunk(b"tRNS", struct.pack(">3H", *key)) + chunk(b"IDAT", zlib.compress(row * SIDE))
    return b"\x89PNG\r\n\x1a\n" + content + chunk(b"IEND", b"")


BGR = bytes(reversed(BLUE))
IN_15_BITS = struct.pack("<H", 7 << 10 | 12 << 5 | 24)
COLORS_OF_8_BITS = tiff(b"\1" * PIXELS, 1, 3, {320: [0, 60, *[0] * 254, 0, 100, *[0] * 254, 0, 200, *[0] * 254]})
HIGH = tuple(value * 256 for value in BLUE)
CORRECTED = {
    "tga of 32 bits, padded with 0": (tga(32, 0, BGR + b"\0"), BLUE),
    "tga of 32 bits, padded with 255": (tga(32, 0, BGR + b"\xff"), BLUE),
    "tga of 16 bits, padded with 1": (tga(16, 0, struct.pack("<H", 0x8000 | 7 << 10 | 12 << 5 | 24)), (57, 98, 197)),
    "tga of 16 bits, padded with 0": (tga(16, 0, IN_15_BITS), (57, 98, 197)),
    "tga with a palette of 32 bits": (tga(8, 0, b"\0", kind=1, palette=BGR + b"\0"), BLUE),
    "tga of gray of 16 bits": (tga(16, 0, b"\x4d\0", kind=3), (77, 77, 77)),
    "tiff with a color map of 8 bits": (COLORS_OF_8_BITS, BLUE),
    "png with a transparent color of other low bytes": (deep_png([HIGH, (9, 9, 9)], (HIGH[0] + 1, *HIGH[1:])), BLUE),
}
RIGHT = {
    "tga of 32 bits with alpha": (tga(32, 8, BGR + b"\x80"), CLEAR_BLUE),
    "tga of 16 bits with alpha": (tga(16, 1, IN_15_BITS), (57, 98, 197)),
    "tga of 24 bits": (tga(24, 0, BGR), BLUE),
    "tiff with a color map of 16 bits": (
        tiff(b"\1" * PIXELS, 1, 3, {320: [i * 257 for channel in BLUE for i in [0, channel, *[0] * 254]]}),
        BLUE,
    ),
    "tiff with a black color map": (tiff(b"\1" * PIXELS, 1, 3, {320: [0] * 768}), (0, 0, 0)),
    "tiff with unsigned numbers": (tiff(b"\x4d" * PIXELS, 1, 1, {339: [1]}), (77, 77, 77)),
    "tiff of gray with alpha": (tiff(b"\x3c\x80" * PIXELS, 2, 1, {338: [2]}), (157, 157, 157)),
    "tiff of gray with premultiplied alpha": (tiff(b"\x1e\x80" * PIXELS, 2, 1, {338: [1]}), (157, 157, 157)),
    "tiff with premultiplied alpha": (tiff(bytes([30, 50, 100, 128]) * PIXELS, 4, 2, {338: [1]}), CLEAR_BLUE),
    "planar tiff with alpha": (
        tiff(b"".join(bytes([value]) * PIXELS for value in (*BLUE, 128)), 4, 2, {284: [2], 338: [2]}),
        CLEAR_BLUE,
    ),
}


@both
@pytest.mark.parametrize("name", [*CORRECTED, *RIGHT])
def test_pixels_are_those_that_the_file_states(name: str, load: Callable[[bytes], Image.Image]) -> None:
    content, expected = (CORRECTED | RIGHT)[name]
    assert load(content).getpixel((5, 5)) == expected


def test_cached_latents_of_misread_pixels_are_encoded_again_and_no_others() -> None:
    for content, _ in CORRECTED.values():
        raw = hashlib.sha256(content).digest()
        assert picture(content).digest() == hashlib.sha256(b"pixels 1 " + raw).hexdigest()
        assert picture(content).transparency().digest() == hashlib.sha256(b"alpha pixels 1 " + raw).hexdigest()
        assert picture(content).unchanged(picture(content).digest()).load().size == picture(content).size
    for content, _ in RIGHT.values():
        raw = hashlib.sha256(content)
        assert picture(content).digest() == raw.hexdigest()
        assert picture(content).transparency().digest() == hashlib.sha256(b"alpha " + raw.digest()).hexdigest()


def test_padding_of_a_tga_is_no_mask(tmp_path: Path) -> None:
    padded, clear = tga(32, 0, BGR + b"\x80"), tga(32, 8, BGR + b"\x80")
    samples = Folder(write(tmp_path, {"a.tga": padded, "b.tga": clear}), prompt="x", mask="alpha")
    assert [sample.mask is None for sample in samples] == [True, False]
    assert picture(padded).transparency().load_mask().getextrema() == (255, 255)
    assert picture(clear).transparency().load_mask().getextrema() == (128, 128)


def test_all_bits_of_a_transparent_color_count() -> None:
    key = (HIGH[0] + 1, HIGH[1], HIGH[2] + 255)
    content = deep_png([key, HIGH, (*key[:2], key[2] - 1), (65535, 0, 1)], key)
    assert np.asarray(picture(content).transparency().load_mask())[5, ::16].tolist() == [0, 255, 255, 255]
    for load in (in_training, in_inference):
        assert [load(content).getpixel((at, 5)) for at in (3, 20, 60)] == [(255, 255, 255), BLUE, (255, 0, 0)]


REFUSED = {
    "signed": tiff(b"\x4d" * PIXELS, 1, 1, {339: [2]}),
    "premultiplied": tiff(bytes(4 * PIXELS), 4, 2, {284: [2], 338: [1]}),
}


@both
@pytest.mark.parametrize("reason", REFUSED)
def test_pixels_without_a_simple_reading_are_refused(
    reason: str, load: Callable[[bytes], Image.Image], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=rf"{reason}.*: save it"):
        load(REFUSED[reason])
    with pytest.raises(BadPicture, match=rf"x\.img.*{reason}"):
        picture(REFUSED[reason]).load_mask()
    with pytest.raises(BadData, match=rf"x\.tif.*{reason}"):  # by the header, before anything is encoded
        Folder(write(tmp_path, {"x.tif": REFUSED[reason]}), prompt="x")


def test_an_image_whose_pixels_are_loaded_already_is_left_as_it_is() -> None:
    image = Image.open(io.BytesIO(encoded(Image.new("RGB", (16, 16), BLUE))))
    image.load()
    assert misreading(Image.new("RGBA", (16, 16))) is None
    assert images.as_rgb(image).getpixel((3, 3)) == BLUE


def test_both_copies_of_the_module_are_equal() -> None:
    assert (ROOT / "data/sources/misread_pixels.py").read_text() == (ROOT / "flux2/utils/misread_pixels.py").read_text()
