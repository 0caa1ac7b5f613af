"""Numbers in sentences."""

from __future__ import annotations


def gigabytes(size: float) -> str:
    """Return a size in bytes as text: `1.5 GB`, `20.0 MB`."""
    return f"{size / 1e9:.1f} GB" if size >= 9.95e8 else f"{size / 1e6:.1f} MB"


def many(count: int, noun: str) -> str:
    """`1 picture`, `2 pictures`, `1,000 pictures`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
