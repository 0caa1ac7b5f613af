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
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import get_object
from hydra.utils import instantiate as hydra_instantiate

from train.utils.redact import may_be_secret

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
            raise ValueError(f"{prefix}{field.name}={value!r} must be a string{'' if hint is str else ', or null'}")
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

    Args:
        excluded: Arguments of the target that are passed later and are not settings.
    """
    target = given.get("_target_")
    if not isinstance(target, str) or not target:
        raise ValueError(f"{group}._target_={target!r} must be the name of a class or a function")
    try:
        known = accepted_names(get_object(target))
        if known is not None:
            settings = {key: value for key, value in given.items() if not key.startswith("_")}
            check_keys(group, settings, [name for name in known if name not in excluded])
        return hydra_instantiate(given, _convert_="object")
    except (InstantiationException, ImportError, KeyError, TypeError) as error:
        cause: BaseException = error
        while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, ValueError):
            raise cause from error
        raise ValueError(f"{group}: {cause}") from error
