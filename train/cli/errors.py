"""Turn errors of the command line into one message each: the setting, the problem, the remedy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

import hydra
import torch
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from data.files import NO_ROOM
from data.sources.base import BadData
from flux2.utils.files import NotWritten
from flux2.utils.text import quote_word
from train.config.instantiate import unknown_setting
from train.config.paths import CONFIG
from train.utils.redact import may_be_secret
from train.utils.text import in_quotes

USER_ERRORS = (ValueError, OSError, OmegaConfBaseException, HydraException, torch.OutOfMemoryError)


def all_keys(config: DictConfig, prefix: str = "") -> list[str]:
    """Return all keys of a configuration, including groups."""
    found = []
    for key in config:
        found.append(f"{prefix}{key}")
        node = config._get_node(key)
        if isinstance(node, DictConfig) and not node._is_missing() and not node._is_none():
            found += all_keys(node, f"{prefix}{key}.")
    return found


def known_settings(overrides: Sequence[str], name: str = "train") -> list[str]:
    """Return the keys of conf/`name`.yaml, with the choices among `overrides` if they compose."""
    chosen = [text for text in overrides if (CONFIG / text.lstrip("+~").partition("=")[0]).is_dir()]
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONFIG), version_base="1.3"):
        try:
            return all_keys(hydra.compose(name, chosen))
        except (HydraException, OmegaConfBaseException):
            return all_keys(hydra.compose(name))


def quoted_override(word: str, *, sweep: bool = False) -> str | None:
    """Return the override `key=value` with its value, or the items of its list, in quotes, ready to paste into a shell.

    With `sweep`, the value is a list of choices. Return None if Hydra does not read the quoted form as what was meant.
    """
    key, _, value = word.partition("=")
    is_list = value.startswith("[") and value.endswith("]")
    inner = value[1:-1] if is_list else value
    if may_be_secret(key) or "\n" in value or inner[:1] in ("[", "{") or (is_list and set(inner) & set("[]{}")):
        return None  # of lists within lists it is not clear what was meant
    items = [item.strip() for item in inner.split(",")]
    if (is_list or sweep) and any(item[:1] in ("'", '"') for item in items):
        return None  # some are in quotes already, and a comma may be within them
    choices, forms = sweep and len(items) > 1 and not is_list, []
    for quote in "\"'":
        texts = [in_quotes(item, quote) for item in items]
        whole = f"[{','.join(texts)}]" if is_list else ",".join(texts) if choices else in_quotes(value, quote)
        try:
            found = OverridesParser.create().parse_override(f"{key}={whole}")
        except HydraException:
            continue
        read = [choice.text for choice in found.value().list] if found.is_sweep_override() else found.value()
        if read == (items if is_list or choices else value):
            forms.append(quote_word(f"{key}={whole}"))
    return min(forms, key=len, default=None)


def check_no_switches(words: Sequence[str], name: str = "train") -> None:
    """Raise ValueError for `--steps 100`, with the form that is read; Hydra's own switches are left to Hydra."""
    _, unknown = get_args_parser().parse_known_args(list(words))
    switch = next((word for word in unknown if re.match(r"--?[A-Za-z]", word)), None)
    if switch is None:
        return
    option, is_assigned, value = switch.partition("=")
    key = option.lstrip("-").replace("-", "_")
    if not is_assigned:
        following = list(words)[list(words).index(switch) + 1 :][:1]
        value = next((word for word in following if not word.startswith("-") and "=" not in word), "true")
    known = known_settings(words, name)
    shown = f"{key}={'...' if may_be_secret(key) else value}"
    remedy = f"Write {quote_word(shown)}" if key in known else unknown_setting(shown, known)
    raise ValueError(f"{option}: settings are written without dashes, as key=value. {remedy}")


def unreadable(word: str, overrides: Sequence[str]) -> str:
    """Return the message for an override that Hydra cannot read, with a form that it can."""
    quoted = quoted_override(word, sweep=bool({"-m", "--multirun"} & set(overrides))) if "=" in word else None
    if quoted is None:
        shown = f"{word.partition('=')[0]}=..." if may_be_secret(word.partition("=")[0]) else repr(word)
        return f"{shown} cannot be parsed: write key=value, with quotes within quotes: 'key=\"value\"'"
    return f"{word} cannot be parsed, because Hydra needs quotes of its own around special characters. Write {quoted}"


def format_error(error: Exception, overrides: Sequence[str] = (), name: str = "train") -> str:
    """Return the message of an error that a user can fix: one line, or one for each bad sample."""
    if isinstance(error, BadData):
        return str(error)
    message = str(error)
    if isinstance(error, OSError) and error.errno in NO_ROOM and error.filename:
        message = str(NotWritten(error.errno, error.strerror, error.filename))
    text = " ".join(" ".join([message, *getattr(error, "__notes__", ())]).split())
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of GPU memory ({text}). Try memory.checkpointing=full, then a smaller batch_size or resolution"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        options = [option for option in error.options if not option.startswith("_")]  # parts of other files
        close = difflib.get_close_matches(choice, options, 1)
        hint = f"did you mean {close[0]}?" if close else f"choose one of {', '.join(options)}"
        return f"{group}={choice} is not a choice; {hint}"
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} is missing: add {error.full_key}=..."
    if isinstance(error, OverrideParseException):
        return unreadable(str(error.override), overrides)
    if (word := re.match(r"(?:Ambiguous value for argument|Sweep parameters) '(.*?)'(?: 1\. To| requires)", text)) and (
        quoted := quoted_override(word[1])
    ):
        return f"{word[1]} is several values, which need -m (a sweep). If it is one text, write {quoted}"
    if found := re.match(r"Could not override '(.+?)'", text):
        words = [item for item in overrides if item.lstrip("+~").partition("=")[0] == found[1]] or [found[1]]
        if found[1] == "accelerate":
            return f"{words[0]}: conf/accelerate is for the launcher: accelerate launch --config_file FILE train/run.py"
        if (CONFIG / found[1]).is_dir():
            return f"{words[0]}: no {found[1]} is chosen yet. Write +{words[0]}"
        return unknown_setting(words[0], known_settings(overrides, name))
    if text.startswith("Config group override must be"):
        return f"a group must be set to the name of a choice, as in model=tiny ({text})"
    if isinstance(error, OmegaConfBaseException | HydraException):
        return f"configuration: {text} (settings and choices are in conf/; --help lists them)"
    return text


PLUGINS = {"hydra_optuna_sweeper": "optuna", "hydra_submitit_launcher": "slurm"}  # the extra that installs each


def no_choice(error: Exception, overrides: Sequence[str]) -> ValueError | None:
    """Return the user error for a group that is set to a list of lists, on which Hydra itself fails."""
    if not isinstance(error, TypeError):
        return None
    for word in overrides:
        key, _, value = word.lstrip("+~").partition("=")
        group = key.partition("@")[0]
        if value.startswith(("[", "{")) and (CONFIG / group).is_dir():
            return ValueError(f"{word}: a group must be set to the name of a choice, as in model=tiny")
    return None


def no_plugin(error: Exception) -> ValueError | None:
    """Return the user error for a plugin of Hydra that is not installed, None for any other error."""
    extra = next((extra for plugin, extra in PLUGINS.items() if f"hydra_plugins.{plugin}" in str(error)), None)
    if extra is None or not isinstance(error, RuntimeError | ImportError):
        return None
    return ValueError(
        f"hydra/sweeper=optuna and hydra/launcher=slurm are extras. Run pip install 'flux2-lora[{extra}]'"
    )


def lost_jobs(error: Exception) -> ValueError | None:
    """Return the user error for a submitted job without a result, because its node failed or it was canceled."""
    if not type(error).__module__.startswith("submitit."):
        return None
    return ValueError(
        f"a job ended without a result ({str(error).splitlines()[0]}). The other jobs continue, but this command no "
        "longer waits for them. When they have ended, run python train/sweep.py FOLDER"
    )
