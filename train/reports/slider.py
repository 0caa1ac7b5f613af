"""Images before and after in an HTML page: a slider over two of them, and a row of thumbnails that chooses the second.

Each image is in the page once; without JavaScript only the row is shown. The handle is an `<input type=range>`, which
keys and screen readers know; templates/slider.js follows the pointer itself, because browsers differ in whether a range
moves when a pointer touches it outside of its knob.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True)
class Shot:
    """The image of one row, such as `base` or `step 400`; None if it could not be computed. `first`: shown at first."""

    name: str
    image: Image.Image | None
    first: bool = False


@dataclass(frozen=True)
class Cell:
    """The images of one prompt and seed, the base's first, then one for each checkpoint; `label` is the caption."""

    label: str
    shots: Sequence[Shot]


def image_width(cells: Sequence[Cell]) -> int:
    """Return the widest an image may be, in pixels, so that the page stays below some ten MB."""
    return 640 if sum(len(cell.shots) for cell in cells) <= 80 else 400
