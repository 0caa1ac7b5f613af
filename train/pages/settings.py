"""The configuration that overrides compose, in a process that composes many of them.

Only settings that conf/ has are taken, no `_target_`, and no interpolation, which could read the environment.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from train.cli.errors import format_error, in_quotes
from train.cli.start import prepare_hydra
from train.config.paths import CONFIG

NAME = re.compile(r"[a-z][\w.]*")
COMPOSING = threading.Lock()  # Hydra keeps what it composes from in one place of the process


class SettingError(ValueError):
    """A setting that cannot be used; `field` is its name, empty if it is not known which it is."""

    def __init__(self, text: str, field: str = "") -> None:
        super().__init__(text)
        self.field = field


def choices(group: str) -> list[str]:
    """Return the names of the files of conf/`group` that one can choose."""
    return sorted(file.stem for file in (CONFIG / group).glob("[!_]*.yaml"))


def compose(overrides: Sequence[str]) -> DictConfig:
    """Return the composed configuration of a run. Raises SettingError for overrides that cannot be used."""
    with COMPOSING:
        GlobalHydra.instance().clear()
        prepare_hydra()
        try:
            with hydra.initialize_config_dir(str(CONFIG), version_base="1.3"):
                return hydra.compose("train", list(overrides))
        except (HydraException, OmegaConfBaseException, ValueError) as error:
            raise error_of(error, overrides) from error
        finally:
            GlobalHydra.instance().clear()


def override(name: str, value: str) -> str:
    """Return the override `name=value`, with Hydra's quotes where the value would be read as something else.

    Raises SettingError for a name that is none, and for an interpolation.
    """
    if not NAME.fullmatch(name) or "_target_" in name or name.partition(".")[0] == "hydra":
        raise SettingError(f"{name!r} is no setting", name)
    if "${" in value:
        raise SettingError(f"{name}={value!r}: interpolations such as ${{oc.env:HOME}} work in a shell only", name)
    try:
        if not OverridesParser.create().parse_override(f"{name}={value}").is_sweep_override():
            return f"{name}={value}"
    except HydraException:
        pass
    return f"{name}={in_quotes(value, chr(34))}"


def error_of(error: Exception, overrides: Sequence[str]) -> SettingError:
    """Return an error of the composed configuration as one message."""
    return SettingError(format_error(error, overrides))
