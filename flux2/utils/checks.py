"""Checks of what a caller gives: one error that names the argument, before anything large is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral, Real

MAX_STEPS = 10_000
MAX_GUIDANCE = 1000.0
MAX_PIXELS = 8192**2  # sixteen times what the models were published for
MAX_LENGTH = 100_000
MAX_REFERENCES = 10  # as published
SEEDS = (-(2**63), 2**64 - 1)  # what torch.Generator takes


def integer(name: str, value: object, least: int, most: int | None = None) -> int:
    """`value` as an int. Raises TypeError unless it is a whole number, ValueError if it is out of range."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}={value!r} must be a whole number, got {type(value).__name__}")
    found = int(value)
    if found < least:
        raise ValueError(f"{name}={found} must be at least {least}")
    if most is not None and found > most:
        raise ValueError(f"{name}={found} must be at most {most}")
    return found


def number(name: str, value: object, limit: float = math.inf) -> float:
    """`value` as a finite float of at most `limit` in size. Raises TypeError or ValueError that names it."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}={value!r} must be a number, got {type(value).__name__}")
    try:
        found = float(value)
    except OverflowError:  # a whole number beyond the largest float
        found = math.inf
    if not math.isfinite(found):
        raise ValueError(f"{name}={value} must be a finite number")
    if abs(found) > limit:
        raise ValueError(f"{name}={value} must be from {-limit:g} to {limit:g}")
    return found


def strings(name: str, value: object) -> list[str]:
    """One text or several as a list. Raises TypeError for anything else, ValueError for none or for broken Unicode."""
    given = [value] if isinstance(value, str) else list(value) if isinstance(value, Iterable) else None
    if given is None:
        raise TypeError(f"{name}={value!r} must be a text or a list of texts, got {type(value).__name__}")
    if not given:
        raise ValueError(f"{name} is an empty list: give at least one text")
    for text in given:
        if not isinstance(text, str):
            raise TypeError(f"{name} has {text!r} in it, which is {type(text).__name__}: texts were expected")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f"{name}={text!r} is not valid Unicode: it holds half of a character (a surrogate)")
    return given


def seeds(value: object, count: int) -> list[int]:
    """The seeds of `count` pictures: counted up from one, or one each."""
    if isinstance(value, Integral) or not isinstance(value, Iterable) or isinstance(value, str):
        first = integer("seed", value, *SEEDS)
        return [integer("seed", first + i, *SEEDS) for i in range(count)]
    given = [integer("seed", seed, *SEEDS) for seed in value]
    if len(given) != count:
        raise ValueError(f"seed has {len(given)} values for {count} prompts; give one, or one a prompt")
    return given


def reference_count(count: int) -> None:
    """Raises ValueError for more than the models are published for."""
    if count > MAX_REFERENCES:
        raise ValueError(f"{count} references are given, and FLUX.2 takes at most {MAX_REFERENCES}: leave some out")


def steps(value: object) -> int:
    return integer("steps", value, 1, MAX_STEPS)


def guidance(value: object) -> float:
    return number("guidance", value, MAX_GUIDANCE)


def size(width: object, height: object, unit: int) -> None:
    """Raises unless both are positive multiples of `unit` and their product is at most `MAX_PIXELS`."""
    sides = [integer(name, value, -MAX_PIXELS) for name, value in (("width", width), ("height", height))]
    given = f"width={width}, height={height}"
    if any(side % unit or side < unit for side in sides):
        raise ValueError(f"{given} must be multiples of {unit}")
    if math.prod(sides) > MAX_PIXELS:
        raise ValueError(f"{given} are more than {MAX_PIXELS} pixels together: make them smaller")
