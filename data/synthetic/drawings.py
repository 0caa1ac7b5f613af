"""Procedural images of one subject on a plain background.

What: 14 bold subjects x 10 colors x 8 backgrounds x 2 sizes. A `Drawing` names one combination, `draw` renders it;
data/synthetic/captions.py describes and edits it.

How: every subject is a few polygons and strokes in a unit box, computed once, then rotated, scaled and painted with
ImageDraw at four times the size and averaged down, which gives the antialiasing.

Why drawn and not collected: the embedded model has four million parameters and must train in about an hour. It can
learn flat shapes with thick outlines, every attribute is known exactly (so `data.synthetic.probe` can read it back),
and no other images are needed.
"""

import hashlib
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

RGB = tuple[int, int, int]
Point = tuple[float, float]

INK: RGB = (26, 22, 38)

COLORS: dict[str, RGB] = {
    "red": (212, 40, 44),
    "orange": (243, 132, 28),
    "yellow": (252, 212, 48),
    "green": (52, 156, 82),
    "blue": (42, 98, 208),
    "purple": (128, 62, 178),
    "pink": (246, 120, 170),
    "brown": (136, 84, 48),
    "white": (255, 255, 255),
    "black": (74, 80, 98),  # lighter than the ink, so that outlines and details still show on it
}

BACKGROUNDS: dict[str, RGB] = {
    "white": (243, 238, 226),  # paper, so that a white subject stands out from it
    "grey": (193, 196, 198),
    "blue": (168, 212, 242),
    "green": (184, 226, 184),
    "yellow": (252, 238, 160),
    "pink": (252, 200, 218),
    "purple": (208, 188, 240),
    "orange": (255, 206, 160),
}

# side of the subject's unit box, relative to the height of the image
SIZES: dict[str, float] = {"small": 0.42, "large": 0.75}

# small subjects have thinner outlines, which would otherwise cover their details
_OUTLINE: dict[str, float] = {"small": 2.7 / 128, "large": 3.4 / 128}
_SUPERSAMPLING = 4


class _Part(NamedTuple):
    """One piece of a subject: a painted polygon with an inked contour or, where `paint` is None, an ink stroke."""

    loops: list[list[Point]]  # lines to ink: the contour and the contours of any holes, which show the background
    area: list[Point]  # polygon to fill
    paint: str | None


def _polar(x: float, y: float, r: float, angle: float) -> Point:
    """Return the point at a distance from (x, y), at an angle as in `_arc`."""
    return x + r * math.cos(math.radians(angle)), y + r * math.sin(math.radians(angle))


def _arc(x: float, y: float, rx: float, ry: float, start: float, stop: float, count: int = 24) -> list[Point]:
    """Return points on an ellipse; angles in degrees, 0 to the right, clockwise as y grows downwards."""
    angles = np.radians(np.linspace(start, stop, count))
    return [(x + rx * math.cos(a), y + ry * math.sin(a)) for a in angles]


def _circle(x: float, y: float, r: float, count: int = 40) -> list[Point]:
    return _arc(x, y, r, r, 0, 360, count + 1)[:-1]


def _curve(a: Point, b: Point, c: Point, d: Point, count: int = 14) -> list[Point]:
    """Return points on a cubic Bezier curve from a to d."""
    t = np.linspace(0, 1, count)[:, None]
    points = (1 - t) ** 3 * a + 3 * t * (1 - t) ** 2 * b + 3 * t**2 * (1 - t) * c + t**3 * np.array(d)
    return [(float(x), float(y)) for x, y in points]


def _mirrored(right: list[Point]) -> list[Point]:
    """Close a right half, listed from top to bottom, with its mirror image."""
    return right + [(-x, y) for x, y in reversed(right) if abs(x) > 1e-9]


def _box(x0: float, y0: float, x1: float, y1: float) -> list[Point]:
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def _part(contour: list[Point], paint: str | None = "color", holes: Iterable[list[Point]] = ()) -> _Part:
    area = list(contour)
    for hole in holes:
        # A slit to the hole and back joins both into one polygon (even-odd filling). It must be the shortest one:
        # ImageDraw also paints the edges of a polygon, so a slit across another hole would be visible.
        slits = product(range(len(area)), range(len(hole)))
        i, j = min(slits, key=lambda slit: math.dist(area[slit[0]], hole[slit[1]]))
        area[i + 1 : i + 1] = [*hole[j:], *hole[: j + 1], area[i]]
    return _Part([contour, *holes], area, paint)


def _cup() -> list[_Part]:
    half = [(0.40, -0.44), *_curve((0.40, -0.44), (0.40, -0.08), (0.26, 0.08), (0.085, 0.12))]
    half += [*_curve((0.085, 0.12), (0.07, 0.28), (0.10, 0.36), (0.29, 0.42), 8), (0.29, 0.50)]
    return [_part(_mirrored(half)), _part(_arc(0, -0.42, 0.40, 0.09, 0, 360, 41)[:-1], "shade")]


def _sword() -> list[_Part]:
    return [
        _part(_mirrored([(0.0, -0.55), (0.14, -0.39), (0.14, 0.18)])),
        _part([(0.0, -0.31), (0.0, 0.07)], None),
        _part(_box(-0.075, 0.22, 0.075, 0.42), "shade"),
        _part(_box(-0.35, 0.15, 0.35, 0.28)),
        _part(_circle(0, 0.44, 0.11)),
    ]


def _star() -> list[_Part]:
    return [_part([_polar(0, 0.04, 0.255 if i % 2 else 0.56, 36 * i - 90) for i in range(10)])]


def _moon() -> list[_Part]:
    # the inner circle intersects the outer one at the horns (+-angle), which gives a crescent open to the right
    outer = _arc(0.08, 0, 0.52, 0.52, 54, 306, 44)
    top, bottom = outer[-1], outer[0]
    x = 0.265
    r = math.dist((x, 0), top)
    a = math.degrees(math.atan2(bottom[1], bottom[0] - x))
    return [_part(outer[:-1] + _arc(x, 0, r, r, 360 - a, a, 34)[:-1])]


def _sun() -> list[_Part]:
    tips = ((-16.0, 0.35), (0.0, 0.55), (16.0, 0.345))  # angle from the ray's axis, distance from the center
    rays = [_polar(0, 0, r, 45 * i + offset) for i in range(8) for offset, r in tips]
    return [_part(rays), _part(_circle(0, 0, 0.27))]


def _tower() -> list[_Part]:
    battlement = [(0.36, -0.22), (0.36, -0.50), (0.175, -0.50), (0.175, -0.40)]
    left = [(-0.175, -0.40), (-0.175, -0.50), (-0.36, -0.50), (-0.36, -0.22)]
    middle = [(0.075, -0.40), (0.075, -0.50), (-0.075, -0.50), (-0.075, -0.40)]
    return [
        _part([(-0.25, -0.24), (0.25, -0.24), (0.31, 0.50), (-0.31, 0.50)]),
        _part(battlement + middle + left),
        _part([*_arc(0, 0.27, 0.11, 0.11, 180, 360, 14), (0.11, 0.50), (-0.11, 0.50)], "ink"),
        _part(_box(-0.045, -0.11, 0.045, 0.04), "ink"),
    ]


def _key() -> list[_Part]:
    x, r, half = -0.04, 0.26, 0.085  # the axis is left of the center, so that bow and bit together are centered
    a = math.degrees(math.asin(half / r))
    bow = _arc(x, -0.29, r, r, 90 + a, 450 - a, 40)[::-1]
    upper_tooth = [(x - half, 0.54), (x + half, 0.54), (x + half, 0.46), (x + 0.32, 0.46), (x + 0.32, 0.335)]
    lower_tooth = [(x + half, 0.335), (x + half, 0.235), (x + 0.32, 0.235), (x + 0.32, 0.11), (x + half, 0.11)]
    return [_part([*bow, *upper_tooth, *lower_tooth], holes=[_circle(x, -0.29, 0.11, 24)])]


def _heart() -> list[_Part]:
    half = [
        *_curve((0.0, -0.27), (0.08, -0.47), (0.26, -0.50), (0.36, -0.44), 14),
        *_curve((0.36, -0.44), (0.56, -0.34), (0.56, -0.06), (0.40, 0.14), 14)[1:],
        *_curve((0.40, 0.14), (0.28, 0.28), (0.12, 0.40), (0.0, 0.48), 12)[1:],
    ]
    return [_part(_mirrored(half))]


def _crown() -> list[_Part]:
    return [
        _part(_mirrored([(0.0, -0.30), (0.19, 0.06), (0.45, -0.22), (0.39, 0.40)])),
        _part([(-0.415, 0.20), (0.415, 0.20)], None),
        _part(_circle(0, -0.33, 0.085, 24)),
        _part(_circle(0.455, -0.23, 0.08, 24)),
        _part(_circle(-0.455, -0.23, 0.08, 24)),
    ]


def _fish() -> list[_Part]:
    upper = _curve((-0.54, 0.0), (-0.41, -0.43), (0.04, -0.44), (0.27, -0.10), 22)
    tail = [(0.54, -0.33), (0.46, 0.0), (0.54, 0.33)]
    lower = [(x, -y) for x, y in reversed(upper)][:-1]
    return [
        _part([*upper, *tail, *lower]),
        _part(_circle(-0.33, -0.07, 0.045, 16), "ink"),
        _part(_curve((-0.17, -0.20), (-0.07, -0.09), (-0.07, 0.09), (-0.17, 0.20), 12), None),
    ]


def _tree() -> list[_Part]:
    half = [(0.0, -0.54), (0.25, -0.20), (0.14, -0.20), (0.35, 0.08), (0.22, 0.08), (0.44, 0.36)]
    return [_part(_box(-0.085, 0.33, 0.085, 0.54), "shade"), _part(_mirrored(half))]


def _wheel() -> list[_Part]:
    # six holes between rim, spokes and hub; each side of a hole is half a spoke's width from the spoke's axis
    outer, inner, hub, spoke = 0.51, 0.37, 0.15, 0.05
    far, near = math.degrees(math.asin(spoke / inner)), math.degrees(math.asin(spoke / hub))
    holes = []
    for start in range(-30, 330, 60):
        stop = start + 60
        rim = _arc(0, 0, inner, inner, start + far, stop - far, 12)
        holes.append(rim + _arc(0, 0, hub, hub, stop - near, start + near, 6))
    return [_part(_circle(0, 0, outer, 60), holes=holes), _part(_circle(0, 0, 0.05, 14), "ink")]


def _lantern() -> list[_Part]:
    flame = [*_curve((0.0, -0.14), (0.05, -0.03), (0.105, 0.03), (0.105, 0.13), 8)]
    flame += _arc(0, 0.13, 0.105, 0.105, 0, 90, 8)[1:]
    return [
        _part(_circle(0, -0.40, 0.145, 30), holes=[_circle(0, -0.40, 0.065, 20)]),
        _part(_mirrored([(0.27, -0.20), (0.34, 0.10), (0.27, 0.40)])),
        _part(_mirrored([(0.155, -0.14), (0.21, 0.10), (0.155, 0.32)]), "ink"),
        _part(_mirrored(flame)),
        _part(_mirrored([(0.12, -0.36), (0.37, -0.20)])),
        _part(_box(-0.37, 0.39, 0.37, 0.53)),
    ]


def _bell() -> list[_Part]:
    half = [
        *_curve((0.0, -0.44), (0.26, -0.44), (0.27, -0.20), (0.29, -0.02), 14),
        *_curve((0.29, -0.02), (0.30, 0.12), (0.36, 0.20), (0.44, 0.26), 8)[1:],
        (0.44, 0.36),
    ]
    return [
        _part(_circle(0, 0.40, 0.12, 24), "shade"),
        _part(_circle(0, -0.45, 0.085, 20)),
        _part(_mirrored(half)),
        _part([(-0.33, 0.17), (0.33, 0.17)], None),
    ]


_FUNCTIONS = (_cup, _sword, _star, _moon, _sun, _tower, _key, _heart, _crown, _fish, _tree, _wheel, _lantern, _bell)
_SUBJECTS = {function.__name__.removeprefix("_"): function for function in _FUNCTIONS}
SHAPES = tuple(_SUBJECTS)
NAMES = {"color": tuple(COLORS), "background": tuple(BACKGROUNDS), "shape": SHAPES, "size": tuple(SIZES)}


@cache
def _parts(shape: str) -> list[_Part]:
    return _SUBJECTS[shape]()


@dataclass(frozen=True)
class Drawing:
    """One subject in one color and size on one background. Raises ValueError for an unknown name."""

    shape: str
    color: str
    background: str
    size: str

    def __post_init__(self) -> None:
        for key, names in NAMES.items():
            if getattr(self, key) not in names:
                raise ValueError(f"{key}={getattr(self, key)!r} must be one of {', '.join(names)}")


def draw_subject(
    canvas: ImageDraw.ImageDraw, shape: str, color: RGB, center: Point, size: float, angle: float, outline_width: float
) -> None:
    """Paint a subject on any canvas, without antialiasing: paint large, then reduce.

    Lengths are in canvas pixels; subjects fill 0.85 to 1.1 of `size`. `angle` is in degrees clockwise.
    """
    if shape not in _SUBJECTS:
        raise ValueError(f"shape={shape!r} must be one of {', '.join(SHAPES)}")
    cos, sin = size * math.cos(math.radians(angle)), size * math.sin(math.radians(angle))

    def placed(points: Sequence[Point]) -> list[Point]:
        return [(center[0] + cos * x - sin * y, center[1] + sin * x + cos * y) for x, y in points]

    width, r = round(outline_width), outline_width / 2
    shade = (round(color[0] * 0.8), round(color[1] * 0.8), round(color[2] * 0.82))
    paints = {"color": color, "shade": shade, "ink": INK}
    for part in _parts(shape):
        if part.paint is None:
            stroke = placed(part.loops[0])
            canvas.line(stroke, INK, width, joint="curve")
            for x, y in (stroke[0], stroke[-1]):
                canvas.ellipse((x - r, y - r, x + r, y + r), INK)
            continue
        canvas.polygon(placed(part.area), paints[part.paint])
        for loop in part.loops:
            points = placed(loop)
            canvas.line([*points, *points[:2]], INK, width, joint="curve")


def draw(
    drawing: Drawing, pixels: int = 128, dx: float = 0.0, dy: float = 0.0, scale: float = 1.0, angle: float = 0.0
) -> Image.Image:
    """Render a drawing as a square RGB image, shifted by fractions `dx`, `dy` of it and rotated by `angle` degrees."""
    if pixels < 16:
        raise ValueError(f"pixels={pixels} must be >= 16")
    side = pixels * _SUPERSAMPLING
    image = Image.new("RGB", (side, side), BACKGROUNDS[drawing.background])
    center, size = (side * (0.5 + dx), side * (0.5 + dy)), side * SIZES[drawing.size] * scale
    outline_width = side * _OUTLINE[drawing.size]
    draw_subject(ImageDraw.Draw(image), drawing.shape, COLORS[drawing.color], center, size, angle, outline_width)
    return image.reduce(_SUPERSAMPLING)


def jitter(rng: random.Random) -> dict[str, float]:
    """Draw small random arguments of `draw`, so that a model learns no fixed position, scale and angle."""
    shift = {key: rng.uniform(-0.025, 0.025) for key in ("dx", "dy")}
    return shift | {"scale": rng.uniform(0.95, 1.05), "angle": rng.uniform(-3, 3)}


def all_drawings() -> list[Drawing]:
    """Return every combination, in a fixed order."""
    return [Drawing(s, c, b, z) for s in SHAPES for c in COLORS for b in BACKGROUNDS for z in SIZES]


def held_out(drawing: Drawing) -> bool:
    """Return whether a drawing is one of the tenth of the combinations that training must not show.

    The size is ignored: a drawing whose other size was trained on would not be unseen.
    """
    name = f"{drawing.shape} {drawing.color} {drawing.background}"
    return hashlib.sha256(name.encode()).digest()[0] < 26
