"""Recommend a checkpoint, with reasons, from the validation losses that a run kept.

A loss is the mean over a few samples, and samples differ more from each other than steps do. So two steps are compared
sample by sample: the mean of the differences, and the interval it varies in (Student's t, at 95 %).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from train.checkpoints import resume
from train.checkpoints.checkpoint import checkpoints, step_of
from train.tracking.metrics import LAST_LOSSES, MOST_VALUE, VALIDATION_FILE, read_json_lines, read_metrics, series
from train.utils.text import many

# quantiles of Student's t for 1, 2, ... degrees of freedom; with more, 1.96 + 2.5 / degrees is close enough
T_95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
MAX_ROWS = 10
FEW_SAMPLES, FEW_STEPS = 4, 3  # with fewer, the lowest loss may well be chance
RISEN = 1.25  # training loss at the end divided by that at the start, from which on a run diverged
EXPLODED = 2  # the lowest training loss at the end divided by the first two: a run can diverge within its start
EXPLODED_EARLY = 10  # the same with fewer than twice LAST_LOSSES of them, which vary with the drawn timesteps
FLAT = 0.001  # share of the base's validation loss; with a smaller change, nothing was learned
NOISE_AND_IMAGE = 2.0  # mean squared error of a prediction of zero: the variance of the noise, and that of the latents
LOWER = "A lower optimizer.lr may help"
HELD_OUT = "validation.held_out=4 sets 4 samples aside (in a new run)"


@dataclass(frozen=True)
class Validation:
    """The loss of each sample after `step` steps, its mean over the times."""

    step: int
    losses: tuple[float, ...]

    @property
    def mean(self) -> float:
        return fmean(self.losses)

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.mean)


@dataclass(frozen=True)
class Difference:
    """How far one step's loss is from another's over the same samples: between `low` and `high`, at 95 %."""

    mean: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """Whether it is more than the choice of the samples explains."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Recommendation:
    """The recommended checkpoint, and lines for a reader."""

    checkpoint: Path | None  # None if there is none to choose from, or no loss to choose by
    reasons: list[str]  # why it is recommended, or why none is
    table: list[str] = field(default_factory=list)  # the losses, to be shown before the reasons
    unfit: str = ""  # why the finished adapter should not be used; empty if nothing speaks against it
    verdict: str = "none"  # the outcome in a few words, for the last lines of a run
    rate_factor: float = 1.0  # what to multiply the learning rate by in a new run

    @property
    def lines(self) -> list[str]:
        return [*self.table, *self.reasons]


def is_loss(value: object) -> bool:
    return isinstance(value, int | float) and (abs(value) <= MOST_VALUE or not math.isfinite(value))


def has_losses(line: Mapping[str, Any]) -> bool:
    """Return whether a line of validation.jsonl, which may come from someone else, has a row of losses per sample."""
    rows, names = line.get("losses"), line.get("samples")
    if not isinstance(rows, list) or not isinstance(names, list) or len(rows) != len(names):
        return False
    return all(isinstance(row, list) and row and all(is_loss(loss) for loss in row) for row in rows)


def read_validations(folder: Path) -> list[Validation]:
    """Return the validations of a run, by step, that measured the same samples at the same times as the last one.

    Raises ValueError, naming the file, for a line that is not one of a run.
    """
    file = folder / VALIDATION_FILE
    found = [line for line in read_json_lines(file) if line.get("losses")]
    if wrong := [line["step"] for line in found if not has_losses(line)]:
        raise ValueError(
            f"{file}: the line of step {wrong[0]} does not hold the losses of its samples. Remove the line"
        )
    kept = {
        line["step"]: Validation(line["step"], tuple(fmean(row) for row in line["losses"]))
        for line in found
        if all(line.get(key) == found[-1].get(key) for key in ("samples", "times"))
    }
    return [kept[step] for step in sorted(kept)]


def validations(folder: Path) -> list[Validation]:
    """Return those of `read_validations` whose loss is finite."""
    return [one for one in read_validations(folder) if one.is_finite]


def nonfinite_steps(folder: Path) -> list[int]:
    """Return the steps of a run after which a validation loss was not finite."""
    return [one.step for one in read_validations(folder) if not one.is_finite]


def nonfinite_cause(folder: Path) -> str:
    """Return what the first validation that is not finite suggests as its cause."""
    first = next(one for one in read_validations(folder) if not one.is_finite)
    if first.step:
        return f"The loss stopped being finite by step {first.step}: a lower optimizer.lr may help"
    lines = reversed(read_json_lines(folder / VALIDATION_FILE))
    names = next(line["samples"] for line in lines if line.get("step") == 0)
    broken = [name for name, loss in zip(names, first.losses, strict=True) if not math.isfinite(loss)]
    if len(broken) < len(names):
        return f"It was not finite before training for {', '.join(broken)}: delete the cache, which may be damaged"
    return "It was not finite before training: the base may be damaged, or the precision too low"


def difference(one: Validation, other: Validation) -> Difference:
    """Return `one` less `other`, sample by sample; without bounds for a single one, which says nothing of others."""
    each = [a - b for a, b in zip(one.losses, other.losses, strict=True)]
    mean, degrees, margin = fmean(each), len(each) - 1, math.inf
    if degrees:
        quantile = T_95[degrees - 1] if degrees <= len(T_95) else 1.96 + 2.5 / degrees
        margin = quantile * stdev(each) / len(each) ** 0.5
    return Difference(mean, mean - margin, mean + margin)


def percent(loss: float, base: float) -> str:
    change = 100 * (loss / base - 1) if base else math.inf
    return f"{change:+.1f} %" if math.isfinite(change) else "from 0"


def training_rise(folder: Path) -> str:
    """Return that the training loss of a run rose far, with the numbers; empty if it did not, or cannot be known."""
    losses = [value for _, value in series(read_metrics(folder), "loss")]
    count = min(LAST_LOSSES, len(losses) // 2)
    if count < 2:
        return ""
    first, last, before = fmean(losses[:count]), fmean(losses[-count:]), max(losses[:2])
    if count < LAST_LOSSES:
        if min(losses[-count:]) > EXPLODED_EARLY * before:
            return f"the training loss rose: from {before:.4g} to {last:.4g} within {len(losses)} logged steps"
        return ""
    if last > RISEN * first:
        return f"the training loss rose: from {first:.4g} to {last:.4g}, means of {LAST_LOSSES} logged steps"
    if last > first and min(losses[-LAST_LOSSES:]) > EXPLODED * before:
        return f"the training loss rose early: from {before:.4g} to {last:.4g}, mean of {LAST_LOSSES} logged steps"
    return ""


def unvalidated_training(folder: Path, config: Mapping[str, Any]) -> tuple[str, bool]:
    """Return what the logged training losses tell of a run without validation, and whether it probably diverged."""
    losses = [value for _, value in series(read_metrics(folder), "loss")]
    if not losses:
        return "", False
    count = max(1, min(LAST_LOSSES, len(losses) // 2))
    first, last = fmean(losses[:count]), fmean(losses[-count:])
    span = f"Its training loss went from {first:.4g} to {last:.4g} in {many(len(losses), 'logged step')}"
    plain = (("target", "Flow"), ("loss", "MSE"), ("weighting", "Unweighted"))
    is_plain = all(str((config.get(group) or {}).get("_target_")).endswith(f".{kind}") for group, kind in plain)
    if is_plain and max(first, last) > EXPLODED * NOISE_AND_IMAGE:
        zero = f"{NOISE_AND_IMAGE:g}, that of a prediction of zero"
        return f"{span}. {max(first, last):.4g} is far above {zero}, so the run probably diverged. {LOWER}", True
    return span, False


def what_is_unfit(folder: Path) -> str:
    """Return why the finished adapter of a run should not be used; empty if nothing speaks against it.

    The validation decides where there is one of the base; single training losses vary with the drawn timesteps.
    """
    found = read_validations(folder)
    if found and found[-1].step and not found[-1].is_finite:
        return f"its validation loss is not finite after step {found[-1].step}"
    if not found or found[0].step or not found[0].is_finite:
        return training_rise(folder)
    base, last = found[0].mean, found[-1].mean
    if last <= base * (1 + FLAT):
        return ""
    return f"its validation loss is {last:.4g}, and the base's {base:.4g} ({percent(last, base)})"


def count_samples(validation: Validation, held_out: bool) -> str:
    count = len(validation.losses)
    return f"{many(count, 'sample')} set aside" if held_out else many(count, "training sample")


def table_rows(chosen: Sequence[Validation], best: Validation, base: Validation | None) -> list[str]:
    """Return a line for the base, the lowest losses and the last one, in the order of their steps."""
    lowest = sorted(chosen, key=lambda one: one.mean)[: MAX_ROWS - 1]
    shown = [one for one in chosen if one in lowest or one is chosen[-1]]
    rows = [f"  step {base.step:>6}  {base.mean:.4f}  the base"] if base else []
    for one in shown:
        against = f"  {percent(one.mean, base.mean)}" if base else ""
        rows.append(f"  step {one.step:>6}  {one.mean:.4f}{against}{'  lowest' if one is best else ''}")
    if len(chosen) > len(shown):
        rows.append(f"  and {many(len(chosen) - len(shown), 'checkpoint')} with a higher loss")
    return rows


def reservation(best: Validation, last: Validation, steps: int) -> str:
    """Return what weakens the choice of `best` among `steps` validations, to follow "recommended"; empty if nothing."""
    few = [many(len(best.losses), "sample")] if len(best.losses) < FEW_SAMPLES else []
    few += [many(steps, "validation")] if steps < FEW_STEPS else []
    if few:
        return f", on {' and '.join(few)} alone,"
    return ", by less than the noise," if best is not last and not difference(best, last).is_clear else ""


def explain(best: Validation, last: Validation, base: Validation | None) -> str:
    """Return why `best` is recommended."""
    samples, few = many(len(best.losses), "sample"), len(best.losses) < FEW_SAMPLES
    chance = f"{samples} cannot tell whether that is more than chance"
    if best is last:
        text = "the last one has the lowest validation loss"
        if base is not None:
            side = "beyond" if difference(best, base).is_clear else "within"
            noise = f" ({chance})" if few else f", {side} what the choice of {samples} explains"
            text += f", {percent(best.mean, base.mean)} against the base{noise}"
        return f"{text}; training for longer may lower it further"
    found, gap = difference(best, last), f"{last.mean - best.mean:.2g} ({percent(best.mean, last.mean)})"
    lower = f"its validation loss is the lowest, {gap} below the last one's"
    if few:
        return f"{lower}; {chance}, so let the sample grids decide"
    span = f"{-found.high:.2g} to {-found.low:.2g} lower at 95 %, over {samples}"
    if found.is_clear:
        return f"{lower}, beyond the noise ({span})"
    return f"{lower}, within the noise ({span}): either will do, so let the sample grids decide"


def is_gain(one: Validation, base: Validation) -> bool:
    """Return whether the loss is lower than the base's by more than what counts as flat."""
    return one.mean < base.mean * (1 - FLAT)


def no_gain(best: Validation, last: Validation, base: Validation) -> tuple[str, str, float]:
    """Return why not even the checkpoint of the lowest loss is recommended, in a few words and in sentences.

    The third value is what to multiply the learning rate by in a new run.
    """
    gain = percent(best.mean, base.mean)
    loss = f"The lowest validation loss is {best.mean:.4g} after step {best.step}, and the base's is {base.mean:.4g}"
    if last.mean > RISEN * base.mean:
        after = f"The validation loss is {last.mean:.4g} after step {last.step}, and the base's is {base.mean:.4g}"
        end = percent(last.mean, base.mean)
        return f"the run diverged, {end}", f"the run diverged. {after} ({end}). Lower optimizer.lr, to a tenth", 0.1
    if max(abs(one.mean - base.mean) for one in (best, last)) <= FLAT * base.mean:
        remedy = "Train for more steps, or raise optimizer.lr"
        return f"nothing was learned, {gain}", f"nothing was learned. {loss} ({gain}). {remedy}", 10.0
    return (
        f"none predicts better than the base, {gain}",
        f"none predicts better than the base. {loss} ({gain}). {LOWER}",
        1.0,
    )


def outcome(best: Validation, last: Validation, base: Validation | None, steps: int, *, alone: bool) -> str:
    """Return the recommended step with its gain, and what weakens the choice among `steps` validations."""
    notes = [percent(best.mean, base.mean)] if base is not None else []
    if alone:
        notes.append("the only one measured")
    elif weak := reservation(best, last, steps).strip(" ,"):
        notes.append(weak)
    return f"step {best.step} ({', '.join(notes)})" if notes else f"step {best.step}"


def recommend(folder: Path) -> Recommendation:
    """Return the checkpoint with the lowest validation loss, if that is lower than the base's.

    Raises ValueError if config.yaml or a line of losses cannot be read.
    """
    config = resume.configuration(folder)
    validation, times = config.get("validation"), 0
    if not isinstance(validation, dict):
        validation = {}
    if isinstance(listed := validation.get("times"), list):
        times = len(listed)
    measured, broken = validations(folder), nonfinite_steps(folder)
    saved, unfit = {step_of(place): place for place in checkpoints(folder)}, what_is_unfit(folder)

    def no_checkpoint(
        reason: str, table: Sequence[str] = (), *, short: str, rate_factor: float = 1.0
    ) -> Recommendation:
        reasons = [f"no checkpoint is recommended: {reason}"]
        return Recommendation(None, reasons, list(table), unfit, f"none ({short})", rate_factor)

    if broken and not any(one.step for one in measured):
        found = "the run diverged: no validation loss of a trained adapter" if measured else "no validation loss"
        reason, factor = f"{found} is finite. {nonfinite_cause(folder)}", 0.1 if measured else 1.0
        short = "the run diverged, its loss is not finite" if measured else "no loss is finite"
        return no_checkpoint(reason, short=short, rate_factor=factor)
    if not measured and unfit:
        return no_checkpoint(f"the run diverged: {unfit}. {LOWER}", short="the run diverged", rate_factor=0.1)
    if str(config.get("target", {}).get("_target_")).endswith(".Slider"):
        reason = "a slider does not learn the images, so it has no validation loss; compare sample grids"
        return no_checkpoint(reason, short="compare the sample grids")
    if not measured:
        key = "validation.samples=8" if config.get("validate_every") else "validate_every=50"
        known, is_bad = unvalidated_training(folder, config)
        short = "nothing was validated, the run probably diverged" if is_bad else "nothing was validated"
        reason = f"nothing was validated. {known}{'. ' if known else ''}Set {key}; {HELD_OUT}"
        return no_checkpoint(reason, short=short, rate_factor=0.1 if is_bad else 1.0)

    def without_gain(best: Validation, last: Validation, base: Validation) -> Recommendation:
        short, reason, factor = no_gain(best, last, base)
        return no_checkpoint(reason, table, short=short, rate_factor=factor)

    base = measured[0] if measured[0].step == 0 else None
    held_out = bool(validation.get("held_out"))
    table = [f"validation loss, {count_samples(measured[-1], held_out)} at {many(times, 'time')}:"]
    chosen = [one for one in measured if one.step in saved]
    trained = [one for one in measured if one.step > 0]
    lowest = min(trained, key=lambda one: one.mean, default=measured[0])
    if not chosen:
        table += table_rows(trained, lowest, base)
        if base is not None and lowest.step and not is_gain(lowest, base):
            return without_gain(lowest, trained[-1], base)
        unsaved = "none was saved but the finished adapter. Set checkpoint_every=250 to have a choice"
        unvalidated = "none was validated. Set checkpoint_every to a multiple of validate_every"
        short = "none was validated" if saved else "none was saved but the last step"
        return no_checkpoint(unvalidated if saved else unsaved, table, short=short)
    best = min(chosen, key=lambda one: one.mean)
    table += table_rows(chosen, best, base)
    if broken := [step for step in broken if step in saved]:
        table.append(f"  and {len(broken)} whose loss was not finite (step {', '.join(map(str, broken))})")
    if without := sorted(set(saved) - {one.step for one in chosen} - set(broken)):
        steps = ", ".join(map(str, without))
        why = "saved when the run was stopped, or not at a multiple of validate_every"
        table.append(f"  and {len(without)} not validated (step {steps}): {why}")
    if lowest.mean < best.mean and lowest.step:
        table.append(f"  the lowest of all, {lowest.mean:.4f}, was after step {lowest.step}, which is not kept")
    if base is not None and not is_gain(best, base):
        return without_gain(best, trained[-1], base)
    if base is None and unfit:
        return no_checkpoint(f"the run diverged: {unfit}. {LOWER}", table, short="the run diverged", rate_factor=0.1)
    why, alone = explain(best, chosen[-1], base), len(trained) == 1
    if len(chosen) == 1:
        gain = f", {percent(best.mean, base.mean)} against the base" if base is not None else ""
        why = f"it is the only checkpoint that was validated{gain}"
    reasons = [f"recommended{reservation(best, chosen[-1], len(trained))} {saved[best.step]}: {why}"]
    if not held_out:
        little = "so it says little: it also falls if images are only memorized"
        reasons.append(f"  the loss is that of training samples, {little}. {HELD_OUT}")
    short = outcome(best, chosen[-1], base, len(trained), alone=alone)
    return Recommendation(saved[best.step], reasons, table, unfit, short)


def recommend_or_warn(folder: Path) -> Recommendation:
    """Return the recommendation for the end of a run, where an error becomes a warning."""
    try:
        return recommend(folder)
    except (OSError, ValueError, TypeError) as error:
        why = [f"warning: no checkpoint can be recommended ({error})"]
        return Recommendation(None, why, verdict="none (its numbers cannot be read)")
