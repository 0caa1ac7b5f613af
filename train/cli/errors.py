"""Turn errors of the command line into one message each: the setting, the problem, the remedy."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

import hydra
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from data.sources.base import BadData
from train.config.instantiate import unknown_setting
from train.config.paths import CONFIG

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


def format_error(error: Exception, overrides: Sequence[str] = (), name: str = "train") -> str:
    """Return the message of an error that a user can fix: one line, or one for each bad sample."""
    if isinstance(error, BadData):
        return str(error)
    text = " ".join(" ".join([str(error), *getattr(error, "__notes__", ())]).split())
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
        return f"{error.override!r} cannot be parsed: write key=value, and quote a value with special characters"
    if found := re.match(r"Could not override '(.+?)'", text):
        words = [item for item in overrides if item.lstrip("+~").partition("=")[0] == found[1]] or [found[1]]
        if (CONFIG / found[1]).is_dir():
            return f"{words[0]}: no {found[1]} is chosen yet. Write +{words[0]}"
        return unknown_setting(words[0], known_settings(overrides, name))
    if text.startswith("Config group override must be"):
        return f"a group must be set to the name of a choice, as in model=tiny ({text})"
    if isinstance(error, OmegaConfBaseException | HydraException):
        return f"configuration: {text} (settings and choices are in conf/; --help lists them)"
    return text


PLUGINS = {"hydra_optuna_sweeper": "optuna", "hydra_submitit_launcher": "slurm"}  # the extra that installs each


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
