"""Settings in a YAML file: `config=mine.yaml` stands for its lines, as if they came first on the command line.

Hydra's own files need a folder for each group, a header and a defaults list. Here a file has a line for each setting,
with the names of the command line; YAML needs none of the quotes that the shell and Hydra need:

    experiment: style
    dataset.path: my paintings (2024)
    sample:
      prompts: [a house, a fox in the snow]
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data.files import user_path
from train.config.paths import CONFIG
from train.utils.files import read_yaml
from train.utils.text import in_quotes

KEY = "config"


def with_settings_file(words: Sequence[str]) -> list[str]:
    """Return the overrides of a command line, with `config=FILE` replaced by those of the file.

    What is also on the command line is left out of the file's. Raise ValueError for a file that cannot be read, or that
    is no mapping of settings.
    """
    files = [word for word in words if key_of(word) == KEY]
    if not files:
        return list(words)
    if len(files) > 1:
        raise ValueError(f"{files[1]}: only one file of settings is read. Put all settings into one")
    path = files[0].partition("=")[2].strip("\"'")
    if not path or not user_path(path).is_file():
        problem = "is a folder" if path and user_path(path).is_dir() else "does not exist"
        raise ValueError(f"config={path} {problem}. Give a YAML file of settings (docs/data.md)")
    settings = read_yaml(user_path(path))
    if not isinstance(settings, dict) or not settings or not all(isinstance(key, str) for key in settings):
        raise ValueError(f"config={path} must hold settings, one a line: steps: 500")
    given, rest = {key_of(word) for word in words}, [word for word in words if key_of(word) != KEY]
    own: dict[str, str] = {}
    for key, word in overrides(settings, path):
        if key in own or any(holds(key, word, other) or holds(other, own[other], key) for other in own):
            raise ValueError(f"config={path} sets {key} twice. Keep one of the lines")
        own[key] = word
    return [*(word for key, word in own.items() if key not in given), *rest]


def holds(key: str, word: str, other: str) -> bool:
    """Return whether the override `word` of `key` is a mapping, in which `other` would be set again."""
    return other.startswith(f"{key}.") and word.partition("=")[2].startswith("{")


def key_of(word: str) -> str:
    """Return the key of an override; the word itself for another word, such as a switch."""
    return word.lstrip("+~").partition("=")[0]


def overrides(settings: Mapping[str, Any], path: str) -> Iterator[tuple[str, str]]:
    """Yield the key and the override of each setting of a file."""
    for key, value in settings.items():
        is_group = (CONFIG / key.partition("@")[0]).is_dir()
        if key in ("defaults", KEY, "_target_"):
            raise ValueError(f"config={path}: {key} is not read. Write the choice of a group as a line: model: dev")
        if is_group and isinstance(value, str):
            is_new = key == "experiment" or "@" in key
            yield key, f"{'+' * is_new}{key}={value}"
        elif isinstance(value, dict) and "." not in key:
            for name, item in value.items():
                yield f"{key}.{name}", f"{key}.{name}={literal(item)}"
        elif is_group:
            raise ValueError(f"config={path}: {key}={value} must be the name of a choice, as in model: dev")
        else:
            yield key, f"{key}={literal(value)}"


def literal(value: Any) -> str:
    """Return a value in the grammar of Hydra's overrides."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return in_quotes(value, '"')
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{key}: {literal(item)}' for key, item in value.items())}}}"
    return f"[{','.join(map(literal, value))}]"
