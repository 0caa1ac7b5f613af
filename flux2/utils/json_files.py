"""Reading of text and JSON files that someone else may have written: bounded in size, depth and numbers, one error.

The `json` module alone reads files of any size, ends in a RecursionError for `[[[[...`, and returns integers of any
length, which then fail wherever they become a float.
"""

import json
from pathlib import Path
from typing import Any

MOST_BYTES = 64 << 20  # the largest file of this kind is the index of a model, which has less than 1 MB
MOST_DEPTH = 32
MOST_DIGITS = 20  # of an integer; 2 ** 64 has 20


def read_text(file: Path, most: int = MOST_BYTES) -> str:
    """Return the UTF-8 text in a regular file of up to `most` bytes. Raise ValueError, naming the file, otherwise."""
    try:
        if not file.is_file():  # a pipe would block
            raise ValueError(f"{file} {'is not a file' if file.exists() else 'does not exist'}")
        with file.open("rb") as stream:
            content = stream.read(most + 1)
        if len(content) > most:
            raise ValueError(f"{file} has more than {most:,} bytes, which no file of its kind has")
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} cannot be read: it is not UTF-8 text") from error
    except OSError as error:
        raise ValueError(f"{file} cannot be read ({error.strerror or error})") from error


def parse_json(text: str | bytes, **settings: Any) -> Any:
    """Return the value of a JSON text. Raise ValueError if it is not JSON, or nested more than `MOST_DEPTH` deep.

    An integer of more than `MOST_DIGITS` characters becomes a float, which is infinite if it is too large for one.
    `settings` are those of `json.loads`.
    """
    try:
        value = json.loads(text, parse_int=bounded_integer, **settings)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    check_depth(value)
    return value


def bounded_integer(digits: str) -> int | float:
    return int(digits) if len(digits) <= MOST_DIGITS else float(digits)


def check_depth(value: object) -> None:
    """Raise ValueError if dicts and lists are nested more than `MOST_DEPTH` deep in `value`."""
    level = [value]
    for _ in range(MOST_DEPTH + 1):
        groups = [one for one in level if isinstance(one, dict | list)]
        if not groups:
            return
        level = [inner for group in groups for inner in (group.values() if isinstance(group, dict) else group)]
    raise ValueError("it is nested too deeply")


def read_json(file: Path, most: int = MOST_BYTES) -> Any:
    """Return the value in a JSON file of up to `most` bytes. Raise ValueError, naming the file, otherwise."""
    text = read_text(file, most)
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{file} cannot be read as JSON ({error})") from error
