"""Masking of secrets in everything that a run writes: configurations, command lines and messages.

A secret is recognized by its key (`token`, `api_key`), by its form (`hf_...`, `user:password@` in a URL), or because it
is the value of an environment variable with such a name or the Hub login. A masked value is `***`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import huggingface_hub

from flux2.utils.text import join_words

MASK = "***"
SHORTEST = 8  # characters; shorter values of environment variables are switches, and occur in ordinary words
WORDS = set(
    "apikey auth authorization bearer cookie credential credentials header headers passphrase passwd password pwd "
    "secret secrets sig signature token".split()
)
ENDINGS = ("token", "password", "secret", "apikey", "auth")  # as in `hftoken`
BEGINNINGS = ("secret", "passw", "apikey", "credential")  # as in `secretkey`
LIKE_SECRET = re.compile("token|secret|passw|api.?key|auth|header|bearer|credential", re.IGNORECASE)
KEYS_OF = {"api", "access", "private"}  # words before `key` in the name of a secret
FORMS = (
    r"\bhf_[A-Za-z0-9]{20,}",
    r"\bapi_org_[A-Za-z0-9]{20,}",
    r"\bwandb_v\d_[A-Za-z0-9_]{20,}",
    r"\bsk-[A-Za-z0-9_-]{20,}",
    r"\bgh[pousr]_[A-Za-z0-9]{20,}",
    r"\bgithub_pat_[A-Za-z0-9_]{20,}",
    r"\bglpat-[A-Za-z0-9_-]{20,}",
    r"\bxox[abprs]-[A-Za-z0-9-]{10,}",
    r"\bAKIA[0-9A-Z]{16}\b",
    r"\beyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]*",  # JSON web tokens
    r"(?i:(?<=\bbearer )(?=\S*\d)[A-Za-z0-9._~+/=-]{16,})",
    r"(?i:(?<=\bbasic )(?=\S*\d)[A-Za-z0-9+/]{16,}={0,2})",
    r"(?<=://)[^/\s@]+(?=@)",  # user and password
)
FORM = re.compile("|".join(FORMS))
QUERY = re.compile(r"(?<=[?&])([\w.~-]+)(=)([^&\s#'\"]+)")
SETTING = re.compile(r"(?<![\w.-])([\w.+~-]+)(=)(\"[^\"]*\"|'[^']*'|[^\s,}\])'\"]+)")
ASSIGNED = re.compile(r"(?<![\w.-])([\w.-]+)(\s*[:=]\s*)(\"[^\"]*\"|'[^']*'|[^\s,}\])]+)")


@lru_cache(maxsize=4096)
def is_secret(key: str) -> bool:
    """Return whether a value under this key is a secret."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", key).lower()
    parts = [word for word in re.split(r"[^a-z0-9]+", words) if word]
    named = any(part in WORDS or part.endswith(ENDINGS) or part.startswith(BEGINNINGS) for part in parts)
    return named or any(one in KEYS_OF and two in ("key", "keys") for one, two in pairwise(parts))


def may_be_secret(key: str) -> bool:
    """Return whether a value under this key is better not shown: also for keys that only contain such a word."""
    return is_secret(key) or LIKE_SECRET.search(key) is not None


def masked_values(pattern: re.Pattern[str], text: str) -> str:
    """Return `text` with the values of secret keys masked, where `pattern` finds (key)(separator)(value)."""
    return pattern.sub(lambda found: f"{found[1]}{found[2]}{MASK}" if is_secret(found[1]) else found[0], text)


def known_secrets() -> list[str]:
    """Return the secrets in the environment variables and the Hub login, longest first."""
    named = {value for key, value in os.environ.items() if is_secret(key)}
    values = {value.strip() for value in named | {huggingface_hub.get_token() or ""}}
    # such a variable may also hold the path of a file with the secret, which is no secret
    return sorted((v for v in values if len(v) >= SHORTEST and not os.path.exists(v)), key=len, reverse=True)


def masked_text(text: str, known: Iterable[str] | None = None) -> str:
    """Return `text` with the `known_secrets` and everything that has the form of a secret masked."""
    for value in known_secrets() if known is None else known:
        text = text.replace(value, MASK)
    return masked_values(QUERY, FORM.sub(MASK, text))


def check_no_secret(key: str, value: object) -> None:
    """Raise ValueError, without showing it, if `value` holds a secret.

    For names that others read and that a mask would change: of a run, a project, a repository.
    """
    if isinstance(value, str) and masked_text(value) != value:
        raise ValueError(f"{key} holds a secret, such as a token, and others read it. Give another name")


def masked_settings(text: str) -> str:
    """Return `masked_text` of a message that names settings, with the values of `key=value` masked for secret keys."""
    return masked_text(masked_values(SETTING, text))


def masked(value: Any, key: str = "", known: Sequence[str] | None = None) -> Any:
    """Return a configuration, or its part under `key`, masked: all strings and numbers under a key such as `token`."""
    known = known_secrets() if known is None else known
    if isinstance(value, Mapping):
        return {name: masked(item, key if is_secret(key) else str(name), known) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [masked(item, key, known) for item in value]
    if value is None or isinstance(value, bool) or value == "":
        return value
    if is_secret(key):
        return MASK
    return masked_text(value, known) if isinstance(value, str) else value


def masked_command(words: Sequence[str]) -> str:
    """Return a shell command line with its secrets masked and `~` for the home folder."""
    home = os.path.expanduser("~")

    def shown(word: str) -> str:
        word = masked_text(masked_values(ASSIGNED, word))
        return word.replace(f"{home}{os.sep}", "~/") if len(home) > 1 else word

    # also mask the word after a switch such as --token
    hidden = [i for i, word in enumerate(words[:-1], 1) if re.fullmatch(r"--?[\w-]+", word) and is_secret(word)]
    return join_words(MASK if i in hidden else shown(word) for i, word in enumerate(words))
