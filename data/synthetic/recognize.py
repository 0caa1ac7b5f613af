"""Which drawing is it, and is it in the spotlight? A picture is held against all there are, and the nearest has it.

What: `recognize` compares a picture with the 2240 drawings of `data.synthetic.drawings`, each plain and under the light
of `data.synthetic.spotlight.spotlight`, and names the nearest by the mean distance of their colors.

How: all are averaged down to 32 x 32 pixels, which leaves subject, color, background and size in sight and forgives a
wobbly line.

Why not `data.synthetic.probe`: it reads a subject on an even background, and a disc of light is an outline of its own.
The price is that drawings are expected where they stand unmoved, and that something is always nearest: `distance` says
how near.
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
    """The drawing that a picture is nearest to, plain or lit, and their mean RGB distance (0 to 441)."""

    drawing: Drawing
    lit: bool
    distance: float


def _small(picture: Image.Image) -> Array:
    """(PIXELS, PIXELS, 3)."""
    if picture.width != picture.height or picture.width % PIXELS:
        raise ValueError(f"picture is {picture.width} x {picture.height}; a square of a multiple of {PIXELS} is needed")
    return np.asarray(picture.convert("RGB").reduce(picture.width // PIXELS), dtype=np.float32)


@cache
def _lineup() -> tuple[list[tuple[Drawing, bool]], Array]:
    """Names of all candidates and their pixels (N, PIXELS^2 * 3)."""
    names, pictures = [], []
    for drawing in all_drawings():
        picture = draw(drawing, 2 * PIXELS)
        for lit in (False, True):
            names.append((drawing, lit))
            pictures.append(_small(spotlight(picture) if lit else picture).ravel())
    return names, np.stack(pictures)


def recognize(pictures: Sequence[Image.Image]) -> list[Recognized]:
    """What each square picture shows."""
    names, candidates = _lineup()
    squares = (candidates**2).sum(1)
    found = []
    for picture in pictures:
        values = _small(picture)
        best = int((squares - 2 * candidates @ values.ravel()).argmin())  # |v - c|^2 without |v|^2
        found.append(Recognized(*names[best], _distance(values, candidates[best].reshape(values.shape))))
    return found


def difference(one: Image.Image, other: Image.Image) -> float:
    """The mean RGB distance (0 to 441) of two square pictures, both averaged down."""
    return _distance(_small(one), _small(other))


def _distance(one: Array, other: Array) -> float:
    return float(np.sqrt(((one - other) ** 2).sum(-1)).mean())
