"""Turn a group of the configuration into an object, and reject unknown keys.

Hydra accepts a misspelled key after a `+`; `parse_settings` and `instantiate` reject it and suggest the nearest one.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import logging
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, partial
from typing import Any, cast

from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from flux2.utils.text import listed
from train.config.paths import CONFIG
from train.utils.files import read_yaml
from train.utils.redact import may_be_secret

DIRECTIVES = ("_target_", "_partial_", "_recursive_")  # keys of a group that are not settings

logging.getLogger("hydra.utils").setLevel(logging.CRITICAL)  # it logs the errors that are also raised


def unknown_setting(given: str, known: Iterable[str]) -> str:
    """Return the error message for the unknown key `given` (or `key=value`), with the nearest of `known` keys."""
    key, choices = given.lstrip("+~").partition("=")[0], list(known)
    if may_be_secret(key):
        given = f"{key}=..."  # errors are logged
    group, _, name = key.rpartition(".")
    siblings = {choice.rpartition(".")[2]: choice for choice in choices if choice.rpartition(".")[0] == group}
    close = (
        [siblings[match] for match in difflib.get_close_matches(name, siblings, 2)]
        or [choice for choice in choices if choice.rpartition(".")[2] == name]
        or difflib.get_close_matches(key, [] if siblings else choices, 2, cutoff=0.75)
    )
    if not choices:
        return f"{given} is not a setting; {f'{group} has none' if group else 'there are none'}"
    if close:
        return f"{given} is not a setting; did you mean {' or '.join(close)}?"
    return f"{given} is not a setting; choose one of {', '.join(siblings.values() or choices)}"


def how_to_quote(key: str) -> str:
    """Return how a text that Hydra reads as another type, such as 2024 or true, is given."""
    return f"write '{key}=\"...\"', with both kinds of quotes, to give a number or a word such as true as text"


def to_plain(config: DictConfig) -> dict[str, Any]:
    """Return a composed configuration as plain values. Raise ValueError that names all missing settings."""
    if missing := sorted(OmegaConf.missing_keys(config)):
        verb = "is" if len(missing) == 1 else "are"
        raise ValueError(f"{listed(missing)} {verb} missing: add {' '.join(f'{key}=...' for key in missing)}")
    return cast(dict[str, Any], OmegaConf.to_container(config, resolve=True, throw_on_missing=True))


def check_keys(group: str, given: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raise ValueError for the first key of `given` that is not in `known`. `group` is "" for top-level keys."""
    prefix, names = f"{group}." if group else "", list(known)
    for key, value in given.items():
        if key not in names:
            raise ValueError(unknown_setting(f"{prefix}{key}={value!r}", [prefix + name for name in names]))


def parse_settings(group: str, given: Mapping[str, Any], accepted: Callable[..., Any]) -> Any:
    """Return `accepted(**given)` for a dataclass. Raise ValueError for an unknown, missing or mistyped key."""
    fields, hints = dataclasses.fields(accepted), typing.get_type_hints(accepted)  # type: ignore[arg-type]
    check_keys(group, given, [field.name for field in fields])
    prefix = f"{group}." if group else ""
    for field in fields:
        if field.name not in given and field.default is field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{prefix}{field.name} is missing. Give it a value.")
        value, hint = given.get(field.name, ""), hints[field.name]
        if hint in (str, str | None) and not isinstance(value, hint):
            key, null = prefix + field.name, "" if hint is str else ", or null"
            raise ValueError(f"{key}={value!r} must be a string{null}: {how_to_quote(key)}")
    try:
        return accepted(**given)
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(prefix) else f"{prefix}{error}") from error


def accepted_names(target: Callable[..., Any]) -> list[str] | None:
    """Return the argument names of `target`; None if it takes any, or its signature is not available."""
    try:
        parameters = inspect.signature(target).parameters.values()
    except ValueError:
        return None
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    return None if takes_any else [parameter.name for parameter in parameters]


def instantiate(group: str, given: Mapping[str, Any], excluded: Sequence[str] = ()) -> Any:
    """Return the object that a group's `_target_` makes. Its ValueErrors propagate unchanged.

    This is Hydra's `instantiate` without interpolation: values are resolved once, when the configuration is composed,
    and a text such as `${oc.env:HOME}` that is left in them is a text.

    Args:
        excluded: Arguments of the target that are passed later and are not settings.
    """
    target = given.get("_target_")
    if not isinstance(target, str) or not target:
        raise ValueError(f"{group}._target_={target!r} must be the name of a class or a function")
    settings = {key: value for key, value in given.items() if key not in DIRECTIVES}
    try:
        called = get_object(target)
        known = accepted_names(called)
        if known is not None:
            check_keys(group, settings, [name for name in known if name not in excluded])
        if given.get("_recursive_", True):
            settings = {key: instantiate_within(f"{group}.{key}", value) for key, value in settings.items()}
        return partial(called, **settings) if given.get("_partial_") else called(**settings)
    except ValueError:
        raise
    except Exception as error:  # of any library that the target belongs to
        raise ValueError(f"{group}: {error}") from error


def instantiate_within(key: str, value: Any) -> Any:
    """Return `value`, the setting `key`, with every group in it that has a `_target_` made into its object."""
    if isinstance(value, Mapping):
        if "_target_" in value:
            return instantiate(key, value)
        return {name: instantiate_within(f"{key}.{name}", item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [instantiate_within(f"{key}.{i}", item) for i, item in enumerate(value)]
    return value


@cache
def own_targets(group: str) -> dict[str, set[str]]:
    """Return the targets that the files of conf/`group` name: under "" for the group, else under their key in it."""
    found: dict[str, set[str]] = {}

    def collect(key: str, value: Any) -> None:
        if isinstance(value, Mapping):
            if "_target_" in value:
                found.setdefault(key, set()).add(value["_target_"])
            for name, item in value.items():
                collect(str(name), item)

    for file in sorted((CONFIG / group).glob("*.yaml")):
        collect("", read_yaml(file))
    return found


def check_own_targets(group: str, given: Any, key: str = "") -> None:
    """Raise ValueError if a group from a run folder would make anything but what the files of conf/`group` make.

    A run folder may come from someone else, and a `_target_` may name any function of any library.
    """
    if isinstance(given, list):
        for item in given:
            check_own_targets(group, item, key)
    if not isinstance(given, Mapping):
        return
    targets = own_targets(group)
    allowed = targets.get(key, targets[""])
    for name, value in given.items():
        is_ours = name in DIRECTIVES and (name != "_target_" or (isinstance(value, str) and value in allowed))
        if str(name).startswith("_") and not is_ours:
            raise ValueError(
                f"{group}: {name}={value!r} in the configuration of the run folder is not one of conf/{group}, and "
                "only these are made of a run folder, which may come from someone else. To use it, correct the "
                "folder's config.yaml"
            )
        check_own_targets(group, value, str(name) if name in targets else key)
