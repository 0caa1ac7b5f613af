"""What a value given as a setting may be."""

from __future__ import annotations

import math


def is_number(value: object, low: float = -math.inf, high: float = math.inf) -> bool:
    """Whether `value` is a finite number (no truth value) in [low, high]."""
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and low <= value <= high
    )


def is_count(value: object, low: int = 0) -> bool:
    """Whether `value` is a whole number (no truth value) from `low`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= low
