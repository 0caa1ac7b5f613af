"""Decide which checkpoints to keep: the last ones, the best by validation loss, and one every N steps."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from train.checkpoints.checkpoint import checkpoints, number, set_aside, state
from train.utils.checks import check_count


@dataclass(frozen=True)
class Rotation:
    """Which checkpoints to keep.

    Attributes:
        last: Number of most recent checkpoints; None keeps all.
        best: Number of checkpoints with the lowest validation loss.
        every: Interval of steps whose checkpoints are kept; 0 for none.
    """

    last: int | None = None
    best: int = 0
    every: int = 0

    def __post_init__(self) -> None:
        for key in ("last", "best", "every"):
            value, least = getattr(self, key), int(key == "last")
            if not (value is None and key == "last"):
                check_count(f"keep_{key}", value, least)
        for key in ("best", "every"):
            if self.last is None and getattr(self, key):
                raise ValueError(f"keep_{key}={getattr(self, key)} does nothing with keep_last=null, which keeps all")

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
        """Return the checkpoints to delete after `newest` was written.

        Checkpoints of later steps stay: they are damaged, or the run would have resumed from them.
        """
        if self.last is None:
            return []
        found = [path for path in checkpoints(newest.parent.parent) if number(path) <= number(newest)]
        older = found[: -self.last]
        losses = {path: loss for path in found if (loss := validation_loss(path)) is not None}
        best = sorted(losses, key=lambda path: (losses[path], number(path)))[: self.best]
        return [path for path in older if path not in best and not (self.every and number(path) % self.every == 0)]

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
        found = state(checkpoint).get("validation_loss")
    except ValueError:
        return None
    return found if isinstance(found, float) and math.isfinite(found) else None
