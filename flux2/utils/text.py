"""Names and sizes as text for messages."""

import re
from collections.abc import Iterable

# control characters but for the ends of lines and tabs, those that turn the direction of writing, and parts of file
# names that are not UTF-8, which cannot be printed
CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Return `text` for a terminal: a name or message from outside could move the cursor, or set the clipboard."""
    return CONTROLS.sub(lambda sign: sign[0].encode("unicode_escape").decode(), text)


def listed(names: Iterable[str], most: int = 8) -> str:
    """Return up to `most` of the names in alphabetical order, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(ordered[:most]) + more


def gigabytes(size: float) -> str:
    """Return a size in bytes as text: `1.50 GB`, `20.0 MB`."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
