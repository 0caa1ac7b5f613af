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


def check_seed(key: str, value: object) -> None:
    """Raises ValueError, naming `key`, unless `value` is a seed that can be counted up from."""
    if not is_count(value) or value >= 2**63:  # type: ignore[operator]
        raise ValueError(f"{key}={value!r} must be a whole number from 0, below 2 ** 63")


def check_count(key: str, value: object, low: int = 0, most: float = math.inf) -> None:
    """Raises ValueError, naming `key`, unless `value` is a whole number from `low` to `most`."""
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= most:
        raise ValueError(
            f"{key}={value!r} must be a whole number from {low}" + (f" to {most}" if most < math.inf else "")
        )
