"""Requests of images: prompts from the command line, or one JSON object per line of a file."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from json import JSONDecodeError
from pathlib import Path
from typing import Any

from flux2.models.inpainting import STRENGTH
from flux2.models.variants import PIXELS_PER_TOKEN, Variant
from flux2.sampling import first_step
from flux2.utils import checks
from flux2.utils.files import user_path
from flux2.utils.json_files import parse_json


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
    images: tuple[Path, ...] = ()
    mask: Path | None = None
    strength: float | None = None
    mask_crop: int | None = None

    def __post_init__(self) -> None:
        checks.strings("prompt", self.prompt)
        checks.seeds(self.seed, 1)
        checks.reference_count(len(self.images))
        checks.inpainting(len(self.images), self.mask is not None, self.strength, self.mask_crop)
        checks.size(self.width or PIXELS_PER_TOKEN, self.height or PIXELS_PER_TOKEN, PIXELS_PER_TOKEN)
        if self.steps is not None:
            checks.steps(self.steps)
        if self.guidance is not None:
            checks.guidance(self.guidance)

    def complete(self, variant: Variant) -> "Request":
        """Return the request with the steps and the guidance of `variant` if it has none, and the usual strength."""
        guidance = variant.guidance if self.guidance is None else self.guidance
        strength = STRENGTH if self.mask is not None and self.strength is None else self.strength
        return dataclasses.replace(self, steps=self.steps or variant.steps, guidance=guidance, strength=strength)

    @property
    def inputs(self) -> tuple[Path, ...]:
        """Return the image files that it reads."""
        return self.images if self.mask is None else (*self.images, self.mask)

    @property
    def computed_steps(self) -> int:
        """Return the number of steps of a complete request that are computed."""
        steps = self.steps or 0
        return steps if self.strength is None else steps - first_step(steps, self.strength)


KEYS = tuple(entry.name for entry in dataclasses.fields(Request))
Say = Callable[[str], None]  # receives a line for the user


def round_sizes(values: dict[str, Any], say: Say) -> dict[str, Any]:
    """Return `values` with `width` and `height` rounded to multiples of 16, reported to `say`. None stays None.

    Raises TypeError or ValueError unless they are integers >= 16.
    """
    given = {key: values[key] for key in ("width", "height") if values[key] is not None}
    sides = {key: checks.integer(key, side, PIXELS_PER_TOKEN, checks.MAX_PIXELS) for key, side in given.items()}
    rounded = {key: round(side / PIXELS_PER_TOKEN) * PIXELS_PER_TOKEN for key, side in sides.items()}
    for key in sides:
        if sides[key] != rounded[key]:
            say(f"{key}={sides[key]} is not a multiple of {PIXELS_PER_TOKEN}: rounded to {rounded[key]}")
    return values | rounded


def read_lines(file: Path, defaults: Mapping[str, Any], say: Say) -> list[Request]:
    """Return the requests in a file of JSON lines, in UTF-8 with or without byte order mark.

    Each has a `prompt`, and any other field of `Request`; missing ones have their default. The default `seed` counts up
    line by line; `images` is a list of paths; `out` is a file name in the folder of the default one, which is numbered
    if `out` is missing. `say` receives a line for each size that is rounded.

    Raises ValueError that names the file and the line.
    """
    what = f"--prompts {file}"
    try:
        text = file.read_text("utf-8-sig")  # a line ends at \n alone: U+2028 and others may be in a string
        lines = [line for line in enumerate(text.split("\n"), 1) if line[1].strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{what} cannot be read ({error})") from error
    if not lines:
        raise ValueError(f"{what} has no lines. Write one JSON object with a prompt per line")
    requests, writers = list[Request](), dict[str, int]()  # the number of the line that writes a file
    for index, (number, text) in enumerate(lines):
        try:
            request = parse_request(parse_json(text, object_pairs_hook=distinct), index, len(lines), defaults, say)
            check_order(request, writers)
        except JSONDecodeError as error:
            raise ValueError(
                f'{what}, line {number} is not a JSON object such as {{"prompt": "..."}} ({error})'
            ) from error
        except (ValueError, TypeError) as error:
            raise ValueError(f"{what}, line {number}: {error}") from error
        requests.append(request)
        writers[os.path.realpath(request.out)] = number
    return requests


def distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the entries of a JSON object. Raise ValueError if a key is given twice, of which JSON keeps the last."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)} is given twice. Remove one")
    return values


def check_order(request: Request, writers: Mapping[str, int]) -> None:
    """Raise ValueError if `request` writes or reads a file that an earlier line writes, by the path of its file."""
    if earlier := writers.get(os.path.realpath(request.out)):
        raise ValueError(f"line {earlier} writes {request.out} too: give one of them another out")
    for image in request.inputs:  # they are read before the first image is generated
        if earlier := writers.get(os.path.realpath(image)):
            what = f"mask={image} is what" if image == request.mask else f"images contains {image}, which"
            raise ValueError(f"{what} line {earlier} writes: generate that line first, with a command of its own")


def parse_request(line: Any, index: int, count: int, defaults: Mapping[str, Any], say: Say) -> Request:
    """Return the request in the line `index` of `count`. Raises TypeError or ValueError for an invalid one."""
    if not isinstance(line, dict):
        raise ValueError(f"{line!r} is not an object such as {{" + '"prompt": "..."}')
    if unknown := [key for key in line if key not in KEYS]:
        raise ValueError(f"{unknown[0]!r} must be one of {', '.join(KEYS)}")
    if not isinstance(line.get("prompt"), str):
        raise ValueError(f"prompt={line.get('prompt')!r} must be a string")
    values = {**defaults, "seed": defaults["seed"] + index, **line}
    out, name, images = Path(defaults["out"]), line.get("out"), values["images"]
    if name is not None and (not isinstance(name, str) or not name):
        raise ValueError(f"out={name!r} must be a file name")
    if name is not None or count > 1:
        out = out.parent / user_path(name) if name else out.with_name(f"{out.stem}_{index:03d}{out.suffix}")
    if not isinstance(images, list) or not all(isinstance(path, str | Path) for path in images):
        raise ValueError(f"images={images!r} must be a list of paths")
    if not isinstance(mask := values.get("mask"), str | Path | None):
        raise ValueError(f"mask={mask!r} must be a path")
    files = {"out": out, "images": tuple(map(user_path, images)), "mask": None if mask is None else user_path(mask)}
    return Request(**round_sizes(values | files, say))
