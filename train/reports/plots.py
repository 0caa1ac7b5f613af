"""Curves as SVG, drawn here: a page that needs no network can load no plotting library.

Colors and fonts come from the page (`STYLE`), so that a plot follows a dark theme. The numbers are also in the page's
tables, for who cannot see a plot.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 460, 260  # of the drawing, which is shrunk to a phone's width and enlarged by half at most
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 12, 34
COLORS = 8
MOST_POINTS = 400
WIDE_RANGE = 30.0  # from here on, greatest by least, the axis is logarithmic

STYLE = """
:root { --c0: #2f6fde; --c1: #d9622b; --c2: #2a8a4a; --c3: #a04bb8; --c4: #b8860b; --c5: #0f8f98; --c6: #c43c6a;
  --c7: #6b6f76 }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); gap: 1rem }
.plot { padding: .5rem .7rem; max-width: 44rem }
.plot figcaption { padding: 0 0 .3rem }
.plot svg { display: block; width: 100%; height: auto }
.plot text { font: 13px system-ui, sans-serif; fill: currentColor }
.plot .grid { stroke: var(--line) }
.plot path { fill: none; stroke-width: 1.8; stroke-linejoin: round }
.plot .faint { opacity: .3; stroke-width: 1 }
.legend { display: flex; flex-wrap: wrap; gap: .1rem .9rem; margin: .2rem 0 0; padding: 0; list-style: none }
.legend li::before { content: ""; display: inline-block; width: .9em; height: .25em; margin-right: .4em;
  vertical-align: middle; background: var(--is) }
""" + "".join(
    f".plot .c{i} {{ --is: var(--c{i}) }} .plot path.c{i} {{ stroke: var(--is) }} .plot circle.c{i} "
    f"{{ fill: var(--is) }}\n"
    for i in range(COLORS)
)


@dataclass(frozen=True)
class Curve:
    """One line of a plot.

    Attributes:
        points: (step, value), by step; values that are not finite are left out.
        color: 0 to 7; curves of one color belong together.
        faint: drawn thin and pale, without points and not in the legend: what another curve smooths.
    """

    name: str
    points: Points
    color: int
    faint: bool = False


def smoothed(points: Points, weight: float = 0.9) -> list[tuple[float, float]]:
    """Exponential moving average of the values, without the bias of its start (as in Adam: divided by 1 - weight^n)."""
    found, average = [], 0.0
    for count, (step, value) in enumerate(points, 1):
        average = weight * average + (1 - weight) * value
        found.append((step, average / (1 - weight**count)))
    return found


def thinned(points: Points) -> list[tuple[float, float]]:
    """At most `MOST_POINTS`: means of so many neighbors."""
    size = math.ceil(len(points) / MOST_POINTS)
    if size <= 1:
        return list(points)
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from `low` to `high`."""
    raw = (high - low) / count
    unit = 10 ** math.floor(math.log10(raw))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def decades(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten from `low` to `high`; the powers alone where these are many."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(exponents) <= 3 else (1,)
    every = math.ceil(len(exponents) / 6)
    return [f * 10.0**e for e in exponents[::every] for f in factors if low * 0.999 <= f * 10.0**e <= high * 1.001]


@dataclass(frozen=True)
class Axes:
    """Where values are in the drawing; `logarithmic` is the vertical axis."""

    steps: tuple[float, float]
    values: tuple[float, float]
    logarithmic: bool

    @classmethod
    def of(cls, points: Points) -> Axes:
        steps, values = [step for step, _ in points], [value for _, value in points]
        low, high = min(values), max(values)
        logarithmic = low > 0 and high / low > WIDE_RANGE
        if not logarithmic:
            room = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
            low, high = low - room, high + room
        return cls((min(steps), max(max(steps), min(steps) + 1)), (low, high), logarithmic)

    def x(self, step: float) -> float:
        share = (step - self.steps[0]) / (self.steps[1] - self.steps[0])
        return LEFT + share * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.values
        if self.logarithmic:
            value, low, high = math.log(value), math.log(low), math.log(high)
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def drawn(self) -> list[str]:
        """Grid, numbers and the name of the horizontal axis."""
        parts = []
        for value in (decades if self.logarithmic else ticks)(*self.values):
            y = self.y(value)
            parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>')
        for step in ticks(*self.steps):
            x = min(self.x(step), WIDTH - RIGHT - 12)
            parts.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{step:g}</text>')
        parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">step</text>')
        return parts


def plot(title: str, curves: Sequence[Curve]) -> str:
    """A figure with the curves and their legend; empty if there is nothing to draw. Names and title are texts."""
    finite = [
        Curve(one.name, thinned([point for point in one.points if math.isfinite(point[1])]), one.color, one.faint)
        for one in curves
    ]
    finite = [one for one in finite if one.points]
    points = [point for one in finite for point in one.points]
    if not points:
        return ""
    axes, parts = Axes.of(points), []
    for one in finite:
        color = f"c{one.color % COLORS}"
        path = "L".join(f"{axes.x(step):.1f} {axes.y(value):.1f}" for step, value in one.points)
        parts.append(f'<path class="{color}{" faint" if one.faint else ""}" d="M{path}"/>')
        if not one.faint and len(one.points) <= 40:
            parts += [
                f'<circle class="{color}" cx="{axes.x(step):.1f}" cy="{axes.y(value):.1f}" r="2.6">'
                f"<title>{escape(one.name)}, step {step:g}: {value:.4g}</title></circle>"
                for step, value in one.points
            ]
    shown = [one for one in finite if not one.faint]
    said = "; ".join(f"{one.name}: {one.points[0][1]:.4g} to {one.points[-1][1]:.4g}" for one in shown)
    legend = "".join(f'<li class="c{one.color % COLORS}">{escape(one.name)}</li>' for one in shown)
    note = " (logarithmic)" if axes.logarithmic else ""
    return (
        f'<figure class="plot"><figcaption>{escape(title)}{note}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"{title}. {said}")}">'
        f'{"".join(axes.drawn())}{"".join(parts)}</svg><ul class="legend">{legend}</ul></figure>'
    )
