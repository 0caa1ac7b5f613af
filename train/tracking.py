"""Where the numbers of a run go: always `metrics.jsonl` in its folder, and a tracker if one is chosen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol


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
        kept.write_text(self._run.id)

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

    def close(self) -> None:
        """After the last value, also of a run that failed; does nothing where it was not started."""
        if self._started:
            self.tracker.finish()

    def read(self) -> list[dict[str, float]]:
        """All lines; a last one that a killed process left half written is not one."""
        lines = self.file.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def log(self, step: int, **values: float) -> None:
        with self.file.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        self.tracker.log(step, values)
