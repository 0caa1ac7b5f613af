"""data.sources.base: every kind of bad input is converted, or listed by name and reason and left out as far as
allowed.
"""

import logging
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
    "palette with a clear color": (one(encoded(Image.new("P", (16, 16), 0), transparency=0)), (255, 255, 255)),
    "one bit": (one(encoded(Image.new("1", (16, 16), 1))), (255, 255, 255)),
    "another format than its name says": (one(square("#808080", kind="BMP")), GRAY),
    "one frame": (one(square("#808080", kind="GIF"), "x.gif"), GRAY),
}

# what is not: the reason that is said
BAD = {
    "unreadable": (one(b"not a picture"), r"x.png cannot be read \(UnidentifiedImageError: cannot identify"),
    "postscript": (one(b"%!PS-Adobe-3.0 EPSF-3.0\n"), r"x.png cannot be read \(UnidentifiedImageError"),
    "damaged header": (one(square()[:20]), r"x.png cannot be read"),
    "empty": (one(b""), r"x.png cannot be read \(it is empty: 0 bytes\)"),
    "gigantic": (one(bomb()), r"x.png cannot be read \(DecompressionBombError: .*400000000 pixels\) exceeds limit"),
    "animated gif": (
        one(animation(), "x.gif"),
        "x.gif has several frames: set dataset.first_frame=true to use the first",
    ),
    "animated webp": (one(animation("WEBP"), "x.webp"), "x.webp has several frames"),
    "one pixel": (one(square(side=1)), "x.png has 1 x 1 pixels: each side must have at least 16"),
    "a line": (one(encoded(Image.new("RGB", (100, 15)))), "x.png has 100 x 15 pixels: each side must have at least 16"),
    "32 bits": (
        one(encoded(Image.new("F", (16, 16)), "TIFF"), "x.tif"),
        "x.tif has mode F, which has no defined white",
    ),
    "a format of phones": (one(b"x", "x.heic"), "x.heic has a format that Pillow cannot read: convert it"),
    "outside the folder": (
        metadata({"file_name": "../x.png", "text": "x"}),
        "line 3 names '../x.png', which is not in .*: files must be inside the folder",
    ),
    "a reference outside": (
        metadata({"file_name": "a.png", "text": "x", "references": ["/etc/passwd"]}),
        "line 3 names '/etc/passwd', which is not in",
    ),
    "missing": (metadata({"file_name": "x.png", "text": "x"}), "x.png does not exist"),
    "a missing reference": (
        metadata({"file_name": "a.png", "text": "x", "references": ["x.png"]}),
        "a.png has .*x.png, which does not exist",
    ),
    "too many references": (
        metadata({"file_name": "a.png", "text": "x", "references": ["a.png"] * 11}),
        "a.png has 11 references: at most 10 are allowed",
    ),
    "a missing column": (metadata({"file_name": "a.png"}), "line 3 has no column 'text'; it has: file_name"),
    "an empty caption": (sidecar(x_png=square(), x_txt=" \n"), "x.png has an empty caption: write one, or allow"),
    "no caption": (sidecar(x_png=square()), "x.png has no caption: write x.txt or"),
    "a duplicate line": (metadata({"file_name": "a.png", "text": "a.png"}), "a.png is a duplicate, with the same"),
    "duplicate names": (
        sidecar(x_png=square(), x_webp=square(), x_txt="x"),
        r"x.png shares its name.* with x.webp.*\n.*x.webp shares its name.* with x.png",
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
    assert message.startswith(f"{bad} of {2 + bad} samples of {tmp_path} cannot be used:\n  ")
    assert message.endswith(f"\nFix or remove them, or skip them with dataset.max_bad={bad} (now 0)")
    assert "Traceback" not in message
    assert "object at 0x" not in message
    caplog.set_level(logging.WARNING)
    samples = make(tmp_path, max_bad=bad)
    assert [Path(sample.name).name for sample in samples] == ["a.png", "b.png"]
    assert len(samples.bad) == bad
    assert caplog.messages[-1].startswith(f"{bad} of {2 + bad} samples of {tmp_path} are skipped:\n  ")


def test_the_whole_list_is_shown(tmp_path: Path) -> None:
    write(tmp_path, {f"{number:02}.png": b"" for number in range(40)} | {"good.png": square()})
    with pytest.raises(BadData) as caught:
        Folder(tmp_path, prompt="x", max_bad=39)
    assert str(caught.value).count("it is empty") == 40
    assert len(Folder(tmp_path, prompt="x", max_bad=40)) == 1


@pytest.mark.parametrize("max_bad", [0, 9])
def test_no_usable_sample_is_an_error_whatever_is_allowed(tmp_path: Path, max_bad: int) -> None:
    write(tmp_path, {"a.png": b"", "b.png": b"x"})
    expected = "2 of 2 samples" if max_bad == 0 else "has no sample that can be used:\n  .*a.png cannot be read"
    with pytest.raises(BadData, match=expected):
        Folder(tmp_path, prompt="x", max_bad=max_bad)


def test_the_first_frame_is_taken_if_asked(tmp_path: Path) -> None:
    (sample,) = Folder(write(tmp_path, {"a.gif": animation()}), prompt="x", first_frame=True)
    assert color(sample.target) == (255, 0, 0)


def test_bad_rows_and_shards_come_to_the_same_list(tmp_path: Path) -> None:
    path = table(tmp_path / "t.parquet", image=[square(), b"", square(side=1)], caption=["x", "y", None])
    reasons = [bad.reason for bad in HuggingFace(path, max_bad=2).bad]
    assert reasons == ["cannot be read (it is empty: 0 bytes)", "has no caption in 'caption': null"]
    write(tmp_path, {"s.tar": b"no tar"})
    with pytest.raises(BadData, match="has no sample that can be used"):
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
    with pytest.raises(BadData, match=r"3 of 4 samples (?s:.*)b.png cannot be read \(OSError(?s:.*)c.png is bad"):
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
    with pytest.raises(BadData, match=r"a.png has the mask .*masks/a.png of 32 x 16 pixels for an image of 16 x 32"):
        Folder(tmp_path, prompt="x", mask="masks")
    write(tmp_path, {"masks/a.png": b""})
    with pytest.raises(BadData, match=r"a.png has .*masks/a.png, which cannot be read \(it is empty"):
        Folder(tmp_path, prompt="x", mask="masks")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_bad": -1}, "dataset.max_bad=-1 must be an integer >= 0"),
        ({"max_bad": True}, "dataset.max_bad=True must be"),
        ({"first_frame": 1}, "dataset.first_frame=1 must be true or false"),
        ({"captions": {"trigger": "x"}}, "dataset.captions=.* must be made by data.sources.captions.Captions"),
        ({"mask": ""}, "dataset.mask=''"),
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
