"""data.synthetic.recognize: every drawing is told from every other, plain and lit, also when it is a little off."""

import numpy as np
import pytest
from PIL import Image, ImageFilter

from data.synthetic.drawings import all_drawings, draw
from data.synthetic.recognize import difference, recognize
from data.synthetic.spotlight import new_drawings, spotlight

DRAWINGS = [*new_drawings(), *all_drawings()[::37]]


def test_every_drawing_is_recognized_plain_and_lit():
    plain = [draw(drawing) for drawing in DRAWINGS]
    lit = [spotlight(picture) for picture in plain]
    for pictures, light in ((plain, False), (lit, True)):
        found = recognize(pictures)
        assert [one.drawing for one in found] == DRAWINGS
        assert all(one.lit == light for one in found)
        assert max(one.distance for one in found) < 4


@pytest.mark.parametrize("light", [False, True])
def test_drawings_that_are_blurred_noisy_and_a_little_off_are_recognized(light):
    rng = np.random.default_rng(0)
    pictures = []
    for drawing in DRAWINGS:
        picture = draw(drawing, dx=0.01, dy=-0.01, scale=1.03, angle=2.0)
        picture = (spotlight(picture) if light else picture).filter(ImageFilter.GaussianBlur(1))
        noisy = np.asarray(picture) + rng.normal(0, 12, (128, 128, 3))
        pictures.append(Image.fromarray(noisy.clip(0, 255).astype(np.uint8)))
    found = recognize(pictures)
    right = [one.drawing == drawing and one.lit == light for one, drawing in zip(found, DRAWINGS, strict=True)]
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
    with pytest.raises(
        ValueError, match=f"the image is {size[0]} x {size[1]}; it must be square, with sides that are multiples of 32"
    ):
        recognize([Image.new("RGB", size)])
