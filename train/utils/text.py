"""Counts and times in sentences, and texts in overrides of Hydra."""

from __future__ import annotations

import re


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
    days = f"{hours / 24:.3g}"
    return "years" if hours >= 1e6 else "1 day" if days == "1" else f"{days} days"


def in_quotes(text: str, quote: str) -> str:
    """Return `text` in Hydra's quotes, in which only the quote itself and the backslashes before it are special."""
    escaped = re.sub(rf"(\\*){quote}", lambda found: found[1] * 2 + "\\" + quote, text)
    trailing = len(escaped) - len(escaped.rstrip("\\"))
    return quote + escaped + "\\" * trailing + quote


def setting(key: str, value: str) -> str:
    """Return the override `key=value` of a text, in quotes where Hydra would read something else."""
    return f"{key}={quoted(value)}"


def quoted(text: str) -> str:
    """Return a text as a value of an override: in quotes where Hydra would read something else."""
    return text if re.fullmatch(r"[\w.~-]*/[\w./~-]*", text, re.ASCII) else in_quotes(text.replace("${", "\\${"), '"')
