"""report.html: what a run learned, in one page that needs no network. docs/evaluation.md says how to read it.

Training writes it from what is in the run folder (numbers, sheets, configuration); train/evaluate.py writes it with
pictures of every checkpoint and their distances. Texts from outside are masked (train/utils/redact.py) and escaped.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from omegaconf import OmegaConf
from PIL import Image

from train.checkpoints import resume
from train.evaluation.findings import caution, stands_out
from train.evaluation.recommend import percent, recommend
from train.evaluation.results import BASE, Evaluation
from train.reports import plots, run_pictures, slider
from train.reports.html import document, heads, number, table
from train.reports.plots import Curve
from train.reports.slider import Cell
from train.tracking.metrics import read_metrics, series
from train.utils.console import warn
from train.utils.files import write_whole
from train.utils.redact import masked, masked_command, masked_text

__all__ = ["REPORT", "note_command", "stands_out", "write", "write_or_warn"]

REPORT, COMMANDS = "report.html", "command.txt"
STYLE = """
body { max-width: 76rem }
pre { overflow-x: auto; font: .82rem/1.45 ui-monospace, monospace; margin: .3rem 0 1rem; padding: .6rem .8rem;
  background: var(--soft); border-radius: .5rem }
pre.words { white-space: pre-wrap; overflow-wrap: anywhere }
.box { border-left: .3rem solid var(--good); background: var(--soft); padding: .5rem .9rem; margin: 1rem 0;
  border-radius: 0 .5rem .5rem 0; overflow-wrap: anywhere }
.box.bad { border-color: var(--bad) }
.box p, .box ul { margin: .2rem 0 }
summary { cursor: pointer; overflow-wrap: anywhere; font-weight: 600; margin: 2rem 0 .6rem; font-size: 1.1rem }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(17rem, 100%), 1fr)); gap: 1rem }
.pairs .two { display: grid; grid-template-columns: 1fr 1fr; gap: 2px }
.suspicious { color: var(--bad); font-weight: 600 }
"""


@dataclass(frozen=True)
class Told:
    """A run as its folder tells of it.

    Attributes:
        label: what it is called beside others.
        config: masked.
        lines: of metrics.jsonl; why: the recommendation, in sentences.
    """

    folder: Path
    label: str
    config: dict[str, Any]
    lines: list[dict[str, Any]] = field(default_factory=list)
    chosen: int | None = None
    why: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, folder: Path, label: str = "") -> Told:
        """Raises ValueError if there is no configuration that can be read."""
        config = masked(resume.configuration(folder))
        found = recommend(folder)
        begins = (i for i, line in enumerate(found.lines) if re.match(r"recommended|no checkpoint is", line))
        why = [line.strip() for line in found.lines[next(begins, 0) :]]
        why = [line.replace(f"{folder}/", "") for line in why]
        chosen = None if found.checkpoint is None else int(found.checkpoint.name.removeprefix("step_"))
        named = label or f"{config.get('name', '')}/{folder.resolve().name}".strip("/")
        return cls(folder, masked_text(named), config, read_metrics(folder), chosen, why)

    def series(self, key: str) -> list[tuple[int, float]]:
        return series(self.lines, key)

    @property
    def bands(self) -> list[str]:
        """The keys of the validation losses at single times, in the order of these."""
        found = {key for line in self.lines for key in line if key.startswith("validation_loss/")}
        return sorted(found, key=lambda key: float(key.partition("/")[2]))


# ------------------------------------------------------------------ the command


def note_command(folder: Path, overrides: Sequence[str], processes: int = 1, *, goes_on: bool = False) -> None:
    """Keep the command that a run is started with; `goes_on`: after those that were kept before. Without secrets."""
    dropped = ("output_dir",) if goes_on else ("output_dir", "resume")
    words = [word for word in overrides if word.lstrip("+").partition("=")[0] not in dropped]
    several = f"--num_processes {processes} " if processes > 1 else ""
    line = f"accelerate launch {several}train/run.py {masked_command(words)}".rstrip() + "\n"
    file = folder / COMMANDS
    write_whole(file, (file.read_text() if goes_on and file.is_file() else "") + line)


def commands(run: Told) -> str:
    """The command, or commands, of a run, as HTML."""
    file, card = run.folder / COMMANDS, run.folder / "adapter" / "README.md"
    text = file.read_text(errors="replace").strip() if file.is_file() else ""
    if not text and card.is_file():  # of before it was kept
        found = re.search(r"```sh\n(accelerate launch .*train/run\.py.*)\n```", card.read_text(errors="replace"))
        text = found[1] if found else ""
    if not text:
        return "<p>The command was not kept; all settings are in the configuration below.</p>"
    return f'<pre class="words">{escape(masked_text(text))}</pre>'


# ------------------------------------------------------------------ sections


def verdict(run: Told, bad: Sequence[str]) -> str:
    """What is recommended, and what stands out."""
    said = [*run.why, *([] if run.chosen is None else [caution(run.folder)])]
    why = "".join(f"<p>{escape(line[:1].upper() + line[1:])}</p>" for line in said if line)
    if bad:
        why += "<p>Look at what stands out before you use it.</p>"
    box = f'<div class="box">{why}</div>'
    if bad:
        items = "".join(f"<li>{escape(one[:1].upper() + one[1:])}</li>" for one in bad)
        box += f'<div class="box bad"><p><b>What stands out</b></p><ul>{items}</ul></div>'
    return box


def loss_plots(runs: Sequence[Told]) -> str:
    """Training and validation loss; of a single run also the losses at single times, gradient norm and rate."""
    training, validation = [], []
    several = len(runs) > 1
    for color, run in enumerate(runs):
        losses = run.series("loss")
        name = f"{run.label}, " if several else ""
        training.append(Curve("", losses, color, faint=True))
        training.append(Curve(f"{name}smoothed (0.9)", plots.smoothed(losses), color))
        validation.append(Curve(f"{name}validation", run.series("validation_loss"), color))
    figures = [plots.plot("Training loss", training), plots.plot("Validation loss", validation)]
    if not several:
        run = runs[0]
        bands = [Curve(f"time {key.partition('/')[2]}", run.series(key), i) for i, key in enumerate(run.bands)]
        figures.append(plots.plot("Validation loss by time (0 the picture, 1 noise)", bands))
        figures.append(plots.plot("Gradient norm before clipping", [Curve("norm", run.series("grad_norm"), 0)]))
        figures.append(plots.plot("Learning rate", [Curve("rate", run.series("lr"), 0)]))
        for key, title in (("preservation_loss", "Preservation loss"), ("prior_loss", "Prior loss")):
            figures.append(plots.plot(title, [Curve(title.lower(), run.series(key), 0)]))
    text = "".join(figures)
    return f'<h2>Losses</h2><div class="plots">{text}</div>' if text else ""


def validation_table(run: Told) -> str:
    """The validation loss after each checkpoint, by time, beside the base's."""
    losses = dict(run.series("validation_loss"))
    if not losses:
        return ""
    saved = {int(place.name.removeprefix("step_")) for place in run.folder.glob("checkpoints/step_*")}
    shown = sorted(step for step in losses if step in saved or step in (0, max(losses)))
    bands = {key: dict(run.series(key)) for key in run.bands}
    base = losses.get(0)
    rows = []
    for step in shown:
        against = "" if base is None or step == 0 else percent(losses[step], base)
        cells = "".join(number(bands[key].get(step), ".4f") for key in bands)
        name = f"step {step}" if step else BASE
        rows.append(
            f'<tr{" class=best" if step == run.chosen else ""}><th scope="row">{name}</th>'
            f'{number(losses[step], ".4f")}<td class="number">{escape(against)}</td>{cells}</tr>'
        )
    head = heads([""], ["mean", "to base", *(f"time {key.partition('/')[2]}" for key in bands)])
    return table(head, rows, f"Validation loss by checkpoint and time: {escape(run.label)}")


def runs_table(runs: Sequence[Told]) -> str:
    """Losses, speed and memory, a line for each run."""
    rows = []
    for run in runs:
        losses, speeds = run.series("validation_loss"), [value for _, value in run.series("images_per_second")]
        memory = [value for _, value in run.series("peak_memory_gb")]
        span = f"{median(speeds):.3g} ({min(speeds):.3g} to {max(speeds):.3g})" if speeds else ""
        steps = max((line["step"] for line in run.lines), default=0)
        rows.append(
            f'<tr><th scope="row">{escape(run.label)}</th>{number(steps, "d")}'
            f"{number(run.chosen, 'd')}{number(losses[0][1] if losses and not losses[0][0] else None, '.4f')}"
            f"{number(min(value for _, value in losses) if losses else None, '.4f')}"
            f"{number(losses[-1][1] if losses else None, '.4f')}"
            f'<td class="number">{span}</td>{number(max(memory) if memory else None, ".2f")}</tr>'
        )
    names = ("steps", "recommended", "base's loss", "lowest", "last", "images/s: median (range)", "peak memory, GB")
    return f"<h2>Speed and memory</h2>{table(heads(['run'], names), rows)}"


def flattened(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            found |= flattened(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def config_differences(runs: Sequence[Told]) -> str:
    """The settings in which the runs differ."""
    flat = [flattened(run.config) for run in runs]
    keys = list(dict.fromkeys(key for one in flat for key in one))
    missing = object()
    rows = []
    for key in keys:
        values = [one.get(key, missing) for one in flat]
        if any(value != values[0] for value in values[1:]):
            cells = "".join(
                f"<td><code>{'' if value is missing else escape(json.dumps(value, ensure_ascii=False, default=str))}"
                "</code></td>"
                for value in values
            )
            rows.append(f'<tr><th scope="row"><code>{escape(key)}</code></th>{cells}</tr>')
    if not rows:
        return "<h2>Settings that differ</h2><p>None: the configurations are equal.</p>"
    return f"<h2>Settings that differ</h2>{table(heads(['setting', *(run.label for run in runs)]), rows)}"


def configuration(run: Told) -> str:
    text = escape(OmegaConf.to_yaml(OmegaConf.create(run.config)))
    return f"<details><summary>Configuration: {escape(run.label)}</summary><pre>{text}</pre></details>"


# ------------------------------------------------------------------ the page


def of(
    folder: Path,
    made: Evaluation | None = None,
    others: Sequence[Evaluation] = (),
    *,
    pairs: Sequence[Cell] = (),
    evaluated_by: str = "",
) -> str:
    """The whole page of the run in `folder`; see `write`."""
    runs = [Told.of(one) for one in (folder, *(other.folder for other in others))]
    if len({run.label for run in runs}) < len(runs):
        runs = [Told.of(run.folder, f"{chr(65 + i)}: {run.label}") for i, run in enumerate(runs)]
    run = runs[0]
    when = time.strftime("%Y-%m-%d %H:%M")
    by = "train/evaluate.py" if made else "training, at its end"
    parts = ["<header>", f"<h1>{escape(run.label)}</h1>", f"<p>written by {by}, {when}</p></header><main>"]
    parts.append(verdict(run, stands_out(folder, made)))
    pairs = pairs or run_pictures.kept_pairs(folder)
    for other, evaluated in zip(runs[1:], others, strict=True):
        parts.append(f"<h2>{escape(other.label)}</h2>{verdict(other, stands_out(other.folder, evaluated))}")
    if made is None:
        pictures = run_pictures.of_training(folder)
    else:
        pictures = run_pictures.of_evaluations([made, *others], [run.label for run in runs])
    before_after = f"<h2>Before and after</h2>{slider.cells(pairs)}" if pairs else ""
    parts.append((before_after + pictures).replace("</h2>", f"</h2>{run_pictures.HINT}", 1))
    parts.append(loss_plots(runs))
    parts += [validation_table(one) for one in runs]
    if made is not None:
        parts += [
            run_pictures.distances([made, *others], [run.label for run in runs]),
            run_pictures.strengths(made),
            run_pictures.memorized(made),
        ]
    parts.append(runs_table(runs))
    if len(runs) > 1:
        parts.append(config_differences(runs))
    parts.append("<h2>To repeat it</h2>")
    parts += [f"{f'<p>{escape(one.label)}</p>' if len(runs) > 1 else ''}{commands(one)}" for one in runs]
    if evaluated_by:
        parts.append(f'<p>This evaluation:</p><pre class="words">{escape(evaluated_by)}</pre>')
    parts += [configuration(one) for one in runs]
    parts.append("</main>")
    return document(run.label, [text for text in parts if text], plots.STYLE + slider.STYLE + STYLE, slider.SCRIPT)


def write(
    folder: Path,
    made: Evaluation | None = None,
    others: Sequence[Evaluation] = (),
    *,
    pairs: Sequence[Cell] = (),
    evaluated_by: str = "",
) -> Path:
    """Write report.html into the run folder, and return it.

    Args:
        made: the evaluation of the run; without one the pictures are those of its sheets.
        others: evaluations of other runs, to be shown beside it.
        pairs: further pictures before and after, shown first. They are kept, and shown by later reports too, as long
            as the adapter is the same.
        evaluated_by: the command of the evaluation.

    Raises ValueError or OSError if the configuration cannot be read, or the file not be written.
    """
    if pairs:
        run_pictures.keep_pairs(folder, pairs)
    write_whole(folder / REPORT, of(folder, made, others, pairs=pairs, evaluated_by=evaluated_by))
    return folder / REPORT


def write_or_warn(folder: Path, pairs: Sequence[Cell] = ()) -> Path | None:
    """`write` at the end of a training, which no page may stop: None, and a warning, if it fails."""
    try:
        return write(folder, pairs=pairs)
    except Exception as error:  # a picture library, numbers that were edited by hand: the adapter is what counts
        warn(f"{folder / REPORT} could not be written ({type(error).__name__}: {error})")
        return None


def pair(label: str, before: Image.Image, after: Image.Image) -> Cell:
    """A picture before and after training, for `write`."""
    return Cell(label, [slider.Shot("base", before), slider.Shot("adapter", after, first=True)])
