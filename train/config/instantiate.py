"""Turn a group of the configuration into an object, and refuse keys that nothing reads.

Hydra lets a misspelt key through behind a `+`; `parse_settings` and `instantiate` name it and the
nearest one there is.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import logging
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import get_object
from hydra.utils import instantiate as hydra_instantiate

from train.utils.redact import is_secret

logging.getLogger("hydra.utils").setLevel(logging.CRITICAL)  # it logs what it raises, which is said here in a line


def no_setting(given: str, known: Iterable[str]) -> str:
    """The message for `given` (a key, perhaps with its value), naming the nearest of `known`, else its neighbors."""
    key, choices = given.lstrip("+~").partition("=")[0], list(known)
    if is_secret(key):
        given = f"{key}=..."  # errors are logged
    group, _, name = key.rpartition(".")
    beside = {choice.rpartition(".")[2]: choice for choice in choices if choice.rpartition(".")[0] == group}
    close = (
        [beside[match] for match in difflib.get_close_matches(name, beside, 2)]
        or [choice for choice in choices if choice.rpartition(".")[2] == name]
        or difflib.get_close_matches(key, [] if beside else choices, 2, cutoff=0.75)
    )
    if not choices:
        return f"{given} is not a setting; {group} has none" if group else f"{given} is not a setting; there are none"
    hint = f"did you mean {' or '.join(close)}?" if close else f"known are {', '.join(beside.values() or choices)}"
    return f"{given} is not a setting; {hint}"


def check_keys(group: str, given: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raises ValueError for the first key of `given` that is not in `known`. `group` is "" at the top."""
    prefix = f"{group}." if group else ""
    names = list(known)
    for key, value in given.items():
        if key not in names:
            raise ValueError(no_setting(f"{prefix}{key}={value!r}", [prefix + name for name in names]))


def parse_settings(group: str, given: Mapping[str, Any], accepted: Callable[..., Any]) -> Any:
    """`accepted(**given)` for a dataclass. Raises ValueError, naming the key, for one too many, missing or mistyped."""
    fields, hints = dataclasses.fields(accepted), typing.get_type_hints(accepted)  # type: ignore[arg-type]
    check_keys(group, given, [field.name for field in fields])
    prefix = f"{group}." if group else ""
    for field in fields:
        if field.name not in given and field.default is field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{prefix}{field.name} is missing: give it a value")
        value, hint = given.get(field.name, ""), hints[field.name]
        if hint in (str, str | None) and not isinstance(value, hint):
            raise ValueError(f"{prefix}{field.name}={value!r} must be a text{'' if hint is str else ', or null'}")
    try:
        return accepted(**given)
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(prefix) else f"{prefix}{error}") from error


def accepted_names(target: Callable[..., Any]) -> list[str] | None:
    """The names of the arguments of `target`; None if it takes any, or does not say which."""
    try:
        parameters = inspect.signature(target).parameters.values()
    except ValueError:
        return None
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    return None if takes_any else [parameter.name for parameter in parameters]


@contextmanager
def silent(name: str) -> Iterator[None]:
    """Within this context the logger called `name` says nothing."""
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def instantiate(group: str, given: Mapping[str, Any], ours: Sequence[str] = ()) -> Any:
    """The object that a group's `_target_` makes. What it refuses is raised as it said it.

    Args:
        ours: its arguments that are no settings, being given later.
    """
    target = given.get("_target_")
    if not isinstance(target, str) or not target:
        raise ValueError(f"{group}._target_={target!r} must be the name of a class or a function")
    try:
        with silent("hydra.utils"):  # which prints what is said here once more
            known = accepted_names(get_object(target))
        if known is not None:
            settings = {key: value for key, value in given.items() if not key.startswith("_")}
            check_keys(group, settings, [name for name in known if name not in ours])
        return hydra_instantiate(given, _convert_="object")
    except (InstantiationException, ImportError, KeyError, TypeError) as error:
        cause: BaseException = error
        while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
            cause = cause.__cause__
        if isinstance(cause, ValueError):
            raise cause from error
        raise ValueError(f"{group}: {cause}") from error
