"""data.sources.pixels: colors as viewers show them, transparency of every depth, formats that are named."""

import ast
import io
import logging
from pathlib import Path

import numpy as np
import pytest
from image_helpers import COATED, DISPLAY_P3, GRAY_LINEAR, LIMITED, PROPHOTO, SRGB, png
from PIL import EpsImagePlugin, Image

from data.sources.images import SUFFIXES, Picture, file_picture
from data.sources.pixels import FORMATS

ROOT = Path(__file__).resolve().parents[3]
GREEN = (40, 170, 60)  # as a viewer shows it


def saved(image: Image.Image, kind: str = "PNG", **options: object) -> Picture:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return Picture("x.png", lambda: io.BytesIO(stream.getvalue()))


def srgb_of_lab(lightness: float, a: float, b: float) -> np.ndarray:
    """CIELAB (D50) as 8-bit sRGB, by the published formulas."""
    f = np.array([(lightness + 16) / 116 + a / 500, (lightness + 16) / 116, (lightness + 16) / 116 - b / 200])
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * (0.9642, 1, 0.8249)
    linear = np.array(
        [[3.1341359, -1.6173863, -0.4906620], [-0.9787955, 1.9162544, 0.0334427], [0.0719550, -0.2289768, 1.4053860]]
    )
    rgb = (linear @ xyz).clip(0, 1)
    return 255 * np.where(rgb <= 0.0031308, 12.92 * rgb, 1.055 * rgb ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize(
    ("profile", "numbers"),
    [(PROPHOTO, (89, 143, 66)), (DISPLAY_P3, (84, 168, 75)), (SRGB, GREEN), (None, GREEN)],
    ids=["prophoto", "p3", "srgb", "none"],
)
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_colors_are_those_that_a_viewer_shows(profile: bytes | None, numbers: tuple, mode: str) -> None:
    image = Image.new("RGB", (16, 16), numbers).convert(mode, palette=Image.Palette.ADAPTIVE)
    found = saved(image, icc_profile=profile).load()
    assert np.abs(np.subtract(found.getpixel((3, 3)), GREEN)).max() <= 1
    assert "icc_profile" not in found.info  # or it would be applied again


def test_an_srgb_profile_changes_no_pixel() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    assert saved(noise, icc_profile=SRGB).load().tobytes() == noise.tobytes()


def test_gray_and_cmyk_are_converted_by_their_profiles() -> None:
    half = saved(Image.new("L", (16, 16), 128), icc_profile=GRAY_LINEAR).load().getpixel((3, 3))
    assert np.abs(np.subtract(half, 188)).max() <= 1  # 0.5 in linear light
    deep = saved(Image.fromarray(np.full((16, 16), 32896, np.uint16)), icc_profile=GRAY_LINEAR).load()
    assert deep.getpixel((3, 3)) == half
    for inks, lab in (((255, 0, 0, 0), (55, -37, -50)), ((0, 255, 0, 0), (48, 74, -3)), ((0, 0, 0, 255), (16, 0, 0))):
        found = saved(Image.new("CMYK", (16, 16), inks), "TIFF", icc_profile=COATED).load().getpixel((3, 3))
        assert np.abs(np.subtract(found, srgb_of_lab(*lab))).max() <= 3
    plain = saved(Image.new("CMYK", (16, 16), (255, 0, 0, 0)), "TIFF").load().getpixel((3, 3))
    assert plain == (0, 255, 255)  # without a profile, as ever


def test_transparency_and_masks_are_not_changed_by_a_profile() -> None:
    image = Image.new("RGBA", (16, 16), (84, 168, 75, 51))
    picture = saved(image, icc_profile=DISPLAY_P3)
    assert picture.transparency().load_mask().getpixel((3, 3)) == 51
    expected = [round(0.2 * value + 0.8 * 255) for value in GREEN]
    assert np.abs(np.subtract(picture.load().getpixel((3, 3)), expected)).max() <= 1
    assert saved(Image.new("L", (16, 16), 128), icc_profile=GRAY_LINEAR).load_mask().getpixel((3, 3)) == 128


@pytest.mark.parametrize("profile", [COATED, DISPLAY_P3[:200], b"no profile"], ids=["cmyk", "cut", "garbage"])
def test_a_profile_that_cannot_be_applied_is_ignored_with_a_warning(
    profile: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    from data.sources import stated_colors

    stated_colors._named.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert saved(Image.new("RGB", (16, 16), GREEN), icc_profile=profile).load().getpixel((3, 3)) == GREEN
    assert len([record for record in caplog.records if "color profile" in record.message]) == 1


@pytest.mark.parametrize(("bits", "channels"), [(1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (8, 3), (16, 3)])
def test_the_transparent_color_of_a_png_is_white_at_every_depth(bits: int, channels: int) -> None:
    most, clear = 2**bits - 1, LIMITED[bits]
    content = png(bits, channels, [0, clear, most] if clear < most else [0, clear], clear=clear)
    picture = Picture("x.png", lambda: io.BytesIO(content))
    image, alpha = picture.load(), picture.transparency().load_mask()
    assert [image.getpixel((at, 3)) for at in (3, 20)] == [(0, 0, 0), (255, 255, 255)]
    assert [alpha.getpixel((at, 3)) for at in (3, 20)] == [255, 0]
    if clear < most:
        assert alpha.getpixel((40, 3)) == 255


def test_a_hidden_value_is_not_white() -> None:
    content = png(16, 1, [20000, 0], clear=0)
    image = Picture("x.png", lambda: io.BytesIO(content)).load()
    assert image.getpixel((3, 3)) == (78, 78, 78)
    assert image.getpixel((20, 3)) == (255, 255, 255)


# --- what is opened


def test_no_program_is_started_whatever_a_file_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flux2.generate.metadata import read
    from flux2.utils.images import read_image
    from train.utils.files import read_image as read_grid

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("Ghostscript was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", refuse)
    Image.init()  # all plugins, as other libraries register them
    for name in ("e.png", "e.tga", "e.jpg"):
        file = tmp_path / name
        Image.new("RGB", (32, 32)).save(file, "EPS")
        assert read_grid(file) is None
        for read_file in (
            lambda path: file_picture(path).load(),
            lambda path: file_picture(path).size,
            lambda path: read_image(path, "--image"),
            lambda path: read(path, "--from-image"),
        ):
            with pytest.raises(ValueError, match="formats PNG"):
                read_file(file)


def test_pillow_is_called_in_three_places_and_with_formats() -> None:
    """What opens a file goes through `open_image` of data.sources.pixels or flux2.utils.images; a server reads PNG."""
    calls = []
    for top in ("data", "flux2", "train"):
        for file in (ROOT / top).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Call) and ast.unparse(node.func) in ("Image.open", "PIL.Image.open"):
                    calls.append((str(file.relative_to(ROOT)), {keyword.arg for keyword in node.keywords}))
    assert {name for name, _ in calls} == {"data/sources/pixels.py", "flux2/serve/captions.py", "flux2/utils/images.py"}
    assert all("formats" in keywords for _, keywords in calls)


def test_every_ending_is_of_a_format_that_is_opened() -> None:
    Image.init()
    known = Image.registered_extensions()
    aliases = {".jif": "JPEG", ".mpo": "JPEG"}
    assert {aliases.get(ending, known.get(ending)) for ending in SUFFIXES} == set(FORMATS)
    assert {ending for ending, kind in known.items() if kind in FORMATS} <= SUFFIXES
