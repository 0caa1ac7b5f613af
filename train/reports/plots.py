"""Line charts of report.html, drawn in the browser by uPlot (templates/uPlot.iife.min.js: version 1.6.32, unmodified).

Library and data are in the page, so it needs no network. A chart takes colors and fonts from the page, follows a dark
theme and the width of the screen, and shows the values under mouse or finger. The page's tables repeat key numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Points = Sequence[tuple[float, float]]

COLORS = 8  # that templates/page.css defines
MAX_POINTS = 400
LOGARITHMIC_RATIO = 30.0  # of the greatest to the least value, from which the value axis is logarithmic


@dataclass(frozen=True)
class Curve:
    """One line of a chart."""

    name: str
    points: Points  # (step, value) in the order of steps; values that are not finite are skipped
    color: int = 0  # number of the color; curves of one color belong together
    faint: bool = False  # thin, pale and without a legend entry, behind the curve that smooths it


def smooth(points: Points, weight: float = 0.9) -> list[tuple[float, float]]:
    """Return the exponential moving average of the values, without bias at its start (as Adam: / (1 - weight^n))."""
    found, average = [], 0.0
    for count, (step, value) in enumerate(points, 1):
        average = weight * average + (1 - weight) * value
        found.append((step, average / (1 - weight**count)))
    return found


def thin_out(points: Points) -> Points:
    """Return at most `MAX_POINTS` points: means of so many neighbors."""
    size = max(1, math.ceil(len(points) / MAX_POINTS))
    parts = [points[start : start + size] for start in range(0, len(points), size)]
    return [(part[-1][0], sum(value for _, value in part) / len(part)) for part in parts]


def chart(title: str, curves: Sequence[Curve]) -> dict[str, Any] | None:
    """Return what templates/charts.js draws; None if there is no point to draw."""
    series: list[dict[str, Any]] = []
    for curve in curves:
        if points := thin_out([point for point in curve.points if math.isfinite(point[1])]):
            look = {"name": curve.name, "color": curve.color % COLORS, "faint": curve.faint}
            rounded = [float(f"{value:.5g}") for _, value in points]
            series.append({**look, "steps": [step for step, _ in points], "values": rounded})
    if not series:
        return None
    values = [value for one in series for value in one["values"]]
    logarithmic = min(values) > 0 and max(values) / min(values) > LOGARITHMIC_RATIO
    ends = [f"{one['name']}: {one['values'][0]:.4g} to {one['values'][-1]:.4g}" for one in series if not one["faint"]]
    caption = f"{title} (logarithmic)" if logarithmic else title
    return {"caption": caption, "summary": "; ".join(ends), "data": {"logarithmic": logarithmic, "series": series}}
