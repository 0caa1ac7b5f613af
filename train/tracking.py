"""Where the numbers of a run go: always `metrics.jsonl` in its folder, and a tracker if one is chosen."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm


def is_first_process() -> bool:
    """Whether this is the one of several processes that speaks for all; the launcher sets RANK."""
    return os.environ.get("RANK", "0") == "0"


def warn(text: str) -> None:
    """One line on the error stream, above a progress bar."""
    tqdm.write(f"warning: {' '.join(text.split())}", file=sys.stderr)


class Tracker(Protocol):
    def start(self, folder: Path, name: str, config: dict[str, Any]) -> None:
        """Before the first value; `config` is the resolved configuration."""

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def picture(self, step: int, file: Path) -> None: ...

    def finish(self) -> None: ...


class NoTracker:
    """metrics.jsonl is enough."""

    def start(self, folder: Path, name: str, config: dict[str, Any]) -> None:
        return

    def log(self, step: int, values: dict[str, float]) -> None:
        return

    def picture(self, step: int, file: Path) -> None:
        return

    def finish(self) -> None:
        return


class WandbTracker:
    """Weights & Biases. A resumed run goes on under the same id, which is kept in the run folder."""

    def __init__(self, project: str = "flux2-lora", entity: str | None = None, mode: str = "online") -> None:
        if mode not in ("online", "offline", "disabled"):
            raise ValueError(f"tracker.mode={mode!r} must be online, offline or disabled")
        self.project, self.entity, self.mode = project, entity, mode

    def start(self, folder: Path, name: str, config: dict[str, Any]) -> None:
        import wandb

        kept = folder / "wandb_id"
        try:
            self._run = wandb.init(
                project=self.project,
                entity=self.entity,
                mode=self.mode,  # type: ignore[arg-type]
                name=f"{name}/{folder.name}",
                config=config,
                dir=str(folder),
                id=kept.read_text() if kept.exists() else None,
                resume="allow",
            )
        except wandb.errors.Error as error:
            raise ValueError(f"tracker=wandb: {error}. Run `wandb login`, or use tracker.mode=offline") from error
        self.run_id = self._run.id
        kept.write_text(self.run_id)

    def log(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def picture(self, step: int, file: Path) -> None:
        import wandb

        self._run.log({"samples": wandb.Image(str(file))}, step=step)

    def finish(self) -> None:
        self._run.finish()


class TensorBoardTracker:
    """TensorBoard event files in `<run folder>/tensorboard`."""

    def start(self, folder: Path, name: str, config: dict[str, Any]) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError("tracker=tensorboard needs TensorBoard: pip install 'flux2-lora[tensorboard]'") from error
        self._writer = SummaryWriter(folder / "tensorboard")
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


class Metrics:
    """`metrics.jsonl`, one JSON object a line, and the tracker beside it; used by the main process alone.

    What a resumed run had logged past the checkpoint it goes on from is dropped from the file: a step is in it once.
    """

    def __init__(self, folder: Path, tracker: Tracker) -> None:
        self.folder, self.file, self.tracker = folder, folder / "metrics.jsonl", tracker
        self._started = False
        self._said: set[str] = set()

    def start(self, name: str, config: dict[str, Any], step: int) -> None:
        """Before the first value of a run that has done `step` steps. Raises ValueError if nothing can be written."""
        self.file.touch()
        if self.file.stat().st_size:
            kept = [line for line in self.read() if 0 < step >= line["step"]]
            temporary = self.file.with_suffix(".part")
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
            temporary.replace(self.file)
        self.tracker.start(self.folder, name, config)
        self._started = True

    @property
    def tracker_id(self) -> str | None:
        """Under which the tracker knows this run, if it gives it a name of its own."""
        return getattr(self.tracker, "run_id", None)

    def close(self) -> None:
        """After the last value, also of a run that failed; does nothing where it was not started."""
        if self._started:
            self._track("finish", self.tracker.finish)

    def read(self) -> list[dict[str, float]]:
        """All lines that are whole: a killed process or a full disk may have left others, which are skipped."""
        found = []
        for line in self.file.read_text(errors="replace").splitlines():
            try:
                values = json.loads(line)
            except ValueError:
                continue
            if isinstance(values, dict) and isinstance(values.get("step"), int):
                found.append(values)
        return found

    def log(self, step: int, **values: float) -> None:
        try:
            with self.file.open("ab", buffering=0) as file:
                before = file.tell()
                line = (json.dumps({"step": step, **values}) + "\n").encode()
                if file.write(line) != len(line):
                    file.truncate(before)  # or the next line would be appended to half of this one
                    raise OSError("no room for a whole line")
        except OSError as error:
            warn(f"the numbers of step {step} could not be written to {self.file} ({error}); training goes on")
        self._track("log", self.tracker.log, step, values)

    def picture(self, step: int, file: Path) -> None:
        self._track("picture", self.tracker.picture, step, file)

    def _track(self, what: str, call: Callable[..., None], *arguments: Any) -> None:
        """Call the tracker; what fails there, such as a network, is said once for each kind of call."""
        try:
            call(*arguments)
        except Exception as error:  # of whatever library it is
            if what not in self._said:
                self._said.add(what)
                warn(f"the tracker failed ({what}: {type(error).__name__}: {error}); training goes on without it")
