"""Checks of settings."""

from __future__ import annotations

import math


def is_number(value: object, low: float = -math.inf, high: float = math.inf) -> bool:
    """Return whether `value` is a finite number (not a bool) in [low, high]."""
    return (
        isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and low <= value <= high
    )


def is_count(value: object, low: int = 0) -> bool:
    """Return whether `value` is an integer (not a bool) >= `low`."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def check_seed(key: str, value: object) -> None:
    """Raise ValueError, naming `key`, unless `value` is a seed that can be incremented."""
    if not is_count(value) or value >= 2**63:  # type: ignore[operator]
        raise ValueError(f"{key}={value!r} must be an integer >= 0 and < 2 ** 63")


def check_count(key: str, value: object, low: int = 0, most: float = math.inf) -> None:
    """Raise ValueError, naming `key`, unless `value` is an integer from `low` to `most`."""
    if not is_count(value, low) or value > most:  # type: ignore[operator]
        raise ValueError(
            f"{key}={value!r} must be an integer " + (f">= {low}" if most == math.inf else f"from {low} to {most}")
        )
