"""What stands out in the numbers of a run, in sentences: signs that it went wrong, with the numbers that show it.

A sentence is made only of what was measured, and says nothing where nothing is wrong. Thresholds are wide: they are to
find runs that a glance at the pictures finds too, not to rank good ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from train.evaluation.recommend import FEW_SAMPLES, difference, not_finite, percent, validations
from train.evaluation.results import Evaluation, Row
from train.tracking.metrics import LAST_LOSSES, read_metrics, series

RISEN = 1.25  # the training loss at the end by that at the start
FARTHER = 1.15  # distance to the training pictures by the base's
ALIKE = 0.6  # spread of the pictures by the base's
FEW = 8  # samples, below which another choice of them may well rank checkpoints in another way


def of_training(folder: Path) -> list[str]:
    """From metrics.jsonl and validation.jsonl of the run in `folder`."""
    lines, found = read_metrics(folder), []
    if skipped := sum(bool(line.get("skipped")) for line in lines):
        found.append(f"{skipped} logged steps made no update, as their loss or gradient was not finite")
    losses = [value for _, value in series(lines, "loss")]
    if len(losses) >= 2 * LAST_LOSSES:
        first, last = fmean(losses[:LAST_LOSSES]), fmean(losses[-LAST_LOSSES:])
        if last > RISEN * first:
            found.append(f"the training loss rose: from {first:.4g} to {last:.4g}, means of {LAST_LOSSES} logged steps")
    if steps := not_finite(folder):
        found.append(f"the validation loss was not finite after step {', '.join(map(str, steps))}")
    measured = validations(folder)
    if len(measured) > 1 and measured[0].step == 0:
        base, last_one = measured[0], measured[-1]
        if last_one.mean > base.mean:
            gap = difference(last_one, base)
            sure = "" if gap is None else " beyond the noise" if gap.is_clear else " within the noise"
            found.append(
                f"the last validation loss is higher than the base's{sure}: {last_one.mean:.4g} against "
                f"{base.mean:.4g} ({percent(last_one.mean, base.mean)}). The adapter predicts worse than none: the "
                "learning rate may be too high"
            )
    return found


def caution(folder: Path) -> str:
    """What to think of a recommendation that rests on few samples; empty where it does not, or `recommend` says so."""
    measured = validations(folder)
    count = len(measured[-1].losses) if measured else 0
    if not FEW_SAMPLES <= count < FEW:
        return ""
    return f"It rests on {count} samples: too few to be sure of the order of checkpoints. Trust the pictures more."


def of_pictures(made: Evaluation) -> list[str]:
    """From what was drawn."""
    found, base = [], made.base
    rows = made.rows[1:]
    if failed := [row for row in rows if row.failed]:
        counts = ", ".join(f"{row.name} {row.failed} of {len(row.files)}" for row in failed)
        found.append(f"pictures that could not be computed, as their pixels were not finite: {counts}")
    farther = [row for row in rows if ratio(row.to_training, base.to_training) > FARTHER]
    if farther:
        found.append(
            "farther from the training pictures than the base, which an adapter should bring nearer: "
            f"{listed(farther, 'to_training', base)}"
        )
    alike = [row for row in rows if 0 <= ratio(row.spread, base.spread) < ALIKE]
    if alike:
        found.append(
            "pictures of different prompts and seeds are far more alike than the base's, so they hardly follow their "
            f"prompts, unless the training pictures are so alike: distance between two {listed(alike, 'spread', base)}"
        )
    for row in rows:
        if row.suspicious:
            found.append(
                f"{row.name}: {row.suspicious} of {len(row.files)} pictures are nearer to a training picture than "
                "training pictures are to one another: look at them below"
            )
    return found


def ratio(value: float | None, base: float | None) -> float:
    """-1 where one of them is not known."""
    return -1.0 if value is None or not base else value / base


def listed(rows: Sequence[Row], key: str, base: Row) -> str:
    each = ", ".join(f"{getattr(row, key):.3g} at {row.name}" for row in rows)
    return f"{each} (base: {getattr(base, key):.3g})"


def stands_out(folder: Path, made: Evaluation | None = None) -> list[str]:
    """All of it; empty if nothing does."""
    return [*of_training(folder), *(of_pictures(made) if made else [])]
