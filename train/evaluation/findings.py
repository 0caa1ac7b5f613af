"""Find signs in the numbers of a run that it went wrong, and report each as a sentence with the numbers that show it.

Thresholds are wide: they find runs that a glance at the images finds too, and do not rank good ones.
"""

from collections.abc import Sequence
from pathlib import Path

from train.evaluation.recommend import (
    FEW_SAMPLES,
    FLAT,
    difference,
    nonfinite_steps,
    percent,
    training_rise,
    validations,
)
from train.evaluation.results import Evaluation, Row
from train.tracking.metrics import read_metrics

FARTHER = 1.15  # distance to the training pictures divided by the base's
ALIKE = 0.6  # spread of the images divided by the base's
FEW = 8  # with fewer samples, another choice of them may well rank checkpoints differently


def problems_of_training(folder: Path) -> list[str]:
    """Return what stands out in metrics.jsonl and validation.jsonl of the run in `folder`."""
    lines, found = read_metrics(folder), []
    if skipped := sum(bool(line.get("skipped")) for line in lines):
        found.append(f"{skipped} logged steps made no update, because their loss or gradient was not finite")
    if rise := training_rise(folder):
        found.append(rise)
    if steps := nonfinite_steps(folder):
        found.append(f"the validation loss was not finite after step {', '.join(map(str, steps))}")
    measured = validations(folder)
    if len(measured) > 1 and measured[0].step == 0 and measured[-1].mean > (1 + FLAT) * measured[0].mean:
        base, last_one = measured[0], measured[-1]
        noise = "beyond" if difference(last_one, base).is_clear else "within"
        found.append(
            f"the last validation loss is higher than the base's {noise} the noise: {last_one.mean:.4g} against "
            f"{base.mean:.4g} ({percent(last_one.mean, base.mean)}). The adapter predicts worse than none. Lower "
            "optimizer.lr"
        )
    return found


def caution(folder: Path) -> str:
    """Return a warning if a recommendation rests on few samples; empty if it does not, or `recommend` warns already."""
    measured = validations(folder)
    count = len(measured[-1].losses) if measured else 0
    if not FEW_SAMPLES <= count < FEW:
        return ""
    return f"It rests on {count} samples: too few to be sure of the order of checkpoints. Trust the images more."


def problems_of_images(evaluation: Evaluation) -> list[str]:
    """Return what stands out in the images of an evaluation."""
    found, base, rows = [], evaluation.base, evaluation.rows[1:]

    def values(chosen: Sequence[Row], key: str) -> str:
        each = ", ".join(f"{getattr(row, key):.3g} at {row.name}" for row in chosen)
        return f"{each} (base: {getattr(base, key):.3g})"

    if failed := [row for row in rows if row.failed]:
        counts = ", ".join(f"{row.name} {row.failed} of {len(row.files)}" for row in failed)
        found.append(f"images that could not be computed, because their pixels were not finite: {counts}")
    if farther := [row for row in rows if ratio(row.to_training, base.to_training) > FARTHER]:
        found.append(
            "farther from the training images than the base, although an adapter should come nearer: "
            f"{values(farther, 'to_training')}"
        )
    if alike := [row for row in rows if 0 <= ratio(row.spread, base.spread) < ALIKE]:
        found.append(
            "images of different prompts and seeds are far more alike than the base's. They seem to ignore their "
            f"prompts, unless the training images are as alike: distance between two {values(alike, 'spread')}"
        )
    for row in rows:
        if row.suspicious:
            found.append(
                f"{row.name}: {row.suspicious} of {len(row.files)} images are nearer to a training image than "
                "training images are to one another: check them below"
            )
    return found


def ratio(value: float | None, base: float | None) -> float:
    """Return -1 if one of them is not known."""
    return -1.0 if value is None or not base else value / base


def find_problems(folder: Path, evaluation: Evaluation | None = None) -> list[str]:
    """Return everything that stands out in a run; empty if nothing does."""
    return [*problems_of_training(folder), *(problems_of_images(evaluation) if evaluation else [])]
