"""Counts in sentences."""

from __future__ import annotations


def many(count: int, noun: str) -> str:
    """Return a count with its noun: `1 picture`, `2 pictures`, `1,000 pictures`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
