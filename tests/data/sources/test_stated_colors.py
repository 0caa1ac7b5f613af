"""data.sources.stated_colors: colors that a file states without an ICC profile are applied, or warned about by name."""

import hashlib
import io
import logging
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from image_helpers import DISPLAY_P3, GRAY_LINEAR, PROPHOTO, SRGB, chunk
from PIL import Image

from data.sources import stated_colors as training_colors
from data.sources.images import BadPicture, Picture
from data.sources.stated_colors import stated_colors
from flux2.utils import images
from flux2.utils import stated_colors as inference_colors

ROOT = Path(__file__).resolve().parents[3]
GREEN, GREEN_IN_P3 = (40, 170, 60), (84, 168, 75)
SRGB_POINTS = (31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)
P3_POINTS = (31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)
PROPHOTO_POINTS = (34567, 35850, 73470, 26530, 15960, 84040, 3660, 10)
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8))
BT2020_TO_SRGB = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]]
)  # BT.2087


@pytest.fixture(autouse=True)
def no_earlier_warnings() -> None:
    training_colors._named.cache_clear()
    inference_colors._named.cache_clear()


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def png(*chunks: bytes, image: Image.Image | None = None, **options: object) -> bytes:
    """A PNG with further chunks before its pixels."""
    content = encoded(image or Image.new("RGB", (32, 32), GREEN_IN_P3), "PNG", **options)
    return content[:33] + b"".join(chunks) + content[33:]


def cicp(*codes: int) -> bytes:
    return chunk(b"cICP", bytes(codes))


def gama(gamma: int) -> bytes:
    return chunk(b"gAMA", struct.pack(">I", gamma))


def chrm(*points: int) -> bytes:
    return chunk(b"cHRM", struct.pack(">8I", *points))


def jp2(*boxes: bytes, image: Image.Image | None = None) -> bytes:
    """A JPEG 2000 file with these contents of color boxes in place of its own."""
    content = encoded(image or Image.new("RGB", (32, 32), GREEN_IN_P3), "JPEG2000")
    start = content.index(b"jp2h") - 4
    header = content[start + 8 : start + struct.unpack_from(">I", content, start)[0]]
    at = header.index(b"colr") - 4
    colors = b"".join(struct.pack(">I4s", len(box) + 8, b"colr") + box for box in boxes)
    header = header[:at] + colors + header[at + struct.unpack_from(">I", header, at)[0] :]
    end = start + struct.unpack_from(">I", content, start)[0]
    return content[:start] + struct.pack(">I4s", len(header) + 8, b"jp2h") + header + content[end:]


def avif(primaries: int, transfer: int, **options: object) -> bytes:
    content = encoded(Image.new("RGB", (32, 32), GREEN_IN_P3), "AVIF", quality=100, subsampling="4:4:4", **options)
    at = content.index(b"nclx") + 4
    return content[:at] + struct.pack(">HH", primaries, transfer) + content[at + 4 :]


def picture(content: bytes, name: str = "x.png") -> Picture:
    return Picture(name, lambda: io.BytesIO(content))


def in_training(content: bytes) -> Image.Image:
    return picture(content).load()


def in_inference(content: bytes) -> Image.Image:
    return images.as_rgb(Image.open(io.BytesIO(content)), "x.png")


both = pytest.mark.parametrize("load", [in_training, in_inference])

OF_P3 = {
    "cicp": png(cicp(12, 13, 0, 1)),
    "cicp before a profile": png(cicp(12, 13, 0, 1), icc_profile=PROPHOTO),
    "cicp before sRGB": png(cicp(12, 13, 0, 1), chunk(b"sRGB", b"\0")),
    "cicp before gamma": png(cicp(12, 1, 0, 1), gama(100000), chrm(*SRGB_POINTS)),
    "cicp after text": png(chunk(b"tEXt", b"Comment\0cICP"), cicp(12, 13, 0, 1)),
    "chrm": png(chrm(*P3_POINTS)),
    "chrm and gamma": png(gama(45455), chrm(*P3_POINTS)),
    "unknown cicp, then chrm": png(cicp(200, 13, 0, 1), chrm(*P3_POINTS)),
    "profile before chrm": png(chrm(*PROPHOTO_POINTS), gama(100000), icc_profile=DISPLAY_P3),
    "jp2 profile": jp2(b"\2\0\0" + DISPLAY_P3),
    "jp2 any profile": jp2(b"\3\0\0" + DISPLAY_P3),
    "jp2 after an unknown space": jp2(b"\1\0\0\0\0\0\x63", b"\2\0\0" + DISPLAY_P3),
    "jp2 codes": jp2(struct.pack(">BBBHHHB", 5, 0, 0, 12, 13, 0, 0x80)),
    "avif": avif(12, 13),
    "rgba": png(cicp(12, 13, 0, 1), image=Image.new("RGBA", (32, 32), (*GREEN_IN_P3, 255))),
    "palette": png(cicp(12, 13, 0, 1), image=Image.new("RGB", (32, 32), GREEN_IN_P3).quantize(2)),
}


@both
@pytest.mark.parametrize("name", OF_P3)
def test_stated_colors_are_converted(name: str, load: Callable[[bytes], Image.Image]) -> None:
    assert np.abs(np.subtract(load(OF_P3[name]).getpixel((3, 3)), GREEN)).max() <= (5 if name == "avif" else 1)


@both
def test_a_wide_gamut_and_a_gamma_are_converted_by_the_published_numbers(load: Callable[[bytes], Image.Image]) -> None:
    numbers = np.array([120, 150, 90])
    linear = np.where(numbers / 255 <= 0.04045, numbers / 255 / 12.92, ((numbers / 255 + 0.055) / 1.055) ** 2.4)
    expected = 255 * (1.055 * (BT2020_TO_SRGB @ linear) ** (1 / 2.4) - 0.055)
    found = load(png(cicp(9, 14, 0, 1), image=Image.new("RGB", (32, 32), tuple(numbers.tolist()))))
    assert np.abs(np.subtract(found.getpixel((3, 3)), expected)).max() <= 1
    for mode in ("L", "RGB", "LA", "I;16"):
        value = {"L": 128, "RGB": (128, 128, 128), "LA": (128, 255), "I;16": 128 * 257}[mode]
        for marks in ([gama(100000)], [gama(100000), chrm(*P3_POINTS)], [cicp(1, 8, 0, 1)]):
            found = load(png(*marks, image=Image.new(mode, (32, 32), value)))
            assert np.abs(np.subtract(found.getpixel((3, 3)), 188)).max() <= 1  # 0.5 in linear light
    prophoto = load(png(gama(55556), chrm(*PROPHOTO_POINTS), image=Image.new("RGB", (32, 32), (89, 143, 66))))
    assert np.abs(np.subtract(prophoto.getpixel((3, 3)), GREEN)).max() <= 1


SAME = {
    "none": [],
    "gamma": [gama(45455)],
    "usual": [gama(45455), chrm(*SRGB_POINTS)],
    "truncated": [gama(45454), chrm(31269, 32899, 63999, 33001, 30000, 60000, 15000, 5999)],
    "two decimals": [gama(45000), chrm(31000, 33000, 64000, 33000, 30000, 60000, 15000, 6000)],
    "srgb": [chunk(b"sRGB", b"\0"), gama(100000), chrm(*P3_POINTS)],
    "cicp of srgb": [cicp(1, 13, 0, 1)],
    "cicp of BT.709": [cicp(1, 1, 0, 1)],
    "text": [chunk(b"tEXt", b"Comment\0cICP")],
}


@both
@pytest.mark.parametrize("name", SAME)
def test_images_in_srgb_keep_every_bit_and_their_cache_entry(name: str, load: Callable[[bytes], Image.Image]) -> None:
    content = png(*SAME[name], image=NOISE)
    assert load(content).tobytes() == NOISE.tobytes()
    assert picture(content).digest() == hashlib.sha256(content).hexdigest()
    with_profile = png(chrm(*P3_POINTS), gama(100000), image=NOISE, icc_profile=SRGB)
    assert load(with_profile).tobytes() == NOISE.tobytes()
    assert picture(with_profile).digest() == hashlib.sha256(with_profile).hexdigest()


@both
def test_other_formats_in_srgb_keep_every_bit(
    load: Callable[[bytes], Image.Image], caplog: pytest.LogCaptureFixture
) -> None:
    stream = io.BytesIO()
    NOISE.save(stream, "JPEG2000", no_jp2=True)  # a codestream without boxes
    assert load(stream.getvalue()).tobytes() == NOISE.tobytes()
    assert not caplog.records
    plain, linear = jp2(b"\1\0\0\0\0\0\x10", image=NOISE), Image.new("L", (32, 32), 128)
    assert load(plain).tobytes() == NOISE.tobytes()
    assert load(jp2(b"\2\0\0" + SRGB, image=NOISE)).tobytes() == NOISE.tobytes()
    assert load(avif(1, 13)).tobytes() == load(avif(2, 2)).tobytes() == load(avif(1, 1)).tobytes()
    gray = load(jp2(b"\2\0\0" + GRAY_LINEAR, image=linear)).getpixel((3, 3))
    assert np.abs(np.subtract(gray, 188)).max() <= 1
    assert load(avif(9, 13, icc_profile=DISPLAY_P3)).tobytes() == load(avif(1, 13, icc_profile=DISPLAY_P3)).tobytes()


def test_cached_latents_of_stated_colors_are_encoded_again_and_no_others() -> None:
    for content in (*OF_P3.values(), png(cicp(9, 16, 0, 1)), png(gama(100000))):
        if Image.open(io.BytesIO(content)).info.get("icc_profile") != DISPLAY_P3:
            assert picture(content).digest() != hashlib.sha256(content).hexdigest()
            assert picture(content).unchanged(picture(content).digest()).size == (32, 32)
    alpha = picture(png(cicp(12, 13, 0, 1), image=Image.new("RGBA", (32, 32)))).transparency()
    raw = hashlib.sha256(alpha.open().read()).digest()
    assert alpha.digest() == hashlib.sha256(b"alpha " + raw).hexdigest()  # transparency has no color


WARNED = {
    "primaries 200": png(cicp(200, 13, 0, 1), image=NOISE),
    "transfer 9": png(cicp(1, 9, 0, 1), image=NOISE),
    "matrix 1": png(cicp(1, 13, 1, 1), image=NOISE),
    "full range 0": png(cicp(1, 13, 0, 0), image=NOISE),
    "cHRM": png(chrm(31270, 32900, 64000, 33000, 64000, 33000, 15000, 6000), image=NOISE),
    "cHRM ": png(chrm(0, 0, 64000, 33000, 30000, 60000, 15000, 6000), image=NOISE),
    " cHRM": png(chrm(*[2**32 - 1] * 8), image=NOISE),
    "gamma 0": png(gama(0), image=NOISE),
    "cannot be read": png(chunk(b"cICP", b"\1"), image=NOISE),
    "space 14": jp2(b"\1\0\0\0\0\0\x0e", image=NOISE),
    "method 4": jp2(b"\4\0\0vendor of colors", image=NOISE),
}


@both
@pytest.mark.parametrize("reason", WARNED)
def test_what_cannot_be_applied_is_warned_about_once_with_the_name_and_the_reason(
    reason: str, load: Callable[[bytes], Image.Image], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert load(WARNED[reason]).tobytes() == load(WARNED[reason]).tobytes() == NOISE.tobytes()
    (record,) = caplog.records
    assert "x.png" in record.message
    assert reason.strip() in record.message


@both
@pytest.mark.parametrize(
    ("content", "what"),
    [
        (png(cicp(9, 16, 0, 1), icc_profile=SRGB), "PQ"),
        (png(cicp(9, 18, 0, 1)), "HLG"),
        (avif(9, 16), "PQ"),
        (jp2(struct.pack(">BBBHHHB", 5, 0, 0, 9, 18, 0, 0x80)), "HLG"),
    ],
)
def test_hdr_is_refused_by_name(content: bytes, what: str, load: Callable[[bytes], Image.Image]) -> None:
    with pytest.raises(ValueError, match=rf"HDR.*{what}"):
        load(content)
    with pytest.raises(BadPicture, match=rf"x\.png.*{what}"):
        picture(content).load()
    assert picture(content).load_mask().size == picture(content).size == (32, 32)  # masks are numbers


def test_a_damaged_file_gives_colors_or_a_problem_and_leaves_the_stream_where_it_was() -> None:
    rng, opened = np.random.default_rng(0), 0
    for content in (*OF_P3.values(), png(gama(45455), chrm(*P3_POINTS))):
        for _ in range(60):
            damaged = bytearray(content)
            for at in rng.integers(8, min(len(content), 700), 3):
                damaged[at] = rng.integers(256)
            try:
                image = Image.open(io.BytesIO(bytes(damaged)), formats=images.FORMATS)
            except Exception:  # Pillow's decoders raise OSError, SyntaxError, struct.error, EOFError and more
                continue
            opened += 1
            before = image.fp.tell()
            found = stated_colors(image)
            assert image.fp.tell() == before
            assert isinstance(found.profile, bytes | None)
            assert not found.is_hdr or found.problem
    assert opened > 200


def test_both_copies_of_the_module_are_equal() -> None:
    assert (ROOT / "data/sources/stated_colors.py").read_text() == (ROOT / "flux2/utils/stated_colors.py").read_text()


def test_an_image_whose_pixels_are_loaded_already_is_read_without_its_file() -> None:
    for name in ("avif", "cicp", "jp2 profile"):
        image = Image.open(io.BytesIO(OF_P3[name]))
        image.load()
        assert stated_colors(image).problem == ""
        assert images.as_rgb(image).size == (32, 32)
