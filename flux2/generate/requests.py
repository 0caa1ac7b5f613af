"""Requests of images: prompts from the command line, or one JSON object per line of a file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flux2.models.variants import PIXELS_PER_TOKEN
from flux2.utils import checks


@dataclass(frozen=True)
class Request:
    """One image. None means the model's default, or for the size that of the first reference.

    Raises TypeError or ValueError, naming the field, for a wrong type or range.
    """

    prompt: str
    out: Path
    seed: int = 0
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance: float | None = None
    images: Sequence[Path] = field(default_factory=list)

    def __post_init__(self) -> None:
        checks.strings("prompt", self.prompt)
        checks.seeds(self.seed, 1)
        checks.reference_count(len(self.images))
        checks.size(self.width or PIXELS_PER_TOKEN, self.height or PIXELS_PER_TOKEN, PIXELS_PER_TOKEN)
        if self.steps is not None:
            checks.steps(self.steps)
        if self.guidance is not None:
            checks.guidance(self.guidance)


KEYS = tuple(entry.name for entry in dataclasses.fields(Request))


def round_sizes(values: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """Return `values` with `width` and `height` rounded to multiples of 16, reported to `say`. None stays None.

    Raises TypeError or ValueError unless they are integers >= 16.
    """
    sides = {key: values[key] for key in ("width", "height") if values[key] is not None}
    integers = {key: checks.integer(key, side, PIXELS_PER_TOKEN) for key, side in sides.items()}
    rounded = {key: round(side / PIXELS_PER_TOKEN) * PIXELS_PER_TOKEN for key, side in integers.items()}
    for key, side in integers.items():
        if side != rounded[key]:
            say(f"{key}={side} is not a multiple of {PIXELS_PER_TOKEN}: rounded to {rounded[key]}")
    return values | rounded


def numbered_path(out: Path, index: int, count: int) -> Path:
    return out if count == 1 else out.with_name(f"{out.stem}_{index:03d}{out.suffix}")


def read_lines(file: Path, defaults: Mapping[str, Any], say: Callable[[str], None]) -> list[Request]:
    """Return the requests in a file of JSON lines, in UTF-8 with or without byte order mark.

    Each has a `prompt`, and any other field of `Request`; missing ones have their default. The default `seed` counts up
    line by line; `images` is a list of paths; `out` is a file name in the folder of the default one, which is numbered
    if `out` is missing. `say` receives a line for each size that is rounded.

    Raises ValueError that names the file and the line.
    """
    what = f"--prompts {file}"
    try:
        lines = [line for line in enumerate(file.read_text("utf-8-sig").splitlines(), 1) if line[1].strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{what} cannot be read ({error})") from error
    if not lines:
        raise ValueError(f"{what} has no lines. Write one JSON object with a prompt per line")
    requests = []
    for index, (number, text) in enumerate(lines):
        try:
            requests.append(parse_request(json.loads(text), index, len(lines), defaults, say))
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"{what}, line {number}: {error}") from error
    outs = [request.out for request in requests]
    for number, (request, out) in enumerate(zip(requests, outs, strict=True)):
        if out in outs[:number]:
            raise ValueError(f"{what}, line {lines[number][0]}: an earlier line writes {request.out} too")
    return requests


def parse_request(
    line: Any, index: int, count: int, defaults: Mapping[str, Any], say: Callable[[str], None]
) -> Request:
    """Return the request in one line. Raises TypeError or ValueError for an invalid one."""
    if not isinstance(line, dict):
        raise ValueError(f"{line!r} is not an object such as {{" + '"prompt": "..."}')
    if unknown := [key for key in line if key not in KEYS]:
        raise ValueError(f"{unknown[0]!r} must be one of {', '.join(KEYS)}")
    if not isinstance(line.get("prompt"), str):
        raise ValueError(f"prompt={line.get('prompt')!r} must be a string")
    values = {**defaults, "seed": defaults["seed"] + index, **line}
    out, base = line.get("out"), Path(defaults["out"])
    if out is not None and (not isinstance(out, str) or not out):
        raise ValueError(f"out={out!r} must be a file name")
    values["out"] = numbered_path(base, index, count) if out is None else base.parent / out
    images = values["images"]
    if not isinstance(images, list) or not all(isinstance(path, str | Path) for path in images):
        raise ValueError(f"images={images!r} must be a list of paths")
    values["images"] = [Path(path) for path in images]
    return Request(**round_sizes(values, say))
