"""data.sources.images: what a picture looks like once loaded, what its header tells, and what is said of a damaged
one.
"""

import hashlib
import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.sources.images import BadPicture, Picture, file_picture
from flux2.utils.images import read_image

RED, WHITE = (255, 0, 0), (255, 255, 255)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def picture(content: bytes) -> Picture:
    return Picture("here.png", lambda: BytesIO(content))


def square(color: str = "red", mode: str = "RGB") -> bytes:
    return encoded(Image.new(mode, (4, 4), color))


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[274] = value
    return exif


def half(left: str, right: str) -> Image.Image:
    """6 x 4 pixels, the left third of another color than the rest."""
    image = Image.new("RGB", (6, 4), right)
    image.paste(left, (0, 0, 2, 4))
    return image


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
@pytest.mark.parametrize(("value", "red_at"), [(1, (0, 2)), (3, (5, 2)), (6, (2, 0)), (8, (2, 5))])
def test_exif_orientation_is_applied_to_pixels_and_size(kind: str, value: int, red_at: tuple[int, int]) -> None:
    found = picture(encoded(half("red", "blue"), kind, exif=orientation(value)))
    image = found.load()
    assert image.size == found.size == ((4, 6) if value in (6, 8) else (6, 4))
    red, _, blue = image.getpixel(red_at)  # type: ignore[misc]
    assert red > 150 > 100 > blue


def test_exif_behind_the_pixels_of_a_png_counts_too() -> None:
    plain, turned = encoded(half("red", "blue")), encoded(half("red", "blue"), exif=orientation(6))
    start = turned.index(b"eXIf") - 4
    chunk = turned[start : start + 12 + int.from_bytes(turned[start : start + 4], "big")]
    found = picture(plain[:-12] + chunk + plain[-12:])  # before IEND, the last 12 bytes
    assert found.size == found.load().size == (4, 6)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_size_reads_the_header_alone(kind: str) -> None:
    content = encoded(Image.effect_noise((300, 200), 90), kind)
    start = content.index(b"IDAT") if kind == "PNG" else len(content) // 2
    broken = picture(content[: start + 20])
    assert broken.size == (300, 200)
    with pytest.raises(ValueError, match=r"here\.png\b"):
        broken.load()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 51))), (204, 204, 204)),
        (encoded(Image.new("LA", (4, 4), (0, 51))), (204, 204, 204)),
        (encoded(Image.new("L", (4, 4), 77)), (77, 77, 77)),
        (encoded(Image.new("1", (4, 4), 1)), WHITE),
        (encoded(Image.new("RGB", (4, 4), "red").convert("P")), RED),
        (encoded(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF"), RED),
        (encoded(Image.fromarray(np.full((4, 4), 65535, np.uint16))), WHITE),
        (encoded(Image.fromarray(np.full((4, 4), 128 * 257, np.uint16))), (128, 128, 128)),
        (encoded(Image.fromarray(np.full((4, 4), 128 * 257, np.uint16)), "TIFF"), (128, 128, 128)),
        (encoded(Image.fromarray(np.full((4, 4), 129, np.uint16))), (1, 1, 1)),  # 129 / 257 rounds up
    ],
    ids=[
        "smoke",
        "gray_a",
        "gray",
        "bits",
        "palette",
        "cmyk",
        "white16",
        "gray16",
        "tiff16",
        "dark16",
    ],
)
def test_any_mode_becomes_rgb_with_transparency_over_white(content: bytes, expected: tuple) -> None:
    image = picture(content).load()
    assert image.mode == "RGB"
    assert image.getcolors() == [(16, expected)]


def clear_bmp() -> bytes:
    """A BMP of version 5 that declares alpha, which is 0 everywhere."""
    pixels = bytes((0, 0, 255, 0)) * 16 * 16
    info = struct.pack("<IiiHHIIiiII", 124, 16, 16, 1, 32, 3, len(pixels), 2835, 2835, 0, 0)
    info += struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    return b"BM" + struct.pack("<IHHI", 138 + len(pixels), 0, 0, 138) + info.ljust(124, b"\0") + pixels


CLEAR = {
    "rgba.png": encoded(Image.new("RGBA", (16, 16), (255, 0, 0, 0))),
    "gray.png": encoded(Image.new("LA", (16, 16), (77, 0))),
    "palette.png": encoded(Image.new("P", (16, 16), 0), transparency=0),
    "key.png": encoded(Image.new("RGB", (16, 16), "red"), transparency=RED),
    "deep.png": encoded(Image.fromarray(np.full((16, 16), 20000, np.uint16)), transparency=20000),
    "palette.gif": encoded(Image.new("P", (16, 16), 0), "GIF", transparency=0),
    "alpha.bmp": clear_bmp(),
    "rgba.webp": encoded(Image.new("RGBA", (16, 16), (255, 0, 0, 0)), "WEBP", lossless=True, exact=True),
}


@pytest.mark.parametrize("name", CLEAR)
def test_an_image_that_is_transparent_everywhere_is_bad(name: str, tmp_path: Path) -> None:
    for load in (picture(CLEAR[name]).load, picture(CLEAR[name]).load_mask):
        with pytest.raises(BadPicture, match=r"here\.png is transparent everywhere\b.*white"):
            load()
    assert picture(CLEAR[name]).transparency().load_mask().getextrema() == (0, 0)
    (tmp_path / name).write_bytes(CLEAR[name])
    with pytest.raises(ValueError, match=r"--image x\b.*transparent everywhere\b.*white"):
        read_image(tmp_path / name, "--image x")


def test_an_image_that_is_almost_transparent_is_used(tmp_path: Path) -> None:
    image = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    image.putpixel((3, 3), (0, 0, 0, 1))
    image.save(tmp_path / "x.png")
    for found in (picture(encoded(image)).load(), read_image(tmp_path / "x.png", "x")):
        assert (found.getpixel((3, 3)), found.getpixel((9, 9))) == ((254, 254, 254), WHITE)


def test_a_cmyk_jpeg_becomes_rgb() -> None:
    image = picture(encoded(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG")).load()
    red, green, blue = image.getpixel((4, 4))  # type: ignore[misc]
    assert (image.mode, red > 240, green < 15, blue < 15) == ("RGB", True, True, True)


def test_a_float_picture_is_refused_rather_than_guessed_at() -> None:
    with pytest.raises(ValueError, match=r"here\.png\b.*mode F\b"):
        picture(encoded(Image.new("F", (4, 4), 0.5), "TIFF")).load()


@pytest.mark.parametrize("content", [b"", b"not a picture", square()[:40]])
def test_a_corrupt_picture_is_named(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"here\.png\b"):
        picture(content).load()


def test_a_bad_checksum_in_the_header_is_named() -> None:
    content = bytearray(square())
    content[20] ^= 255
    assert zlib.crc32(bytes(content[12:29])) != int.from_bytes(content[29:33], "big")
    for act in (lambda: picture(bytes(content)).size, picture(bytes(content)).load):
        with pytest.raises(ValueError, match=r"here.png"):
            act()


def test_the_digest_is_of_the_content(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes(square())
    first, second = (file_picture(tmp_path / f"{name}.png") for name in "ab")
    assert first.digest() == second.digest() == hashlib.sha256(square()).hexdigest()
    (tmp_path / "a.png").unlink()
    with pytest.raises(ValueError, match=r"a\.png\b.*(exist|found)"):
        first.digest()


# --- headers


def animated(kind: str) -> bytes:
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    return encoded(frames[0], kind, save_all=True, append_images=frames[1:])


@pytest.mark.parametrize(
    ("content", "animation", "transparent"),
    [
        (square(), False, False),
        (encoded(Image.new("RGBA", (4, 4))), False, True),
        (encoded(Image.new("P", (4, 4), 0), transparency=0), False, True),
        (animated("GIF"), True, False),
        (animated("PNG"), True, False),
        (animated("WEBP"), True, False),
        (animated("TIFF"), True, False),
        (animated("MPO"), False, False),  # a phone's photograph, with a second picture for depth or brightness
    ],
    ids=["rgb", "rgba", "key", "gif", "apng", "webp", "pages", "mpo"],
)
def test_the_header_tells_animation_and_transparency(content: bytes, animation: bool, transparent: bool) -> None:
    header = picture(content).header
    assert (header.size, header.animated, header.transparent) == ((4, 4), animation, transparent)


def test_of_several_frames_the_first_is_loaded() -> None:
    assert picture(animated("GIF")).load().getpixel((0, 0)) == RED


def test_a_header_is_read_once() -> None:
    opened = []
    counted = Picture("x", lambda: opened.append(1) or BytesIO(encoded(Image.new("RGB", (5, 4)), "JPEG")))  # type: ignore[func-returns-value]
    assert [counted.size, counted.size, counted.header.size] == [(5, 4)] * 3
    assert len(opened) == 1


def test_a_format_that_runs_another_program_is_not_opened() -> None:
    found = picture(encoded(Image.new("RGB", (16, 16)), "EPS"))
    for act in (lambda: found.size, found.load):
        with pytest.raises(BadPicture, match="formats PNG"):
            act()


# --- masks


def test_transparency_is_a_mask_of_the_turned_size() -> None:
    image = Image.new("RGBA", (6, 4), (255, 0, 0, 255))
    image.putpixel((0, 0), (0, 0, 0, 51))
    found = picture(encoded(image, exif=orientation(6)))
    mask = found.transparency()
    for pixels in (mask.load_mask(), mask.load().convert("L")):
        assert (pixels.mode, pixels.size, mask.size) == ("L", (4, 6), (4, 6))
        assert pixels.getpixel((3, 0)) == 51  # a quarter turn to the right
        assert sorted(pixels.getcolors()) == [(1, 51), (23, 255)]
    assert mask.digest() not in (found.digest(), hashlib.sha256(b"").hexdigest())
    assert "here.png" in mask.name
    assert mask.name != found.name


def test_a_picture_without_transparency_is_solid() -> None:
    assert picture(square("blue")).transparency().load_mask().getcolors() == [(16, 255)]


def test_a_picture_of_gray_is_a_mask_as_it_is() -> None:
    assert picture(encoded(Image.new("L", (4, 4), 77))).load_mask().getcolors() == [(16, 77)]
    assert picture(encoded(Image.new("1", (4, 4), 1))).load_mask().getcolors() == [(16, 255)]
    assert picture(encoded(Image.fromarray(np.full((4, 4), 65535, np.uint16)))).load_mask().getcolors() == [(16, 255)]


# --- names and reasons


def test_a_bad_picture_has_a_name_and_a_reason() -> None:
    with pytest.raises(BadPicture, match=r"here\.png\b.*empty.*0 bytes") as caught:
        picture(b"").load()
    assert caught.value.name == "here.png"
    assert "0 bytes" in caught.value.reason
    assert "here.png" not in caught.value.reason


def test_a_gigantic_picture_is_refused_by_its_header(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)
    for act in (lambda: picture(square()).size, picture(square()).load):
        with pytest.raises(BadPicture, match=r"here\.png\b.*\(16 pixels\) exceeds limit of 10 pixels.*bomb"):
            act()


def test_a_file_is_called_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(square())
    found = file_picture(tmp_path / "a.png")
    assert (found.name, found.load().getpixel((0, 0))) == (str(tmp_path / "a.png"), RED)
    with pytest.raises(BadPicture, match=r"gone\.png\b.*(exist|found)"):
        file_picture(tmp_path / "gone.png").digest()
