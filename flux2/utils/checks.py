"""Checks of arguments. Each raises one error that names the argument, before anything large is loaded."""

import math
from collections.abc import Iterable
from numbers import Integral, Real

MAX_STEPS = 10_000
MAX_GUIDANCE = 1000.0
MAX_PIXELS = 8192**2  # sixteen times the largest size that the models were published for
MAX_LENGTH = 100_000
MAX_REFERENCES = 10  # the published limit
SEEDS = (-(2**63), 2**64 - 1)  # the range that torch.Generator accepts


def integer(name: str, value: object, least: int, most: float = math.inf) -> int:
    """Return `value` as an int. Raise TypeError if it is no integer, ValueError if it is out of range."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name}={value!r} must be an integer, got {type(value).__name__}")
    if not least <= (result := int(value)) <= most:
        accepted = f">= {least}" if most == math.inf else f"from {least} to {most}"
        raise ValueError(f"{name}={result} must be an integer {accepted}")
    return result


def number(name: str, value: object, limit: float = math.inf) -> float:
    """Return `value` as a finite float from -`limit` to `limit`. Raise TypeError or ValueError for anything else."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name}={value!r} must be a number, got {type(value).__name__}")
    try:
        result = float(value)
    except OverflowError:  # an integer beyond the largest float
        result = math.inf
    if not math.isfinite(result):
        raise ValueError(f"{name}={value} must be a finite number")
    if abs(result) > limit:
        raise ValueError(f"{name}={value} must be from {-limit:g} to {limit:g}")
    return result


def strings(name: str, value: object) -> list[str]:
    """Return one string or several as a list. Raise TypeError for others, ValueError for none or invalid Unicode."""
    if not isinstance(value, Iterable):
        raise TypeError(f"{name}={value!r} must be a string or a list of strings, got {type(value).__name__}")
    values = [value] if isinstance(value, str) else list(value)
    if not values:
        raise ValueError(f"{name} is an empty list: give at least one string")
    for text in values:
        if not isinstance(text, str):
            raise TypeError(f"{name} contains {text!r} of type {type(text).__name__}: give strings only")
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f"{name}={text!r} is not valid Unicode: remove the lone surrogates")
    return values


def seeds(value: object, count: int) -> list[int]:
    """Return the seeds of `count` images: one integer is counted up, a list gives one seed per image."""
    if isinstance(value, Integral) or not isinstance(value, Iterable) or isinstance(value, str):
        first = integer("seed", value, *SEEDS)
        return [integer("seed", first + i, *SEEDS) for i in range(count)]
    values = [integer("seed", seed, *SEEDS) for seed in value]
    if len(values) != count:
        raise ValueError(f"seed has {len(values)} values for {count} prompts: give one seed, or one per prompt")
    return values


def reference_count(count: int) -> None:
    """Raise ValueError if `count` is more references than FLUX.2 accepts."""
    if count > MAX_REFERENCES:
        raise ValueError(f"{count} references are given, but FLUX.2 takes at most {MAX_REFERENCES}: remove some")


def inpainting(
    references: int, has_mask: bool, strength: object = None, mask_crop: object = None
) -> tuple[float | None, int | None]:
    """Return `strength` and `mask_crop`. Raise an error if they cannot be used, or not with what else is given."""
    if mask_crop is not None and not has_mask:
        raise ValueError(f"mask_crop={mask_crop} has no effect without mask: it is the margin of the region around it")
    if (has_mask or strength is not None) and not references:
        what = "mask" if has_mask else f"strength={strength}"
        raise ValueError(f"{what} needs the image that is changed: give it as the first reference")
    share = None if strength is None else number("strength", strength)
    if share is not None and not 0 < share <= 1:
        raise ValueError(f"strength={strength} must be above 0 and at most 1")
    return share, None if mask_crop is None else integer("mask_crop", mask_crop, 0, MAX_PIXELS)


def steps(value: object) -> int:
    return integer("steps", value, 1, MAX_STEPS)


def guidance(value: object) -> float:
    return number("guidance", value, MAX_GUIDANCE)


def size(width: object, height: object, unit: int) -> None:
    """Raise an error unless both sides are positive multiples of `unit` with a product of at most `MAX_PIXELS`."""
    sides = [integer(name, value, -MAX_PIXELS) for name, value in (("width", width), ("height", height))]
    if any(side % unit or side < unit for side in sides):
        raise ValueError(f"width={width}, height={height} must be multiples of {unit}")
    if math.prod(sides) > MAX_PIXELS:
        raise ValueError(f"width={width}, height={height} are more than {MAX_PIXELS} pixels: choose a smaller size")
