"""Trackers, which get the metrics of a run in addition to `metrics.jsonl`.

A tracker gets the metrics, the sample grids and the configuration with its secrets masked (train/utils/redact.py), and
must not collect anything itself: no command line, environment, terminal output or code. Its failures are warnings.

accelerate.tracking does not replace these classes: its wandb tracker only forwards to `wandb.init` and `run.log`, so
that settings, offline fallback, id and timeouts would stay here, and its TensorBoard tracker accepts no nested
configuration.
"""

from __future__ import annotations

import inspect
import json
import re
import uuid
from pathlib import Path
from typing import Any

from flux2.utils.files import write_text
from flux2.utils.images import open_image
from train.utils.console import warn
from train.utils.files import reason
from train.utils.redact import check_no_secret, masked_text

INIT_SECONDS = 30.0  # timeout of wandb's server at the start
FINISH_SECONDS = 120.0  # timeout at the end; data that was not sent is on disk


class NoTracker:
    """No tracker in addition to metrics.jsonl, and the base class of trackers."""

    run_id: str | None = None  # the tracker's id of this run after `start`, if it has one

    def check(self) -> None:
        """Raise ValueError, before anything is computed, if `start` is known to fail."""

    def start(self, folder: Path, name: str, config: dict[str, Any]) -> None:
        """Start the run with its resolved configuration."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Log the metrics of a step."""

    def picture(self, step: int, file: Path) -> None:
        """Log a sample grid."""

    def finish(self) -> None:
        """End the run."""


def read_run_id(file: Path) -> str | None:
    """Return the id of the resumed run in wandb; None, with a warning, if it cannot be read, or if there is none."""
    if not file.exists():
        return None
    try:
        found = file.read_text(encoding="utf-8").strip()
        if re.fullmatch(r"[\w-]{1,64}", found, re.ASCII):
            return found
        problem = "is not the id of a run"
    except (OSError, UnicodeDecodeError) as error:
        problem = f"cannot be read ({error})"
    warn(f"tracker=wandb: {file} {problem}: the resumed run gets a new id")
    return None


class WandbTracker(NoTracker):
    """Weights & Biases. A resumed run keeps its id; without a server the run is stored offline for `wandb sync`."""

    def __init__(self, project: str = "flux2-lora", entity: str | None = None, mode: str = "online") -> None:
        if mode not in ("online", "offline", "disabled"):
            raise ValueError(f"tracker.mode={mode!r} must be one of online, offline, disabled")
        for key, value in (("project", project), ("entity", entity)):
            check_no_secret(f"tracker.{key}", value)
        self.project, self.entity, self.mode = project, entity, mode

    def check(self) -> None:
        """Raise ValueError without a login; whether the server accepts it is known at the start."""
        import wandb

        has_switch = "prompt" in inspect.signature(wandb.login).parameters  # older versions may ask in the terminal
        is_known = wandb.login(prompt=False, verify=False) if has_switch else wandb.api.api_key is not None
        if self.mode == "online" and not is_known:
            raise ValueError("tracker=wandb: there is no login. Run `wandb login`, or use tracker.mode=offline")

    def start(self, folder: Path, name: str, config: dict[str, Any]) -> None:
        """Start the run. Raise ValueError if there is no login or the server rejects it."""
        import wandb

        id_file = folder / "wandb_id"
        self.run_id = read_run_id(id_file) or uuid.uuid4().hex[:8]
        settings: dict[str, Any] = {
            "console": "off",  # terminal output may contain anything
            "x_disable_meta": True,  # command line, user, host, folders
            "disable_git": True,  # the URL of a remote may contain a token, and a patch anything
            "disable_code": True,
            "save_code": False,
            "init_timeout": INIT_SECONDS,
        }
        newer = {
            "max_end_of_run_history_metrics": 0,  # no charts in the terminal at the end of a run
            "max_end_of_run_summary_metrics": 0,
            "finish_timeout": FINISH_SECONDS,  # without it a dead network blocks the end
        }
        settings |= {key: value for key, value in newer.items() if key in wandb.Settings.model_fields}
        run: dict[str, Any] = {"project": self.project, "entity": self.entity, "mode": self.mode, "id": self.run_id}
        run |= {"name": masked_text(f"{name}/{folder.name}"), "config": config, "dir": str(folder)}
        run |= {"resume": "allow", "settings": wandb.Settings(**settings)}
        try:
            self._run = wandb.init(**run)
        except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
            raise ValueError(f"tracker=wandb: {error}. Run `wandb login`, or use tracker.mode=offline") from error
        except wandb.errors.Error as error:
            later = f"`wandb sync {folder}/wandb/offline-run-*` sends it"
            warn(f"tracker=wandb: {masked_text(str(error))}. The run is stored offline: {later}")
            wandb.teardown()  # otherwise the id would be in use
            self._run = wandb.init(**run | {"mode": "offline", "settings": wandb.Settings(**settings)})
        write_text(id_file, self.run_id)

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def picture(self, step: int, file: Path) -> None:
        import wandb

        self._run.log({"samples": wandb.Image(str(file))}, step=step)

    def finish(self) -> None:
        self._run.finish()


class TensorBoardTracker(NoTracker):
    """TensorBoard event files in `<run folder>/tensorboard`."""

    def check(self) -> None:
        """Raise ValueError if TensorBoard is not installed."""
        try:
            from torch.utils.tensorboard import SummaryWriter  # noqa: F401
        except ImportError as error:
            raise ValueError("tracker=tensorboard needs TensorBoard: pip install 'flux2-lora[tensorboard]'") from error

    def start(self, folder: Path, name: str, config: dict[str, Any]) -> None:
        """Start the run. Raise ValueError if TensorBoard is not installed or its folder cannot be written."""
        self.check()
        from torch.utils.tensorboard import SummaryWriter

        events = folder / "tensorboard"
        try:
            self._writer = SummaryWriter(events)
        except OSError as error:
            raise ValueError(
                f"tracker=tensorboard: {events} cannot be written ({reason(error)}). Remove what is in its "
                "place, or train without it (tracker=none); metrics.jsonl has the same metrics"
            ) from error
        self._writer.add_text("config", f"```\n{json.dumps(config, indent=2)}\n```")

    def log(self, step: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def picture(self, step: int, file: Path) -> None:
        import numpy as np

        with open_image(file) as image:
            pixels = np.asarray(image.convert("RGB"))
        self._writer.add_image("samples", pixels, step, dataformats="HWC")

    def finish(self) -> None:
        self._writer.close()
