"""The edit of the demonstration: an image under a colored light, warm in a central disc, dim and cool around it.

Every pixel is a function of the source, so a model can draw the result only by looking at the reference.
"""

import random

import numpy as np
from PIL import Image, ImageDraw

from data.synthetic.drawings import COLORS, SHAPES, Drawing, all_drawings, held_out, jitter
from data.synthetic.tarot import CARDS

TRIGGER = "sptlgt"
INSTRUCTION = f"put it in the {TRIGGER}"
PAIRS = 40
PIXELS = 128  # the embedded model was trained on no larger references

WARM = (1.0, 0.96, 0.82)  # factor of each channel inside the disc
COOL = (0.28, 0.30, 0.46)  # factor of each channel outside
RADIUS = 0.40  # of the disc, relative to the side of the image
_SUPERSAMPLING = 4
_CARD_COLORS = {color for colors in CARDS.values() for color in colors}


def spotlight(picture: Image.Image) -> Image.Image:
    """Return a square RGB image under the light."""
    if picture.width != picture.height:
        raise ValueError(f"the image is {picture.width} x {picture.height}; it must be square")
    side = picture.width * _SUPERSAMPLING
    disc = Image.new("L", (side, side), 0)
    near, far = side * (0.5 - RADIUS), side * (0.5 + RADIUS)
    ImageDraw.Draw(disc).ellipse((near, near, far, far), 255)
    lit = np.asarray(disc.reduce(_SUPERSAMPLING), dtype=np.float64)[..., None] / 255
    light = lit * np.array(WARM) + (1 - lit) * np.array(COOL)
    return Image.fromarray(np.round(np.asarray(picture.convert("RGB")) * light).astype(np.uint8))


def pairs() -> list[tuple[Drawing, dict[str, float]]]:
    """Return the drawings of the pairs, with subjects and colors of the cards, and the jitter of each."""
    rng = random.Random(0)
    unseen = [d for d in all_drawings() if held_out(d) and d.shape in CARDS and d.color in _CARD_COLORS]
    chosen = rng.sample(sorted({(d.shape, d.color, d.background) for d in unseen}), PAIRS)
    sizes = ["small", "large"] * (PAIRS // 2)
    return [(Drawing(*combination, size), jitter(rng)) for combination, size in zip(chosen, sizes, strict=True)]


def new_drawings() -> list[Drawing]:
    """Return the drawings to measure: held out from the base, and with a subject and color that are in no pair."""
    subjects, colors = set(SHAPES) - set(CARDS), set(COLORS) - _CARD_COLORS
    return [d for d in all_drawings() if held_out(d) and d.shape in subjects and d.color in colors]


# new drawings for the sample grids
SHOWN = (
    Drawing("fish", "pink", "grey", "large"),
    Drawing("tree", "brown", "blue", "small"),
    Drawing("wheel", "green", "orange", "large"),
    Drawing("heart", "brown", "yellow", "large"),
)
