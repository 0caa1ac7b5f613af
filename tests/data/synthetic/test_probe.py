"""The probe: right on drawings and cards, clean or degraded; silent on what is no subject; and a measure of style."""

import random
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from data.synthetic.drawings import BACKGROUNDS, COLORS, INK, SHAPES, Drawing, all_drawings, draw
from data.synthetic.probe import read, style_components, style_distance
from data.synthetic.tarot import draw_card

ATTRIBUTES = ("shape", "color", "background", "size")
CUP = Drawing("cup", "red", "blue", "large")


def degraded(image: Image.Image, rng: np.random.Generator, blur: float = 1.2, noise: float = 8.0) -> Image.Image:
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(blur)), dtype=float)
    return Image.fromarray((pixels + rng.normal(0, noise, pixels.shape)).clip(0, 255).astype(np.uint8))


def wobbly(image: Image.Image, rng: np.random.Generator, amplitude: float = 2.5) -> Image.Image:
    """Displaced by a smooth random field, as a small model draws."""
    n = image.width
    fields = rng.normal(0, amplitude, (2, 8, 8)).astype(np.float32)
    dx, dy = (np.asarray(Image.fromarray(field).resize((n, n), Image.Resampling.BICUBIC)) for field in fields)
    y, x = np.mgrid[:n, :n]
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(1)))
    moved = pixels[(y + dy).round().astype(int).clip(0, n - 1), (x + dx).round().astype(int).clip(0, n - 1)]
    return Image.fromarray(moved)


def accuracy(count: int, change: Callable[[Image.Image, np.random.Generator], Image.Image]) -> dict[str, float]:
    rng, numpy_rng = random.Random(0), np.random.default_rng(0)
    right = dict.fromkeys(ATTRIBUTES, 0)
    for drawing in rng.choices(all_drawings(), k=count):
        dx, dy = rng.uniform(-0.03, 0.03), rng.uniform(-0.03, 0.03)
        picture = draw(drawing, 128, dx, dy, rng.uniform(0.94, 1.06), rng.uniform(-4, 4))
        reading = read(change(picture, numpy_rng))
        assert not reading.card
        for key in ATTRIBUTES:
            right[key] += getattr(reading, key) == getattr(drawing, key)
    return {key: value / count for key, value in right.items()}


def blob(rng: np.random.Generator, irregularity: float) -> Image.Image:
    """A filled and inked smooth outline that is no subject; an ellipse where `irregularity` is 0."""
    picture = Image.new("RGB", (128, 128), BACKGROUNDS["yellow"])
    t = np.linspace(0, 2 * np.pi, 90)
    waves = (np.cos(k * t + rng.uniform(0, 6)) * rng.normal(0, irregularity / k**0.5) for k in range(1, 5))
    r = rng.uniform(20, 40) * (1 + sum(waves))
    aspect = rng.uniform(0.6, 1.5)
    points = [
        (float(x), float(y)) for x, y in zip(64 + r * np.cos(t) * aspect, 64 + r * np.sin(t) / aspect, strict=True)
    ]
    canvas = ImageDraw.Draw(picture)
    canvas.polygon(points, list(COLORS.values())[rng.integers(10)])
    canvas.line(points, INK, 3)
    return picture


def some_or(many: int) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("count", [60, pytest.param(many, marks=pytest.mark.slow)])


@some_or(300)
def test_clean_drawings_with_jitter_are_read_right_in_every_attribute(count):
    assert min(accuracy(count, lambda picture, _: picture).values()) >= 0.995


@some_or(200)
def test_blurred_and_noisy_drawings_are_read_right(count):
    assert min(accuracy(count, degraded).values()) >= 0.97


def test_small_white_subjects_whose_blurred_outline_passes_the_color_of_the_background_are_read_right():
    rng = np.random.default_rng(0)
    for shape in SHAPES:
        for background in ("white", "grey"):
            reading = read(degraded(draw(Drawing(shape, "white", background, "small")), rng, 1.1))
            assert (reading.shape, reading.color, reading.background) == (shape, "white", background)


@some_or(120)
def test_wobbly_drawings_are_read_right(count):
    assert min(accuracy(count, wobbly).values()) >= 0.95


@pytest.mark.parametrize("shape", SHAPES)
def test_subject_and_color_are_read_right_on_every_card(shape):
    for number, color in enumerate(COLORS, start=15):
        reading = read(draw_card(shape, color, number, 128))
        assert (reading.shape, reading.color, reading.background, reading.card) == (shape, color, None, True)


def test_cards_at_256_pixels_and_degraded_cards_are_read_right():
    rng = np.random.default_rng(0)
    for i, shape in enumerate(SHAPES):
        color = list(COLORS)[i % 10]
        for picture in (draw_card(shape, color, 7, 256), degraded(draw_card(shape, color, 7, 128), rng)):
            reading = read(picture)
            assert (reading.shape, reading.color, reading.card) == (shape, color, True)


def test_drawings_at_256_pixels_are_read_right():
    reading = read(draw(CUP, 256))
    assert [getattr(reading, key) for key in ATTRIBUTES] == [getattr(CUP, key) for key in ATTRIBUTES]


@pytest.mark.parametrize("tint", [*BACKGROUNDS.values(), (0, 0, 0), (210, 40, 40)])
def test_an_empty_picture_shows_nothing(tint):
    reading = read(Image.new("RGB", (128, 128), tint))
    assert (reading.shape, reading.color, reading.size, reading.score) == (None, None, None, 0.0)
    assert reading.background == {rgb: name for name, rgb in BACKGROUNDS.items()}.get(tint)


@pytest.mark.parametrize("cells", [4, 16, 128])
def test_noise_coarse_or_fine_shows_no_subject(cells):
    rng = np.random.default_rng(0)
    for _ in range(20):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        reading = read(noise.resize((128, 128), Image.Resampling.BICUBIC))
        assert (reading.shape, reading.color, reading.size) == (None, None, None)


def test_ellipses_show_no_subject():
    rng = np.random.default_rng(1)
    assert [read(blob(rng, 0.0)).shape for _ in range(40)] == [None] * 40


def test_random_blobs_hardly_ever_show_a_subject():
    rng = np.random.default_rng(2)
    assert sum(read(blob(rng, 0.2)).shape is None for _ in range(100)) >= 96


def test_boxes_diamonds_and_blurred_discs_show_no_subject():
    pictures = []
    for corners in ([(30, 34), (98, 34), (98, 94), (30, 94)], [(64, 20), (110, 64), (64, 108), (18, 64)]):
        picture = Image.new("RGB", (128, 128), BACKGROUNDS["pink"])
        ImageDraw.Draw(picture).polygon(corners, COLORS["green"], INK, 3)
        pictures.append(picture)
    disc = Image.new("RGB", (128, 128), BACKGROUNDS["pink"])
    ImageDraw.Draw(disc).ellipse((30, 30, 98, 98), COLORS["green"], INK, 4)
    pictures.append(disc.filter(ImageFilter.GaussianBlur(4)))
    assert [read(picture).shape for picture in pictures] == [None, None, None]
    assert [read(picture).color for picture in pictures] == ["green", "green", "green"]


def test_specks_beside_the_subject_do_not_matter():
    picture = draw(Drawing("key", "blue", "white", "small"))
    ImageDraw.Draw(picture).rectangle((8, 8, 12, 12), INK)
    reading = read(picture)
    assert (reading.shape, reading.color, reading.size) == ("key", "blue", "small")


@pytest.mark.parametrize("pixels", [128, 256])
def test_real_cards_are_at_no_distance_from_the_style_whatever_they_show(pixels):
    for number, shape in enumerate(SHAPES, start=3):
        assert style_distance(draw_card(shape, "red", number, pixels)) < 0.5


def test_plain_drawings_are_far_from_the_style_in_every_component():
    for drawing in all_drawings()[::40]:
        picture = draw(drawing)
        assert style_distance(picture) > 120
        components = style_components(picture)
        assert components["frame"] > 150
        assert components["parchment"] > 40
        assert components["bars"] > 120


def test_components_see_their_own_region_only():
    card = np.asarray(draw_card("cup", "red", 3, 128)).copy()
    card[30:34, 16:30] = 0
    panel = style_components(Image.fromarray(card))
    assert panel["frame"] == panel["bars"] == 0
    assert panel["parchment"] > 3
    card[:9] = card[100:115, 14:40] = 255
    changed = style_components(Image.fromarray(card))
    assert changed["parchment"] == panel["parchment"]
    assert changed["frame"] > 10
    assert changed["bars"] > 10


def test_a_frame_without_a_subject_is_a_card_that_shows_nothing():
    empty = np.asarray(draw_card("cup", "red", 3, 128)).copy()
    empty[29:97, 12:116] = (218, 186, 130)
    reading = read(Image.fromarray(empty))
    assert (reading.shape, reading.color, reading.card) == (None, None, True)


def test_only_square_pictures_are_read():
    with pytest.raises(ValueError, match="64 x 32"):
        read(Image.new("RGB", (64, 32)))
