"""Compare the checkpoints of a run: `python train/evaluate.py run=outputs/demo/<time> [compare=OTHER] [key=value ...]`

Draws the same prompts from the same seeds with the base and every checkpoint, measures the pictures, and writes
report.html into the run folder (docs/evaluation.md). All that it needs is in that folder; pictures are kept in its
`evaluation/`, so an evaluation that was interrupted goes on where it was.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # a script's own folder comes first in sys.path, and ours would hide libraries
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from train.cli.start import start

    start("evaluate")

import itertools
import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from flux2.adapters.formats import AdapterError
from train.cli.app import command
from train.config.instantiate import instantiate, parse_settings
from train.evaluation import distances
from train.evaluation.features import Features
from train.evaluation.findings import find_problems
from train.evaluation.recommend import closing_lines, recommend
from train.evaluation.results import BASE, Evaluation, Row
from train.reports import run_report
from train.stages.saved_run import Candidate, SavedRun, candidates, check_run_folder
from train.utils.checks import check_count, is_number
from train.utils.console import warn
from train.utils.files import read_image, write_whole
from train.utils.memory import free_memory
from train.utils.progress import ItemProgress
from train.utils.redact import masked_command, masked_text
from train.validation.sample_grid import sample_grid
from train.validation.samples import is_string_list

NUMBERS, GRID = "evaluation.json", "grid.png"  # in the folder of an evaluation

# ------------------------------------------------------------------ settings


@dataclass(frozen=True)
class EvaluationSettings:
    """The keys of conf/evaluate.yaml but the group `features`."""

    run: str
    compare: str | Sequence[str] = field(default_factory=list)
    prompts: Sequence[str] | None = None
    references: Sequence[Any] | None = None
    seeds: Sequence[int] = (0, 1)
    strengths: Sequence[float] = (0, 0.5, 1, 1.5)
    checkpoints: Sequence[int] | None = None
    steps: int | None = None
    guidance: float | None = None
    width: int | None = None
    height: int | None = None
    training_pictures: int = 1000
    device: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.compare, str) and not is_string_list(self.compare):
            raise ValueError(f"compare={self.compare!r} must be a run folder or a list of them")
        compared = [self.compare] if isinstance(self.compare, str) else self.compare
        for key, places in (("run", [self.run]), ("compare", compared)):
            if not all(place.strip() for place in places):
                raise ValueError(
                    f"{key}={getattr(self, key)!r} is empty: give the folder of a run, outputs/<name>/<time>"
                )
        if self.prompts is not None and (not is_string_list(self.prompts) or not self.prompts):
            raise ValueError(f"prompts={self.prompts!r} must be a list of texts, or null for the run's own")
        if self.references is not None and self.prompts is None:
            raise ValueError(f"references={self.references!r} does nothing without prompts: give both")
        for key, low in (("seeds", 0), ("checkpoints", 1)):
            given = getattr(self, key)
            if given is None and key == "checkpoints":
                continue
            if not isinstance(given, list | tuple) or not given or len({str(one) for one in given}) < len(given):
                raise ValueError(f"{key}={given!r} must be a list of different whole numbers")
            for one in given:
                check_count(key, one, low, 2**63 - 1)
        if not isinstance(self.strengths, list | tuple) or not all(is_number(one) for one in self.strengths):
            raise ValueError(f"strengths={self.strengths!r} must be a list of numbers")
        if len(set(self.strengths)) < len(self.strengths):
            raise ValueError(f"strengths={self.strengths!r} has a number twice")
        check_count("training_pictures", self.training_pictures, 1)

    @property
    def others(self) -> list[Path]:
        given = [self.compare] if isinstance(self.compare, str) else self.compare
        return [Path(one).expanduser() for one in given]

    @property
    def sample(self) -> dict[str, Any]:
        """What replaces settings of the run's group `sample`."""
        keys = ("steps", "guidance", "width", "height")
        found: dict[str, Any] = {key: value for key in keys if (value := getattr(self, key)) is not None}
        if self.prompts is not None:
            found |= {"prompts": list(self.prompts), "references": list(self.references or [])}
        return found


# ------------------------------------------------------------------ one run


@dataclass(frozen=True)
class Wanted:
    """What is drawn of a run; see conf/evaluate.yaml. `chosen_alone` leaves out all adapters but the chosen one."""

    strengths: Sequence[float]
    checkpoints: Sequence[int] | None
    training_pictures: int
    chosen_alone: bool = False


def choose(folder: Path, found: Sequence[Candidate]) -> tuple[Candidate, str]:
    """The adapter that the run recommends, else the last; and why not the recommended one, if there is one."""
    recommended = recommend(folder).checkpoint
    if recommended is None:
        return found[-1], ""
    for one in found:
        if one.place.parent == recommended:
            return one, ""
    return found[-1], f"{recommended.name} has the lowest validation loss, but is not among those evaluated"


def evaluate(run: SavedRun, features: Features, wanted: Wanted) -> Evaluation:
    """Draw what is missing, measure all, and write grid.png and evaluation.json, unless only the chosen one is wanted.

    Raises ValueError if the run has no adapter, or memory does not suffice.
    """
    found, damaged = candidates(run.folder, wanted.checkpoints)
    chosen, why_not = choose(run.folder, found)
    notes = [why_not] if why_not else []
    if wanted.chosen_alone:
        found = [chosen]
    for text in damaged:
        tqdm.write(f"warning: left out: {text}", file=sys.stderr)
    columns = [(i, seed) for i in range(len(run.prompts)) for seed in run.seeds]
    adapters: list[Candidate | None] = [None, *found]
    firsts = run.seeds[:1]
    strengths = [float(one) for one in wanted.strengths]
    work: list[tuple[Candidate | None, float, list[int]]] = [(one, 1.0, run.seeds) for one in adapters]
    work += [(chosen, strength, firsts) for strength in strengths if strength not in (0, 1)]
    try:
        total = sum(len(run.missing(*one)) for one in work)
        with closing(ItemProgress("pictures")) as count:
            done = itertools.count(1)
            for one in work:
                for _ in run.draw(*one):
                    count.update(next(done), total, one[0].name if one[0] else BASE)
    except AdapterError as error:
        if (gone := one[0]) is None or gone.place.is_dir():
            raise
        raise ValueError(
            f"{gone.place} was removed while it was to be evaluated, as a run that still trains does with keep_last: "
            "what was drawn is kept, and the same command goes on with what is there now"
        ) from error
    except torch.OutOfMemoryError as error:
        raise ValueError(
            "out of GPU memory while drawing: what was drawn is kept, and the same command goes on. Give smaller "
            f"pictures, width= and height=, or another device ({' '.join(str(error).split())})"
        ) from error

    def row(adapter: Candidate | None, strength: float, at: Sequence[tuple[int, int]], name: str) -> Row:
        files = [run.file(adapter, strength, i, seed) for i, seed in at]
        step = None if adapter is None else adapter.step
        return Row(name, step, strength, [file if file.exists() else None for file in files])

    rows = [row(one, 1.0, columns, one.name if one else BASE) for one in adapters]
    few = [column for column in columns if column[1] in firsts]
    sweep = [row(chosen if strength else None, strength or 1.0, few, f"{strength:g}") for strength in strengths]
    for of_sweep, strength in zip(sweep, strengths, strict=True):
        of_sweep.strength = strength
    made = Evaluation(
        run.folder, features.name, run.prompts, columns, rows, chosen.name, sweep, damaged=damaged, notes=notes
    )
    run.forget()
    measure(made, run, features, few, wanted.training_pictures)
    made.notes += run.notes
    if wanted.chosen_alone:  # the run's own evaluation, if it has one, is of all its checkpoints
        return made
    write_whole(run.place / NUMBERS, json.dumps(made.numbers(), indent=1) + "\n")
    write_grid(made, run.place / GRID)
    return made


def measure(
    made: Evaluation, run: SavedRun, features: Features, few: Sequence[tuple[int, int]], training_pictures: int
) -> None:
    """Fill in the distances."""
    describe = features.load(lambda: run.sampler.autoencoder, run.config.accelerator.device)
    known: dict[Path, Tensor] = {}

    def vector(file: Path | None) -> Tensor | None:
        if file is None:
            return None
        if file not in known:
            picture = read_image(file)
            if picture is None:
                raise ValueError(f"{file} cannot be read: delete it, and the same command draws it again")
            known[file] = describe(picture)
        return known[file]

    loads: list[Callable[[], Image.Image]] = []
    vectors: list[Tensor] = []
    for one in run.trained(training_pictures):
        vectors.append(describe(one.image))
        made.trained.append(one.name)
        loads.append(one.load)
    trained = distances.TrainingDistances.from_vectors(vectors) if vectors else None
    made.own = trained.own if trained else ()
    bases = dict(zip(made.columns, map(vector, made.base.files), strict=True))
    for row, columns in [*((row, made.columns) for row in made.rows), *((row, few) for row in made.strengths)]:
        own = [vector(file) for file in row.files]
        there = [one for one in own if one is not None]
        pairs = [(one, bases[at]) for one, at in zip(own, columns, strict=True)]
        row.to_base = distances.mean_distance([(a, b) for a, b in pairs if a is not None and b is not None])
        row.spread = distances.spread(there)
        row.nearest = [None if one is None or trained is None else trained.nearest(one) for one in own]
        near = [one.distance for one in row.nearest if one is not None]
        row.to_training = sum(near) / len(near) if near else None
    shown = {one.index for one in made.chosen_row.nearest if one is not None}
    made.pictures = {index: loads[index]() for index in sorted(shown)}


def write_grid(made: Evaluation, file: Path) -> None:
    """Every row as a row of pictures, a column for each prompt and seed."""
    found = [[None if one is None else read_image(one) for one in row.files] for row in made.rows]
    some = next((picture for row in found for picture in row if picture is not None), Image.new("RGB", (256, 256)))
    blank = Image.new("RGB", some.size, "grey")
    captions = [f"{masked_text(made.prompts[i])} (seed {seed})" for i, seed in made.columns]
    names = [row.name for row in made.rows]
    side = 256 if len(made.columns) <= 12 else 128
    page = sample_grid([[picture or blank for picture in row] for row in found], captions, names, side)
    write_whole(file, page)
    free_memory()


# ------------------------------------------------------------------ the command


def evaluated(settings: EvaluationSettings, features: Features) -> list[Evaluation]:
    """That of the run, then those of the others, which draw the same prompts with the adapter that each chose."""
    folders = [Path(settings.run).expanduser(), *settings.others]
    for folder, key in zip(folders, ["run", *["compare"] * len(settings.others)], strict=True):
        check_run_folder(folder, key)
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError("compare names a run twice, or the one that is evaluated: give other runs")
    found: list[Evaluation] = []
    sample = settings.sample
    for number, folder in enumerate(folders):
        alone = number > 0
        run = SavedRun(folder, settings.device, sample, settings.seeds)
        if not alone:  # the others draw what the first does
            first = run.config.sample
            keys = ("steps", "guidance", "width", "height")
            sample = {key: getattr(first, key) for key in keys} | {"prompts": run.prompts, "references": first.edits}
        run.config.say(f"evaluating {folder}: {run.config.variant.name}, {len(run.prompts)} prompts, seeds {run.seeds}")
        wanted = Wanted(
            [] if alone else settings.strengths,
            None if alone else settings.checkpoints,
            settings.training_pictures,
            alone,
        )
        found.append(evaluate(run, features, wanted))
        del run
        free_memory()
    return found


def main(config: DictConfig) -> None:
    """Evaluate, write the report, and say what it recommends and where it is."""
    given: dict[str, Any] = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    group = given.pop("features")
    if not isinstance(group, dict):
        raise ValueError(f"features={group!r} must be a group of settings, as in conf/features/latents.yaml")
    features: Features = instantiate("features", group)
    settings: EvaluationSettings = parse_settings("", given, EvaluationSettings)
    found = evaluated(settings, features)
    words = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
    by = f"python train/evaluate.py {masked_command(words)}" if words else ""
    page = run_report.write(found[0].folder, found, evaluated_by=by)
    for one in found:
        for note in one.notes:
            warn(note)
    print(*closing_lines(found[0].folder), sep="\n")
    for text in find_problems(found[0].folder, found[0]):
        print(text)
    print(f"pictures  {found[0].folder / 'evaluation'}")
    print(f"report    {page}", flush=True)


if __name__ == "__main__":
    command(main, "evaluate")
