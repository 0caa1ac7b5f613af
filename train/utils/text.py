"""Counts and times in sentences."""

from __future__ import annotations


def many(count: int, noun: str) -> str:
    """Return a count with its noun: `1 picture`, `2 pictures`, `1,000 pictures`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def duration(seconds: float) -> str:
    """Return a time as text, with one or two units: `0.4 s`, `40 s`, `3 min`, `5 h 20 min`, `3 days`."""
    minutes, hours = seconds / 60, round(seconds / 60) / 60
    if seconds < 59.5:
        return f"{seconds:.1f} s" if 0 < seconds < 0.95 else f"{max(0, seconds):.0f} s"
    if minutes < 59.5:
        return f"{max(1, minutes):.0f} min"
    if hours < 24:
        return f"{int(hours)} h {round(minutes) % 60} min"
    return f"{hours / 24:.3g} days" if hours < 1e6 else "years"
