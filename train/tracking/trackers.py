"""Where the numbers of a run go: always `metrics.jsonl` in its folder, and a tracker if one is chosen.

A tracker gets the numbers, the sample grids and the configuration without its secrets (train/utils/redact.py), and
nothing that it would find by itself: no command line, no environment, no output of the terminal, no code. What
fails in a tracker is a warning, and training continues.
"""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any, Protocol

from train.utils.console import warn
from train.utils.redact import masked_text

INIT_SECONDS = 30.0  # that wandb's server may take at the start
FINISH_SECONDS = 120.0  # and at the end; what was not sent then is on disk


class Tracker(Protocol):
    """Where numbers and pictures go beside the run folder.

    Attributes:
        run_id: what the tracker calls this run, once it was started; None where it has no name for it.
    """

    run_id: str | None

    def start(self, folder: Path, name: str, config: dict[str, Any]) -> None:
        """Before the first value; `config` is the resolved configuration."""

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def picture(self, step: int, file: Path) -> None: ...

    def finish(self) -> None: ...


class NoTracker:
    """metrics.jsonl is enough."""

    run_id: str | None = None

    def start(self, folder: Path, name: str, config: dict[str, Any]) -> None:
        return

    def log(self, step: int, values: dict[str, float]) -> None:
        return

    def picture(self, step: int, file: Path) -> None:
        return

    def finish(self) -> None:
        return


class WandbTracker:
    """Weights & Biases. A resumed run goes on under the same id, which is kept in the run folder.

    If the server cannot be reached at the start, the run is kept offline, and `wandb sync` sends it later.

    Args:
        project, entity: where the run is filed.
        mode: online, offline or disabled.
    """

    run_id: str | None = None

    def __init__(self, project: str = "flux2-lora", entity: str | None = None, mode: str = "online") -> None:
        if mode not in ("online", "offline", "disabled"):
            raise ValueError(f"tracker.mode={mode!r} must be online, offline or disabled")
        self.project, self.entity, self.mode = project, entity, mode

    def start(self, folder: Path, name: str, config: dict[str, Any]) -> None:
        """Raises ValueError if there is no login, or the server refuses it."""
        import wandb

        kept = folder / "wandb_id"
        self.run_id = kept.read_text() if kept.exists() else uuid.uuid4().hex[:8]
        about = {"name": masked_text(f"{name}/{folder.name}"), "config": config, "dir": str(folder)}
        try:
            self._run = self._init(self.mode, about)
        except (wandb.errors.UsageError, wandb.errors.AuthenticationError) as error:
            raise ValueError(f"tracker=wandb: {error}. Run `wandb login`, or use tracker.mode=offline") from error
        except wandb.errors.Error as error:
            later = f"`wandb sync {folder}/wandb/offline-run-*` sends it"
            warn(f"tracker=wandb: {masked_text(str(error))}. The run is kept offline: {later}")
            wandb.teardown()  # or the id would be in use
            self._run = self._init("offline", about)
        kept.write_text(self.run_id)

    def _init(self, mode: str, about: dict[str, Any]) -> Any:
        import wandb

        settings: dict[str, Any] = {
            "console": "off",  # what a terminal shows may hold anything
            "x_disable_meta": True,  # command line, user, host, folders
            "disable_git": True,  # the address of a remote may hold a token, and a patch whatever was being written
            "disable_code": True,
            "save_code": False,
            "init_timeout": INIT_SECONDS,
        }
        for key in ("max_end_of_run_history_metrics", "max_end_of_run_summary_metrics"):
            if key in wandb.Settings.model_fields:  # or it draws all numbers before the run says what it gave
                settings[key] = 0
        if "finish_timeout" in wandb.Settings.model_fields:  # of newer ones; without it a dead network holds the end
            settings["finish_timeout"] = FINISH_SECONDS
        return wandb.init(
            project=self.project,
            entity=self.entity,
            mode=mode,  # type: ignore[arg-type]
            id=self.run_id,
            resume="allow",
            settings=wandb.Settings(**settings),
            **about,
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def picture(self, step: int, file: Path) -> None:
        import wandb

        self._run.log({"samples": wandb.Image(str(file))}, step=step)

    def finish(self) -> None:
        self._run.finish()


class TensorBoardTracker:
    """TensorBoard event files in `<run folder>/tensorboard`."""

    run_id: str | None = None

    def start(self, folder: Path, name: str, config: dict[str, Any]) -> None:
        """Raises ValueError if TensorBoard is not installed, or its folder cannot be written."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError("tracker=tensorboard needs TensorBoard: pip install 'flux2-lora[tensorboard]'") from error
        place = folder / "tensorboard"
        try:
            self._writer = SummaryWriter(place)
        except OSError as error:
            raise ValueError(
                f"tracker=tensorboard: {place} cannot be written ({error.strerror or error}): remove what is in its "
                "place, or train without it (tracker=none); metrics.jsonl has the same numbers"
            ) from error
        self._writer.add_text("config", f"```\n{json.dumps(config, indent=2)}\n```")

    def log(self, step: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def picture(self, step: int, file: Path) -> None:
        import numpy as np
        from PIL import Image

        self._writer.add_image("samples", np.asarray(Image.open(file).convert("RGB")), step, dataformats="HWC")

    def finish(self) -> None:
        self._writer.close()
