"""flux2.utils.images: files are read as training reads them, and what cannot be written is known beforehand."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from image_helpers import COATED, DISPLAY_P3, GRAY_LINEAR, LIMITED, PROPHOTO, gray_tiff, png
from PIL import Image

from data.sources.images import Picture
from flux2.models.pixels import reference_image
from flux2.utils.images import as_rgb, check_target_file, check_writable, read_image

RAMP = np.random.default_rng(0).integers(0, 256, (20, 24, 4), dtype=np.uint8)
DEEP = np.random.default_rng(1).integers(0, 65536, (20, 24), dtype=np.uint16)
COLOR = Image.fromarray(RAMP[..., :3].copy())


def turned(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[274] = value
    return exif


KINDS: dict[str, Callable[[Path], None]] = {
    "rgb.png": COLOR.save,
    "rgb.jpg": COLOR.save,
    "rgb.webp": COLOR.save,
    "rgba.png": Image.fromarray(RAMP).save,
    "rgba.tiff": Image.fromarray(RAMP).save,
    "rgba.webp": lambda path: Image.fromarray(RAMP).save(path, lossless=True),
    "clear.png": Image.new("RGBA", (24, 20), (0, 0, 0, 0)).save,
    "la.png": Image.fromarray(RAMP[..., :2].copy(), "LA").save,
    "key.png": lambda path: COLOR.save(path, transparency=tuple(int(v) for v in RAMP[0, 0, :3])),
    "palette.gif": lambda path: COLOR.convert("P").save(path, transparency=3),
    "palette.png": COLOR.convert("P").save,
    "grey.png": COLOR.convert("L").save,
    "bits.png": COLOR.convert("1").save,
    "cmyk.jpg": COLOR.convert("CMYK").save,
    "lab.tiff": Image.frombytes("LAB", (24, 20), RAMP[..., :3].tobytes()).save,
    "deep.png": Image.fromarray(DEEP).save,
    "deep.tiff": Image.fromarray(DEEP).save,
    "deep_big_endian.tiff": Image.fromarray(DEEP.astype(">u2")).save,
    "gray12.tiff": lambda path: path.write_bytes(gray_tiff(12, [0, 9, 2048, 4095])),  # type: ignore[dict-item, return-value]
    "inverted16.tiff": lambda path: path.write_bytes(gray_tiff(16, [0, 129, 3000, 65535], True)),  # type: ignore[dict-item, return-value]
    "turned.jpg": lambda path: COLOR.save(path, exif=turned(6)),
    "turned.png": lambda path: Image.fromarray(RAMP).save(path, exif=turned(8)),
    "turned.tiff": lambda path: COLOR.save(path, exif=turned(5)),
    "p3.jpg": lambda path: COLOR.save(path, icc_profile=DISPLAY_P3),
    "p3_clear.png": lambda path: Image.fromarray(RAMP).save(path, icc_profile=DISPLAY_P3),
    "prophoto_palette.png": lambda path: COLOR.convert("P").save(path, icc_profile=PROPHOTO),
    "gray_profile.png": lambda path: COLOR.convert("L").save(path, icc_profile=GRAY_LINEAR),
    "gray_p3.jpg": lambda path: COLOR.convert("L").save(path, icc_profile=DISPLAY_P3),
    "la_profile.tiff": lambda path: Image.fromarray(RAMP[..., :2].copy(), "LA").save(path, icc_profile=GRAY_LINEAR),
    "deep_profile.png": lambda path: Image.fromarray(DEEP).save(path, icc_profile=GRAY_LINEAR),
    "cmyk_profile.jpg": lambda path: COLOR.convert("CMYK").save(path, icc_profile=COATED),
    "wrong_profile.png": lambda path: COLOR.save(path, icc_profile=COATED),
    "damaged_profile.png": lambda path: COLOR.save(path, icc_profile=DISPLAY_P3[:200]),
    "jpeg2000.jp2": COLOR.save,
    "targa.tga": COLOR.save,
    **{
        f"key_{bits}_{channels}.png": lambda path, bits=bits, channels=channels: path.write_bytes(
            png(bits, channels, [0, LIMITED[bits], 2**bits - 1], clear=LIMITED[bits])
        )
        for bits, channels in ((1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (8, 3), (16, 3))
    },
    "whole.tiff": Image.fromarray(DEEP.astype(np.int32)).save,
    "float.tiff": Image.fromarray(DEEP.astype(np.float32)).save,
    "no.png": lambda path: path.write_text("no picture"),  # type: ignore[dict-item, return-value]
}
REFUSED = {"clear.png", "whole.tiff", "float.tiff", "no.png"}


@pytest.mark.parametrize("name", KINDS)
def test_a_file_gives_the_same_pixels_as_in_training_or_is_refused_by_both(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    KINDS[name](path)
    training = Picture(name, lambda: path.open("rb"))
    if name in REFUSED:
        for act in (training.load, lambda: read_image(path, f"--image {name}")):
            with pytest.raises(ValueError, match=re.escape(name)):
                act()
        return
    wanted, ours = training.load(), read_image(path, "--image")
    assert ours.mode == wanted.mode == "RGB"
    assert ours.size == wanted.size
    assert (np.asarray(ours) == np.asarray(wanted)).all()
    with Image.open(path) as opened:
        assert (np.asarray(reference_image(opened, 10**6)) == np.asarray(reference_image(wanted, 10**6))).all()


def test_clear_is_white_and_all_of_sixteen_bits_count() -> None:
    image = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    image.putpixel((1, 1), (0, 0, 0, 255))
    assert as_rgb(image).getpixel((0, 0)) == (255, 255, 255)
    levels = np.array([[0, 128, 129, 32896, 65406, 65407, 65535]], dtype=np.uint16)
    assert np.asarray(as_rgb(Image.fromarray(levels)))[0, :, 0].tolist() == [0, 0, 1, 128, 254, 255, 255]


@pytest.mark.parametrize(
    ("bits", "zero_is_white", "levels"),
    [(12, False, [0, 1, 128, 255]), (16, False, [0, 1, 128, 255]), (16, True, [255, 254, 127, 0])],
)
def test_gray_of_a_tiff_is_scaled_and_inverted_as_its_tags_say(
    bits: int, zero_is_white: bool, levels: list[int], tmp_path: Path
) -> None:
    path, white = tmp_path / "x.tiff", 2**bits - 1
    path.write_bytes(gray_tiff(bits, [0, round(white / 255), round(white * 128 / 255), white], zero_is_white))
    training = Picture("x.tiff", lambda: path.open("rb"))
    for found in (training.load(), training.load_mask().convert("RGB"), read_image(path, "--image")):
        assert np.asarray(found)[5, ::16, 0].tolist() == levels


def test_a_decompression_bomb_is_an_error_in_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bomb.png"
    COLOR.save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for act in (Picture("bomb.png", lambda: path.open("rb")).load, lambda: read_image(path, "--image bomb.png")):
        with pytest.raises(ValueError, match=r"bomb\.png\b.*decompression bomb"):
            act()


def test_an_error_names_the_file_and_no_stream(tmp_path: Path) -> None:
    (tmp_path / "no.png").write_text("no picture")
    with pytest.raises(
        ValueError, match=r"--image x\b((?!no\.png|BytesIO|0x).)*formats PNG((?!no\.png|BytesIO|0x).)*$"
    ):
        read_image(tmp_path / "no.png", "--image x")
    with pytest.raises(ValueError, match=r"--image y\b"):
        read_image(tmp_path, "--image y")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.txt", r"\.png"),
        ("a", r"\.png"),
        ("a.psd", r"\.psd\b.*\.png\b"),
        ("a.xbm", r"\.xbm\b.*\.png\b"),
        ("a.h5", r"\.h5\b.*\.png\b"),
        ("folder.png", "folder"),
        ("file/new/a.png", r"/file\b.*folder"),
    ],
)
def test_what_cannot_be_written_is_told_before(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=rf"^--out x.*{message}"):
        check_writable(tmp_path / name, "--out x")
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["a.png", "a.JPG", "a.webp", "new/folder/a.tiff"])
def test_usual_formats_can_be_written_into_folders_that_are_made_later(name: str, tmp_path: Path) -> None:
    check_writable(tmp_path / name, "--out")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_may_not_be_written_to_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_: False)  # as root, nothing is read-only
    with pytest.raises(ValueError, match=rf"--out\b.*{tmp_path}"):
        check_writable(tmp_path / "a.png", "--out")


def test_a_file_that_is_replaced_needs_a_folder_that_can_be_written(monkeypatch, tmp_path):
    file = tmp_path / "x.png"
    file.touch()
    monkeypatch.setattr("os.access", lambda path, mode: path != file)
    check_target_file(file, "--out")
    with pytest.raises(ValueError, match="read-only"):  # an image is replaced only if it may be written itself
        check_writable(file, "--out")
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    for check in (check_target_file, check_writable):
        with pytest.raises(ValueError, match="read-only"):
            check(file, "--out")
