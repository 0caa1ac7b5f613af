"""Recognize the drawing in an image, and whether it is in the spotlight, by the nearest of all candidates.

`recognize` compares an image with the 2240 drawings of `data.synthetic.drawings`, each plain and under the light of
`data.synthetic.spotlight.spotlight`, and returns the nearest by the mean distance of their colors. All are averaged
down to 32 x 32 pixels, which preserves all attributes and tolerates wobbly lines.

Why not `data.synthetic.probe`: it needs a subject on an even background, and the disc of light has an outline of its
own. The price is that drawings must not be shifted, and that there is always a nearest one; `distance` tells how near.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image

from data.synthetic.drawings import Drawing, all_drawings, draw
from data.synthetic.spotlight import spotlight

Array = npt.NDArray[np.float32]

PIXELS = 32


@dataclass(frozen=True)
class Recognized:
    """The drawing nearest to an image, plain or lit, and their mean RGB distance (0 to 441)."""

    drawing: Drawing
    lit: bool
    distance: float


def _small(picture: Image.Image) -> Array:
    """Return the image averaged down to (PIXELS, PIXELS, 3)."""
    if picture.width != picture.height or picture.width % PIXELS:
        size = f"{picture.width} x {picture.height}"
        raise ValueError(f"the image is {size}; it must be square, with sides that are multiples of {PIXELS}")
    return np.asarray(picture.convert("RGB").reduce(picture.width // PIXELS), dtype=np.float32)


@cache
def _candidates() -> tuple[list[tuple[Drawing, bool]], Array]:
    """Return the names of all candidates and their pixels (N, PIXELS^2 * 3)."""
    names, pictures = [], []
    for drawing in all_drawings():
        picture = draw(drawing, 2 * PIXELS)
        for lit in (False, True):
            names.append((drawing, lit))
            pictures.append(_small(spotlight(picture) if lit else picture).ravel())
    return names, np.stack(pictures)


def recognize(pictures: Sequence[Image.Image]) -> list[Recognized]:
    """Return what each square image shows."""
    names, candidates = _candidates()
    squares = (candidates**2).sum(1)
    recognized = []
    for picture in pictures:
        values = _small(picture)
        best = int((squares - 2 * candidates @ values.ravel()).argmin())  # |v - c|^2 without |v|^2
        recognized.append(Recognized(*names[best], _distance(values, candidates[best].reshape(values.shape))))
    return recognized


def difference(one: Image.Image, other: Image.Image) -> float:
    """Return the mean RGB distance (0 to 441) of two square images, both averaged down."""
    return _distance(_small(one), _small(other))


def _distance(one: Array, other: Array) -> float:
    return float(np.sqrt(((one - other) ** 2).sum(-1)).mean())
