"""What tests of messages share: a message is tested by its key, its value and its remedy, not word for word."""

import re


def plain(text: str) -> str:
    """Return `text` without what a message may have or not have: quotes, capitals and line breaks."""
    return " ".join(re.sub("['\"`]", "", text).lower().split())


def holds(text: str, parts: str) -> bool:
    """Return whether `text` has each of `parts`, which " ... " separates, in any order."""
    return all(plain(part) in plain(text) for part in parts.split(" ... "))
