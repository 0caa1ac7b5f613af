"""data.sources.base: every kind of bad input is converted, or listed by name and reason and left out as far as
allowed.
"""

import logging
import re
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data_helpers import animation, color, encoded, lines, square, table, write
from PIL import Image

from data.sources.base import BadData, Source
from data.sources.captions import Captions
from data.sources.folders import Folder
from data.sources.images import BadPicture
from data.sources.tables import HuggingFace
from data.sources.webdataset import WebDataset

GRAY = (128, 128, 128)


def bomb(width: int = 20_000, height: int = 20_000) -> bytes:
    """A PNG of a few bytes that says that it has 400 million pixels."""
    header = b"IHDR" + struct.pack(">II", width, height) + bytes((8, 2, 0, 0, 0))
    content = square()
    return content[:8] + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + content[33:]


def one(content: bytes, name: str = "x.png") -> Callable[[Path], Source]:
    """A source of one picture, beside two good ones, with as many bad ones allowed as there are."""

    def make(folder: Path, **settings: object) -> Source:
        write(folder, {name: content, "a.png": square(), "b.png": square("lime")})
        return Folder(folder, prompt="x", **settings)  # type: ignore[arg-type]

    return make


def metadata(*rows: dict) -> Callable[[Path], Source]:
    def make(folder: Path, **settings: object) -> Source:
        good = [{"file_name": name, "text": name} for name in ("a.png", "b.png")]
        write(folder, {"a.png": square(), "b.png": square("lime"), "metadata.jsonl": lines(*good, *rows)})
        return Folder(folder, **settings)  # type: ignore[arg-type]

    return make


def sidecar(**files: str | bytes) -> Callable[[Path], Source]:
    def make(folder: Path, **settings: object) -> Source:
        good: dict = {"a.png": square(), "a.txt": "a", "b.png": square("lime"), "b.txt": "b"}
        write(folder, good | {name.replace("_", "."): content for name, content in files.items()})
        return Folder(folder, **settings)  # type: ignore[arg-type]

    return make


def pixels16() -> bytes:
    return encoded(Image.fromarray(np.full((16, 16), 128 * 257, np.uint16)))


# what is right to convert: the middle pixel that comes out
CONVERTED = {
    "cmyk jpeg": (one(encoded(Image.new("CMYK", (16, 16), (0, 0, 0, 127)), "JPEG"), "x.jpg"), GRAY),
    "cmyk tiff": (one(encoded(Image.new("CMYK", (16, 16), (0, 0, 0, 127)), "TIFF"), "x.tif"), GRAY),
    "16 bits": (one(pixels16()), GRAY),
    "palette": (one(encoded(Image.new("RGB", (16, 16), GRAY).quantize())), GRAY),
    "palette with a clear color": (
        one(encoded(Image.frombytes("P", (16, 16), b"\1" + bytes(255)), transparency=0)),
        (255, 255, 255),
    ),
    "one bit": (one(encoded(Image.new("1", (16, 16), 1))), (255, 255, 255)),
    "another format than its name says": (one(square("#808080", kind="BMP")), GRAY),
    "one frame": (one(square("#808080", kind="GIF"), "x.gif"), GRAY),
}

# what is not: the reason that is said
BAD = {
    "unreadable": (one(b"not a picture"), r"x\.png\b.*damaged, or in none of the formats"),
    "postscript": (one(b"%!PS-Adobe-3.0 EPSF-3.0\n"), r"x\.png\b.*formats PNG"),
    "damaged header": (one(square()[:20]), r"x\.png\b"),
    "empty": (one(b""), r"x\.png\b.*empty.*0 bytes"),
    "gigantic": (one(bomb()), r"x\.png\b.*DecompressionBombError: .*400000000 pixels\) exceeds limit"),
    "animated gif": (one(animation(), "x.gif"), r"x\.gif\b.*frames.*dataset\.first_frame=true"),
    "animated webp": (one(animation("WEBP"), "x.webp"), r"x\.webp\b.*frames"),
    "one pixel": (one(square(side=1)), r"x\.png\b.*1 x 1 pixels.*\b16\b"),
    "a line": (one(encoded(Image.new("RGB", (100, 15)))), r"x\.png\b.*100 x 15 pixels.*\b16\b"),
    "32 bits": (one(encoded(Image.new("F", (16, 16)), "TIFF"), "x.tif"), r"x\.tif\b.*mode F\b"),
    "a format of phones": (one(b"x", "x.heic"), r"x\.heic\b.*Pillow"),
    "outside the folder": (metadata({"file_name": "../x.png", "text": "x"}), r"line 3\b.*'\.\./x\.png'.* /"),
    "a reference outside": (
        metadata({"file_name": "a.png", "text": "x", "references": ["/etc/passwd"]}),
        r"line 3\b.*'/etc/passwd'.* /",
    ),
    "missing": (metadata({"file_name": "x.png", "text": "x"}), r"x\.png\b.*(exist|found)"),
    "a missing reference": (
        metadata({"file_name": "a.png", "text": "x", "references": ["x.png"]}),
        r"a\.png\b.*x\.png\b.*(exist|found)",
    ),
    "too many references": (
        metadata({"file_name": "a.png", "text": "x", "references": ["a.png"] * 11}),
        r"a\.png\b.*11 references.*\b10\b",
    ),
    "a missing column": (metadata({"file_name": "a.png"}), r"line 3\b.*'text'.*file_name"),
    "an empty caption": (sidecar(x_png=square(), x_txt=" \n"), r"x\.png\b.*empty.*captions\.allow_empty"),
    "no caption": (sidecar(x_png=square()), r"x\.png\b.*caption.*\bx\.txt\b"),
    "a duplicate line": (metadata({"file_name": "a.png", "text": "a.png"}), r"a\.png\b.*duplicate"),
    "duplicate names": (
        sidecar(x_png=square(), x_webp=square(), x_txt="x"),
        r"x\.png\b.*caption.*x\.webp\b.*\n.*x\.webp\b.*x\.png\b",
    ),
}


@pytest.mark.parametrize(("make", "expected"), CONVERTED.values(), ids=CONVERTED)
def test_what_can_be_converted_is(tmp_path: Path, make: Callable, expected: tuple) -> None:
    samples = make(tmp_path)
    assert (len(samples), samples.bad) == (3, [])
    assert np.abs(np.subtract(color(samples[2].target), expected)).max() <= 1


@pytest.mark.parametrize(("make", "reason"), BAD.values(), ids=BAD)
def test_bad_input_is_listed_and_left_out_as_far_as_allowed(
    tmp_path: Path, make: Callable, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(BadData, match=reason) as caught:
        make(tmp_path)
    message = str(caught.value)
    bad = message.count("\n  ")
    assert bad > 0
    first, *listed, last = message.splitlines()
    assert re.search(rf"\b{bad} of {2 + bad} samples\b.* {tmp_path}\b", first)
    assert len(listed) == bad
    assert re.search(rf"dataset\.max_bad={bad}\b", last)
    assert "Traceback" not in message
    assert "object at 0x" not in message
    caplog.set_level(logging.WARNING)
    samples = make(tmp_path, max_bad=bad)
    assert [Path(sample.name).name for sample in samples] == ["a.png", "b.png"]
    assert len(samples.bad) == bad
    assert re.match(rf".*\b{bad} of {2 + bad} samples\b.* {tmp_path}\b", caplog.messages[-1])
    assert caplog.messages[-1].count("\n  ") == bad


def test_the_whole_list_is_shown(tmp_path: Path) -> None:
    write(tmp_path, {f"{number:02}.png": b"" for number in range(40)} | {"good.png": square()})
    with pytest.raises(BadData) as caught:
        Folder(tmp_path, prompt="x", max_bad=39)
    assert str(caught.value).count("empty") == 40
    assert len(Folder(tmp_path, prompt="x", max_bad=40)) == 1


@pytest.mark.parametrize("max_bad", [0, 9])
def test_no_usable_sample_is_an_error_whatever_is_allowed(tmp_path: Path, max_bad: int) -> None:
    write(tmp_path, {"a.png": b"", "b.png": b"x"})
    expected = "2 of 2 samples" if max_bad == 0 else rf"{tmp_path}\b.*:\n  .*a\.png\b"
    with pytest.raises(BadData, match=expected) as error:
        Folder(tmp_path, prompt="x", max_bad=max_bad)
    assert "max_bad" not in str(error.value)  # which would leave nothing to train on


def test_the_first_frame_is_taken_if_asked(tmp_path: Path) -> None:
    (sample,) = Folder(write(tmp_path, {"a.gif": animation()}), prompt="x", first_frame=True)
    assert color(sample.target) == (255, 0, 0)


def test_bad_rows_and_shards_come_to_the_same_list(tmp_path: Path) -> None:
    path = table(tmp_path / "t.parquet", image=[square(), b"", square(side=1)], caption=["x", "y", None])
    reasons = [bad.reason for bad in HuggingFace(path, max_bad=2).bad]
    assert len(reasons) == 2
    assert re.search("empty.*0 bytes", reasons[0])
    assert re.search("'caption'.*null", reasons[1])
    write(tmp_path, {"s.tar": b"no tar"})
    with pytest.raises(BadData, match=r"s\.tar\b"):
        WebDataset(tmp_path / "s.tar", max_bad=1)


def test_what_only_the_decoder_finds_comes_to_the_list_later(tmp_path: Path) -> None:
    content = encoded(Image.effect_noise((64, 64), 90))
    write(tmp_path, {"a.png": square(), "b.png": content[: len(content) // 2], "c.png": square(), "d.png": b""})
    samples = Folder(tmp_path, prompt="x", max_bad=2)
    assert len(samples) == 3
    with pytest.raises(BadPicture) as caught:
        samples[1].target.load()
    samples.leave_out({1: caught.value.reason})
    assert [Path(sample.name).name for sample in samples] == ["a.png", "c.png"]
    assert [Path(bad.name).name for bad in samples.bad] == ["d.png", "b.png"]
    with pytest.raises(BadData, match=r"3 of 4 samples (?s:.*)b\.png\b.*OSError(?s:.*)c\.png\b.*is bad"):
        samples.leave_out({1: "is bad"})


# --- masks


def test_transparency_becomes_a_mask_on_request_where_there_is_any(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (32, 16), (255, 0, 0, 255))
    clear.putalpha(Image.linear_gradient("L").resize((32, 16)))
    samples = Folder(write(tmp_path, {"a.png": encoded(clear), "b.png": square()}), prompt="x", mask="alpha")
    mask = samples[0].mask
    assert mask is not None
    assert (mask.size, mask.load_mask().mode, samples[1].mask) == ((32, 16), "L", None)
    assert list(mask.load_mask().get_flattened_data()) == list(clear.getchannel("A").get_flattened_data())
    assert Folder(tmp_path, prompt="x")[0].mask is None


def test_a_mask_has_the_size_of_its_picture_as_it_is_turned(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6
    picture = encoded(Image.new("RGB", (32, 16)), exif=exif)
    write(tmp_path, {"a.png": picture, "masks/a.png": encoded(Image.new("L", (16, 32)))})
    mask = Folder(tmp_path, prompt="x", mask="masks")[0].mask
    assert mask is not None
    assert mask.size == (16, 32)
    write(tmp_path, {"masks/a.png": encoded(Image.new("L", (32, 16)))})
    with pytest.raises(BadData, match=r"a\.png\b.*masks/a\.png\b.*32 x 16.*16 x 32"):
        Folder(tmp_path, prompt="x", mask="masks")
    write(tmp_path, {"masks/a.png": b""})
    with pytest.raises(BadData, match=r"a\.png\b.*masks/a\.png\b.*empty"):
        Folder(tmp_path, prompt="x", mask="masks")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_bad": -1}, r"dataset\.max_bad=-1\b"),
        ({"max_bad": True}, r"dataset\.max_bad=True\b"),
        ({"first_frame": 1}, r"dataset\.first_frame=1\b"),
        ({"captions": {"trigger": "x"}}, r"dataset\.captions=.*Captions"),
        ({"mask": ""}, r"dataset\.mask=''"),
    ],
)
def test_a_setting_that_cannot_be_is_an_error(tmp_path: Path, settings: dict, message: str) -> None:
    write(tmp_path, {"a.png": square()})
    with pytest.raises(ValueError, match=message):
        Folder(tmp_path, prompt="x", **settings)


def test_captions_are_prepared_by_every_source(tmp_path: Path) -> None:
    captions = Captions(trigger="trtcrd", template="a card of {caption}", shuffle_tags=2)
    write(tmp_path, {"a.png": square()})
    assert Folder(tmp_path, prompt="cup", captions=captions)[0].captions == ("trtcrd, a card of cup",)
    assert HuggingFace(table(tmp_path / "t.parquet"), captions=captions)[0].caption == "trtcrd, a card of a red square"
