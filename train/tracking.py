"""Where the numbers of a run go: always `metrics.jsonl` in its folder, and a tracker if one is chosen.

A tracker gets the numbers, the sheets and the configuration without its secrets (train/masking.py), and nothing that it
would find by itself: no command line, no environment, no output of the terminal, no code. What fails in a tracker is a
warning, and training goes on.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from train.masking import masked, masked_text
from train.utils.console import warn

METRICS_FILE, VALIDATION_FILE = "metrics.jsonl", "validation.jsonl"
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


def read(file: Path) -> list[dict[str, Any]]:
    """All lines that are whole: a killed process or a full disk may have left others, which are skipped."""
    found = []
    for line in file.read_text(errors="replace").splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict) and isinstance(values.get("step"), int):
            found.append(values)
    return found


class Metrics:
    """`metrics.jsonl`, one JSON object a line, and the tracker beside it; used by the main process alone.

    `validation.jsonl` is likewise, with the loss of each validated sample, for whoever compares steps.
    What a resumed run had logged past the checkpoint it goes on from is dropped from the files: a step is in them once.
    """

    def __init__(self, folder: Path, tracker: Tracker) -> None:
        self.folder, self.file, self.tracker = folder, folder / METRICS_FILE, tracker
        self.validation_file = folder / VALIDATION_FILE
        self._started = False
        self._said: set[str] = set()
        self._unwritten: dict[Path, bytes] = {}

    def start(self, name: str, config: dict[str, Any], step: int) -> None:
        """Before the first value of a run that has done `step` steps. Raises ValueError if nothing can be written."""
        for file in (self.file, self.validation_file):
            try:
                if file == self.file:
                    file.touch()
                if file.exists() and file.stat().st_size:
                    kept = [line for line in read(file) if 0 < step >= line["step"]]
                    temporary = file.with_suffix(".part")
                    temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
                    temporary.replace(file)
            except OSError as error:
                raise ValueError(
                    f"{file}, for the numbers of this run, cannot be written ({error.strerror or error}): make room, "
                    "or move away what is there"
                ) from error
        self.tracker.start(self.folder, name, masked(config))
        self._started = True

    @property
    def tracker_id(self) -> str | None:
        """Under which the tracker knows this run, if it gives it a name of its own."""
        return getattr(self.tracker, "run_id", None)

    def close(self) -> None:
        """After the last value, also of a run that failed; does nothing where it was not started."""
        if self._started:
            self._track("finish", self.tracker.finish)

    def log(self, step: int, **values: float) -> None:
        self._append(self.file, step, values)
        self._track("log", self.tracker.log, step, values)

    def validated(self, step: int, record: dict[str, Any]) -> None:
        """Keep the loss of each sample, for the folder alone."""
        self._append(self.validation_file, step, record)

    def _append(self, to: Path, step: int, values: dict[str, Any]) -> None:
        waiting = self._unwritten.pop(to, b"")
        lines = waiting + (json.dumps({"step": step, **values}) + "\n").encode()
        try:
            with to.open("ab", buffering=0) as file:
                before = file.tell()
                if file.write(lines) != len(lines):
                    file.truncate(before)  # or the next line would be appended to half of this one
                    raise OSError("no room for a whole line")
        except OSError as error:
            self._unwritten[to] = lines
            if not waiting:  # once for all in a row
                warn(
                    f"the numbers of step {step} could not be written to {to} ({error}); training goes on, and they "
                    "are written with the next ones that can be"
                )

    def picture(self, step: int, file: Path) -> None:
        self._track("picture", self.tracker.picture, step, file)

    def _track(self, what: str, call: Callable[..., None], *arguments: Any) -> None:
        """Call the tracker; what fails there, such as a network, is said once for each kind of call."""
        try:
            call(*arguments)
        except Exception as error:  # of whatever library it is
            if what not in self._said:
                self._said.add(what)
                said = masked_text(f"{what}: {type(error).__name__}: {error}")
                warn(f"the tracker failed ({said}); training goes on without it")
