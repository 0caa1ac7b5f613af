"""data.synthetic.recognize: every drawing is told from every other, plain and lit, also when it is a little off."""

import numpy as np
import pytest
from PIL import Image, ImageFilter

from data.synthetic import recognize as recognition
from data.synthetic.drawings import all_drawings, draw
from data.synthetic.recognize import difference, recognize
from data.synthetic.spotlight import new_drawings, spotlight

# alike in every way: of all subjects, in all sizes, but in few colors
ALIKE = [
    drawing
    for drawing in all_drawings()
    if drawing.color in ("red", "orange", "brown") and drawing.background in ("white", "grey")
]


@pytest.fixture(params=["alike", pytest.param("all", marks=pytest.mark.slow)])
def drawings(request, monkeypatch):
    """What is shown, of all drawings or, as to draw all takes seconds, of some that are alike."""
    if request.param == "all":
        yield [*new_drawings(), *all_drawings()[::37]]
        return
    recognition._candidates.cache_clear()
    monkeypatch.setattr(recognition, "all_drawings", lambda: ALIKE)
    yield ALIKE[::5]
    recognition._candidates.cache_clear()


def test_every_drawing_is_recognized_plain_and_lit(drawings):
    plain = [draw(drawing) for drawing in drawings]
    lit = [spotlight(picture) for picture in plain]
    for pictures, light in ((plain, False), (lit, True)):
        found = recognize(pictures)
        assert [one.drawing for one in found] == drawings
        assert all(one.lit == light for one in found)
        assert max(one.distance for one in found) < 4


@pytest.mark.parametrize("light", [False, True])
def test_drawings_that_are_blurred_noisy_and_a_little_off_are_recognized(drawings, light):
    rng = np.random.default_rng(0)
    pictures = []
    for drawing in drawings:
        picture = draw(drawing, dx=0.01, dy=-0.01, scale=1.03, angle=2.0)
        picture = (spotlight(picture) if light else picture).filter(ImageFilter.GaussianBlur(1))
        noisy = np.asarray(picture) + rng.normal(0, 12, (128, 128, 3))
        pictures.append(Image.fromarray(noisy.clip(0, 255).astype(np.uint8)))
    found = recognize(pictures)
    right = [one.drawing == drawing and one.lit == light for one, drawing in zip(found, drawings, strict=True)]
    assert np.mean(right) >= 0.95


def test_the_difference_is_the_mean_distance_of_the_colors():
    white, black = Image.new("RGB", (64, 64), "white"), Image.new("RGB", (128, 128), "black")
    assert difference(white, white) == 0
    assert difference(white, black) == difference(black, white) == pytest.approx(255 * 3**0.5, rel=1e-5)
    half = white.copy()
    half.paste((0, 0, 0), (0, 0, 64, 32))
    assert difference(half, white) == pytest.approx(255 * 3**0.5 / 2, rel=1e-5)


@pytest.mark.parametrize("size", [(64, 32), (100, 100)])
def test_what_is_no_square_of_a_fitting_size_is_refused(size):
    with pytest.raises(ValueError, match=rf"{size[0]} x {size[1]}\b.*\b32\b"):
        recognize([Image.new("RGB", size)])
