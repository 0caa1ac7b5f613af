"""Decide which checkpoints to keep (the last, the best by validation loss, one every N steps); delete the others."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from train.checkpoints.checkpoint import checkpoints, read_state, set_aside, step_of
from train.utils.checks import check_count


@dataclass(frozen=True)
class Rotation:
    """Which checkpoints to keep."""

    last: int | None = None  # number of most recent checkpoints; None keeps all
    best: int = 0  # number of checkpoints with the lowest validation loss
    every: int = 0  # interval of steps whose checkpoints are kept; 0 for none

    def __post_init__(self) -> None:
        if self.last is not None:
            check_count("keep_last", self.last, 1)
        for key, value in (("best", self.best), ("every", self.every)):
            check_count(f"keep_{key}", value)
            if self.last is None and value:
                raise ValueError(f"keep_{key}={value} does nothing with keep_last=null, which keeps all")

    def check(self, checkpoint_every: int, validate_every: int) -> None:
        """Raise ValueError if these settings have no effect with these intervals."""
        if self.best and (not validate_every or checkpoint_every % validate_every):
            raise ValueError(
                f"keep_best={self.best}: validate_every={validate_every} does not measure the validation loss of each "
                f"checkpoint. Choose a validate_every that divides checkpoint_every={checkpoint_every}"
            )
        if self.every and checkpoint_every and self.every % checkpoint_every:
            raise ValueError(f"keep_every={self.every} must be a multiple of checkpoint_every={checkpoint_every}")

    def to_delete(self, newest: Path) -> list[Path]:
        """Return the checkpoints to delete after `newest`. Later ones stay: the run did not resume from them."""
        if self.last is None:
            return []
        found = [path for path in checkpoints(newest.parent.parent) if step_of(path) <= step_of(newest)]
        losses = {path: loss for path in found if (loss := validation_loss(path)) is not None}
        kept = sorted(losses, key=lambda path: (losses[path], step_of(path)))[: self.best]
        kept += [path for path in found if self.every and step_of(path) % self.every == 0]
        return [path for path in found[: -self.last] if path not in kept]

    def prune(self, newest: Path, warn: Callable[[str], None]) -> None:
        """Delete the checkpoints that rotation does not keep; `warn` receives what cannot be deleted."""
        for path in self.to_delete(newest):
            try:
                shutil.rmtree(set_aside(path))
            except OSError as error:
                warn(f"{path} could not be deleted ({error}): training continues, but it takes disk space")


def validation_loss(checkpoint: Path) -> float | None:
    """Return the validation loss of a checkpoint's step, if it was measured and can be read."""
    try:
        found = read_state(checkpoint).get("validation_loss")
    except ValueError:
        return None
    return found if isinstance(found, float) and math.isfinite(found) else None
