"""Checks of arguments that come from the configuration: each raises ValueError, naming the key."""

from collections.abc import Iterable, Mapping
from pathlib import Path


def check_int(key: str, value: object, least: int, most: int | None = None) -> int:
    """Return `value`; raise ValueError unless it is an integer >= `least` and, if given, <= `most`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least or (most is not None and value > most):
        raise ValueError(f"{key}={value!r} must be an integer >= {least}" + ("" if most is None else f" and <= {most}"))
    return value


def check_flag(key: str, value: object) -> None:
    """Raise ValueError unless `value` is true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"{key}={value!r} must be true or false")


def check_text(key: str, value: object) -> str:
    """Return `value` as a string; raise ValueError unless it is a string or path that is not empty."""
    if not isinstance(value, str | Path) or not str(value):
        raise ValueError(f"{key}={value!r} is {type(value).__name__}: it must be a string that is not empty")
    return str(value)


def check_texts(key: str, value: object) -> tuple[str, ...]:
    """Return `value` as a tuple; raise ValueError unless it is a list of strings that are not empty."""
    if isinstance(value, str | Mapping) or not isinstance(value, Iterable):
        raise ValueError(f"{key}={value!r} is {type(value).__name__}: it must be a list of names")
    return tuple(check_text(key, item) for item in value)
