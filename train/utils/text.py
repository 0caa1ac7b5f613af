"""Numbers in sentences."""

from __future__ import annotations

from flux2.utils.text import gigabytes as gigabytes


def many(count: int, noun: str) -> str:
    """`1 picture`, `2 pictures`, `1,000 pictures`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")
