"""Which checkpoint to use, and why: from the losses of validation that a run kept.

A loss is the mean over a few samples, and the samples differ more from each other than steps do. So two steps are
compared sample by sample: the mean of the differences, beside what such a mean varies by (Student's t, at 95 %).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

from train.checkpoints import resume
from train.checkpoints.checkpoint import checkpoints, number
from train.tracking.metrics import VALIDATION_FILE, read_json_lines
from train.utils.text import many

# quantiles of Student's t for one, two, ... degrees of freedom; beyond, 1.96 + 2.5 / degrees is near enough
T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
MOST_ROWS = 10
FEW_SAMPLES, FEW_STEPS = 4, 3  # with fewer, what is lowest is hardly more than chance
NEW = "validation.held_out=4 sets 4 samples aside (in a new run)"


@dataclass(frozen=True)
class Validation:
    """The losses after `step` steps: the mean over times of each sample."""

    step: int
    losses: tuple[float, ...]

    @property
    def mean(self) -> float:
        return fmean(self.losses)


@dataclass(frozen=True)
class Difference:
    """How far one step's loss is from another's, over the same samples: between `low` and `high`, at 95 %."""

    mean: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether it is more than the choice of the samples explains."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Recommendation:
    """`checkpoint` is None where there is nothing to choose from or to choose by; `lines` say why, for a reader."""

    checkpoint: Path | None
    lines: list[str]


def validations(folder: Path) -> list[Validation]:
    """Those of a run that can be compared with its last one: of the same samples at the same times. By step.

    One with a loss that is not finite cannot be.
    """
    return [one for one in every_validation(folder) if math.isfinite(one.mean)]


def not_finite(folder: Path) -> list[int]:
    """The steps of a run after which a validation loss was not finite."""
    return [one.step for one in every_validation(folder) if not math.isfinite(one.mean)]


def every_validation(folder: Path) -> list[Validation]:
    """`validations`, and those that are not finite."""
    file = folder / VALIDATION_FILE
    found = [line for line in read_json_lines(file) if "losses" in line]
    kept = {
        line["step"]: Validation(line["step"], tuple(fmean(row) for row in line["losses"]))
        for line in found
        if line["losses"] and all((line.get(key) == found[-1].get(key)) for key in ("samples", "times"))
    }
    return [kept[step] for step in sorted(kept)]


def blamed(folder: Path) -> str:
    """What the first validation that is not finite says of its cause."""
    first = next(one for one in every_validation(folder) if not math.isfinite(one.mean))
    lines = [line for line in read_json_lines(folder / VALIDATION_FILE) if line.get("step") == first.step]
    named = lines[-1]["samples"]
    those = [name for name, loss in zip(named, first.losses, strict=True) if not math.isfinite(loss)]
    if first.step == 0 and len(those) < len(named):
        return (
            f"Those of {', '.join(those)} were not before training: are their cache entries damaged? Remove the cache"
        )
    if first.step == 0:
        return "They were not before training: is the base damaged, or a precision too low?"
    return f"It broke by step {first.step}: a lower optimizer.lr may help"


def difference(one: Validation, other: Validation) -> Difference | None:
    """`one` less `other`, sample by sample; None for a single sample, which says nothing of others."""
    each = [a - b for a, b in zip(one.losses, other.losses, strict=True)]
    if len(each) < 2:
        return None
    degrees = len(each) - 1
    quantile = T_95[degrees - 1] if degrees <= len(T_95) else 1.96 + 2.5 / degrees
    margin = quantile * stdev(each) / len(each) ** 0.5
    return Difference(fmean(each), fmean(each) - margin, fmean(each) + margin)


def percent(loss: float, base: float) -> str:
    return f"{100 * (loss / base - 1):+.1f} %"


def rows(chosen: Sequence[Validation], best: Validation, base: Validation | None) -> list[str]:
    """The table: the lowest and the last, in the order of their steps."""
    lowest = sorted(chosen, key=lambda one: one.mean)[: MOST_ROWS - 1]
    shown = [one for one in chosen if one in lowest or one is chosen[-1]]
    found = [f"  step {base.step:>6}  {base.mean:.4f}  the base"] if base else []
    for one in shown:
        against = f"  {percent(one.mean, base.mean)}" if base else ""
        found.append(f"  step {one.step:>6}  {one.mean:.4f}{against}{'  lowest' if one is best else ''}")
    if len(chosen) > len(shown):
        found.append(f"  and {many(len(chosen) - len(shown), 'checkpoint')} with a higher loss")
    return found


def little(best: Validation, last: Validation, steps: int) -> str:
    """What little the choice of `best` rests on, to be put behind `recommended`; empty where it rests on enough.

    Args:
        steps: how many were validated after the base.
    """
    few = [many(len(best.losses), "sample")] if len(best.losses) < FEW_SAMPLES else []
    few += [many(steps, "validation")] if steps < FEW_STEPS else []
    if few:
        return f", on {' and '.join(few)} alone,"
    found = difference(best, last)
    return ", by less than the noise," if best is not last and found is not None and not found.is_clear else ""


def compared(best: Validation, last: Validation, base: Validation | None) -> str:
    """Why `best`."""
    count = len(best.losses)
    samples = many(count, "sample")
    chance = f"{samples} cannot say whether that is more than chance"
    if best is last:
        text = "the last one has the lowest validation loss"
        if base is not None:
            gain = difference(best, base)
            text += f", {percent(best.mean, base.mean)} against the base"
            if gain is None or count < FEW_SAMPLES:
                text += f" ({chance})"
            else:
                text += f", {'beyond' if gain.is_clear else 'within'} what the choice of {samples} explains"
        return f"{text}; training for longer may lower it further"
    lower = f"its validation loss is the lowest, {last.mean - best.mean:.2g} ({percent(best.mean, last.mean)})"
    found = difference(best, last)
    if found is None or count < FEW_SAMPLES:
        return f"{lower} below the last one's; {chance}, so let the sheets decide"
    span = f"{-found.high:.2g} to {-found.low:.2g} lower at 95 %, over {samples}"
    if found.is_clear:
        return f"{lower} below the last one's, and that is beyond the noise ({span})"
    return f"{lower} below the last one's, which is within the noise ({span}): either will do, so let the sheets decide"


def recommend(folder: Path) -> Recommendation:
    """The checkpoint of the run in `folder` with the lowest validation loss. Reads files alone, and changes nothing.

    Raises ValueError if the run's configuration cannot be read.
    """
    config = resume.configuration(folder)
    validation = config.get("validation") or {}
    measured, saved = validations(folder), {number(place): place for place in checkpoints(folder)}
    if not measured and not_finite(folder):
        return Recommendation(None, [f"no checkpoint is recommended: no validation loss is finite. {blamed(folder)}"])
    if not measured:
        key = "validation.samples=8" if config.get("validate_every") else "validate_every=50"
        return Recommendation(None, [f"no checkpoint is recommended: nothing was validated. Give {key}; {NEW}"])
    base = measured[0] if measured[0].step == 0 else None
    held = bool(validation.get("held_out"))
    count, times = len(measured[-1].losses), len(validation.get("times") or ())
    kind = f"{many(count, 'sample')} set aside" if held else many(count, "training sample")
    lines = [f"validation loss, {kind} at {many(times, 'time')}:"]
    chosen = [one for one in measured if one.step in saved]
    trained = [one for one in measured if one.step > 0]
    lowest = min(trained, key=lambda one: one.mean, default=None)
    if not chosen:
        lines += rows(trained, lowest, base) if lowest is not None else rows([], measured[0], base)
        lines.append(
            "no checkpoint is recommended: "
            + (
                "none was validated. Let checkpoint_every be a multiple of validate_every"
                if saved
                else "none is kept but the finished adapter. checkpoint_every=250 saves some to choose from"
            )
        )
        return Recommendation(None, lines)
    best = min(chosen, key=lambda one: one.mean)
    lines += rows(chosen, best, base)
    broken = [step for step in not_finite(folder) if step in saved]
    if broken:
        lines.append(f"  and {len(broken)} whose loss was not finite (step {', '.join(map(str, broken))})")
    without = sorted(set(saved) - {one.step for one in chosen} - set(broken))
    if without:
        steps = ", ".join(map(str, without))
        lines.append(
            f"  and {len(without)} not validated (step {steps}): saved when the run was stopped, or not at a multiple "
            "of validate_every"
        )
    if lowest is not None and lowest.mean < best.mean:
        lines.append(f"  the lowest of all, {lowest.mean:.4f}, was after step {lowest.step}, which is not kept")
    why = compared(best, chosen[-1], base)
    if len(chosen) == 1:
        why = "it is the only one that was validated" + (
            f", {percent(best.mean, base.mean)} against the base" if base is not None else ""
        )
    if base is not None and best.mean >= base.mean:
        why += ". But the base's loss is lower: nothing was learned that these samples show"
    lines.append(f"recommended{little(best, chosen[-1], len(trained))} {saved[best.step]}: {why}")
    if not held:
        lines.append(
            f"  measured on training samples, it says little: it also falls where pictures are only remembered. {NEW}"
        )
    return Recommendation(saved[best.step], lines)


def closing_lines(folder: Path) -> list[str]:
    """The lines of `recommend`, for the end of a run, which is no place for an error."""
    try:
        return recommend(folder).lines
    except (OSError, ValueError, TypeError) as error:
        return [f"warning: no checkpoint can be recommended ({error})"]
