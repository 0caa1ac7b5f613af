"""Names and sizes as text for messages."""

from collections.abc import Iterable


def listed(names: Iterable[str], most: int = 8) -> str:
    """Return up to `most` of the names in alphabetical order, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(ordered[:most]) + more


def gigabytes(size: float) -> str:
    """Return a size in bytes as text: `1.50 GB`, `20.0 MB`."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
