"""The edit of the demonstration: a picture under a colored light, warm in a disc in the middle, dim and cool around
it.

It follows from the source alone, pixel by pixel, so that only who looks at the reference can draw it.
"""

import random

import numpy as np
from PIL import Image, ImageDraw

from data.synthetic.drawings import COLORS, SHAPES, Drawing, all_drawings, held_out
from data.synthetic.tarot import CARDS

TRIGGER = "sptlgt"
INSTRUCTION = f"put it in the {TRIGGER}"
PAIRS = 40
PIXELS = 128  # the embedded model's size: a larger reference would be one that it was not trained on

WARM = (1.0, 0.96, 0.82)  # of the light in the disc, and around it: what each channel is multiplied by
COOL = (0.28, 0.30, 0.46)
RADIUS = 0.40  # of the disc, in sides of the picture
_SUPERSAMPLING = 4


def spotlight(picture: Image.Image) -> Image.Image:
    """The edit: a square RGB picture under the light."""
    if picture.width != picture.height:
        raise ValueError(f"picture is {picture.width} x {picture.height}; a spotlight needs a square one")
    side = picture.width * _SUPERSAMPLING
    disc = Image.new("L", (side, side), 0)
    near, far = side * (0.5 - RADIUS), side * (0.5 + RADIUS)
    ImageDraw.Draw(disc).ellipse((near, near, far, far), 255)
    lit = np.asarray(disc.reduce(_SUPERSAMPLING), dtype=np.float64)[..., None] / 255
    light = lit * np.array(WARM) + (1 - lit) * np.array(COOL)
    return Image.fromarray(np.round(np.asarray(picture.convert("RGB")) * light).astype(np.uint8))


def _is_shown(drawing: Drawing) -> bool:
    """Whether the pairs may show its subject and its color."""
    return drawing.shape in CARDS and any(drawing.color in colors for colors in CARDS.values())


def pairs(seed: int = 0) -> list[tuple[Drawing, dict[str, float]]]:
    """What the pairs show: drawings, each with a little shift, scale and turn."""
    rng = random.Random(seed)
    unseen = [drawing for drawing in all_drawings() if held_out(drawing) and _is_shown(drawing)]
    combinations = sorted({(drawing.shape, drawing.color, drawing.background) for drawing in unseen})
    chosen = rng.sample(combinations, PAIRS)
    sizes = ["small", "large"] * (PAIRS // 2)  # of each as many
    return [
        (
            Drawing(*combination, size),
            {
                "dx": rng.uniform(-0.025, 0.025),
                "dy": rng.uniform(-0.025, 0.025),
                "scale": rng.uniform(0.95, 1.05),
                "angle": rng.uniform(-3, 3),
            },
        )
        for combination, size in zip(chosen, sizes, strict=True)
    ]


def new_drawings() -> list[Drawing]:
    """What is measured: every drawing whose subject and color are in no pair, and that the base never saw either."""
    subjects = set(SHAPES) - set(CARDS)
    colors = set(COLORS) - {color for shown in CARDS.values() for color in shown}
    return [d for d in all_drawings() if held_out(d) and d.shape in subjects and d.color in colors]


# Of those, for the sample grids.
SHOWN = (
    Drawing("fish", "pink", "grey", "large"),
    Drawing("tree", "brown", "blue", "small"),
    Drawing("wheel", "green", "orange", "large"),
    Drawing("heart", "brown", "yellow", "large"),
)
