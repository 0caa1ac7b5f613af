"""Errors of the command line as one message each: what was given, what is wrong, what to do."""

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


def flat(config: DictConfig, prefix: str = "") -> list[str]:
    """All keys of a configuration, groups among them."""
    found = []
    for key in config:
        found.append(f"{prefix}{key}")
        node = config._get_node(key)
        if isinstance(node, DictConfig) and not node._is_missing() and not node._is_none():
            found += flat(node, f"{prefix}{key}.")
    return found


def known_settings(overrides: Sequence[str], name: str = "train") -> list[str]:
    """The keys of conf/`name`.yaml that can be set, with the choices among `overrides` if they compose."""
    chosen = [text for text in overrides if (CONFIG / text.lstrip("+~").partition("=")[0]).is_dir()]
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONFIG), version_base="1.3"):
        try:
            return flat(hydra.compose(name, chosen))
        except (HydraException, OmegaConfBaseException):
            return flat(hydra.compose(name))


def format_error(error: Exception, overrides: Sequence[str] = (), name: str = "train") -> str:
    """One line for what a user can mend, and one for each bad sample."""
    if isinstance(error, BadData):
        return str(error)
    text = " ".join(" ".join([str(error), *getattr(error, "__notes__", ())]).split())
    if isinstance(error, torch.OutOfMemoryError):
        return f"out of GPU memory: try memory.checkpointing=full, then a smaller batch_size or resolution ({text})"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options:
        group, _, choice = error.missing_cfg_file.rpartition("/")
        options = [option for option in error.options if not option.startswith("_")]  # those are parts of others
        close = difflib.get_close_matches(choice, options, 1)
        return f"{group}={choice} is not a choice; " + (
            f"did you mean {close[0]}?" if close else f"choose one of {', '.join(options)}"
        )
    if isinstance(error, MissingMandatoryValue):
        return f"{error.full_key} must be given: add {error.full_key}=..."
    if isinstance(error, OverrideParseException):
        return f"{error.override!r} cannot be read: write key=value, and quote a value with special characters"
    if found := re.match(r"Could not override '(.+?)'", text):
        given = [item for item in overrides if item.lstrip("+~").partition("=")[0] == found[1]] or [found[1]]
        if (CONFIG / found[1]).is_dir():
            return f"{given[0]}: no {found[1]} is chosen yet that this could override; write +{given[0]}"
        return unknown_setting(given[0], known_settings(overrides, name))
    if text.startswith("Config group override must be"):
        return f"a group needs the name of a choice, as in model=tiny ({text})"
    if isinstance(error, OmegaConfBaseException | HydraException):
        return f"configuration: {text} (settings and choices are in conf/; --help lists them)"
    return text


PLUGINS = {"hydra_optuna_sweeper": "optuna", "hydra_submitit_launcher": "slurm"}  # the extra that brings each


def no_plugin(error: Exception) -> ValueError | None:
    """What to say if an error is of a plugin of Hydra that is not installed."""
    extra = next((extra for plugin, extra in PLUGINS.items() if f"hydra_plugins.{plugin}" in str(error)), None)
    if extra is None or not isinstance(error, RuntimeError | ImportError):
        return None
    return ValueError(f"hydra/sweeper=optuna and hydra/launcher=slurm are extras: pip install 'flux2-lora[{extra}]'")


def lost_jobs(error: Exception) -> ValueError | None:
    """What to say if an error of submitit is that a job left no result: its node failed, or it was canceled."""
    if not type(error).__module__.startswith("submitit."):
        return None
    return ValueError(
        f"a job ended without a result, and the others are no longer waited for ({str(error).splitlines()[0]}). They "
        "go on; python train/sweep.py FOLDER gives their table when they have ended"
    )
