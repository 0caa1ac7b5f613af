"""Start a command that Hydra composes: answer `--help` and report loading before the libraries are imported."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import Any

from data.files import user_path
from train.config.paths import CONFIG


def prepare_hydra() -> None:
    """Register the resolvers of conf/, and let conf/hydra/sweeper/optuna.yaml replace the file of Hydra's plugin."""
    from hydra.core.config_store import ConfigStore
    from hydra.core.plugins import Plugins
    from omegaconf import OmegaConf

    def first(*values: object) -> object:
        return next(value for value in values if value is not None)

    def within(folder: str | None, name: str) -> str | None:
        return None if folder is None else f"{folder}/{name}"

    def rate_for(optimizers: str, rate: float, _parent_: Any) -> float:
        """Return `rate` if the chosen optimizer is one of `optimizers`, else the rate in the file of the chosen one."""
        rates = {file.stem: OmegaConf.load(file) for file in sorted((CONFIG / "optimizer").glob("[!_]*.yaml"))}
        target = _parent_.get("_target_")  # none if the experiment's file is read by itself
        if target is None or target in [rates[name]._target_ for name in optimizers.split()]:
            return rate
        own = [each.lr for each in rates.values() if each._target_ == target]
        if not own:
            raise ValueError(
                f"optimizer.lr={rate} of the experiment is a rate for {optimizers.replace(' ', ' or ')}, not for "
                f"optimizer._target_={target}. Set optimizer.lr=..."
            )
        return own[0]

    def expand_user(path: str) -> str:
        return str(user_path(path))

    def shipped(path: str) -> str:
        """Return a file of this project by its path in a checkout; elsewhere by that in the installed package."""
        return path if Path(path).exists() else str(CONFIG.parent / path)

    for resolver in (first, within, rate_for, expand_user, shipped):
        OmegaConf.register_new_resolver(resolver.__name__, resolver, replace=True)
    Plugins.instance()  # registers a file with the name of ours, and Hydra rejects duplicates
    ConfigStore.instance().repo.get("hydra", {}).get("sweeper", {}).pop("optuna.yaml", None)


def answer_help(config_name: str) -> None:
    """Print Hydra's help, which needs no libraries, and exit if requested; return if `command` must report an error."""
    if not {"--help", "-h", "--hydra-help"} & set(sys.argv[1:]):
        return
    import hydra

    def task(_: object) -> None: ...

    task.__module__ = f"train.{Path(sys.argv[0]).stem}"  # the name shown in the help
    prepare_hydra()
    before = os.environ.get("HYDRA_FULL_ERROR", "0")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors are raised, not printed
    try:
        hydra.main(version_base="1.3", config_path=str(CONFIG), config_name=config_name)(task)()
    except Exception:
        os.environ["HYDRA_FULL_ERROR"] = before
        return
    sys.exit()


def start_command(config_name: str = "train") -> None:
    """Start a command: answer `--help`, or report that libraries load and disable garbage collection meanwhile.

    Imports create a million permanent objects. `command` excludes them from garbage collection when it enables it
    again, which saves a quarter of the CPU time of a plan.
    """
    answer_help(config_name)
    if os.environ.get("RANK", "0") == "0":
        print("loading libraries", file=sys.stderr, flush=True)
    gc.disable()
