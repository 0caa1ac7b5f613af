"""Compare the checkpoints of a run: `python train/evaluate.py run=outputs/demo/<time> [compare=OTHER] [key=value ...]`

Draws the same prompts from the same seeds with the base and every checkpoint, measures the images, and writes
report.html into the run folder (docs/evaluation.md). The run folder contains everything it needs; images are stored in
its `evaluation/`, so an interrupted evaluation resumes.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # train/ comes first in sys.path and would hide libraries
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from train.cli.start import start_command

    start_command("evaluate")  # before the imports below: they take seconds, and --help needs none of them

import itertools
import json
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor

from data.files import user_path
from flux2.adapters.formats import AdapterError
from train.checkpoints import resume
from train.cli.app import command
from train.config.instantiate import instantiate, parse_settings, to_plain
from train.evaluation import distances
from train.evaluation.features import Clip, Features
from train.evaluation.findings import find_problems
from train.evaluation.recommend import recommend, recommend_or_warn
from train.evaluation.results import BASE, FOLDER, NUMBERS, Evaluation, Row
from train.reports import run_report
from train.stages.saved_run import Candidate, SavedRun, candidates, check_run_folder, encoder_address
from train.utils.checks import check_count, is_number
from train.utils.console import say, warn
from train.utils.files import read_image, write_whole
from train.utils.memory import free_memory
from train.utils.progress import ItemProgress
from train.utils.redact import masked_command, masked_text
from train.utils.text import many
from train.validation.sample_grid import sample_grid
from train.validation.samples import is_string_list

GRID = "grid.png"  # in the folder of an evaluation
DRAWING_KEYS = ("steps", "guidance", "width", "height")


@dataclass(frozen=True)
class EvaluationSettings:
    """The keys of conf/evaluate.yaml, except the group `features`."""

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
    text_encoder_url: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.compare, str) and not is_string_list(self.compare):
            raise ValueError(f"compare={self.compare!r} must be a run folder or a list of run folders")
        for key, folders in (("run", [self.run]), ("compare", self.compared)):
            if not all(folder.strip() for folder in folders):
                given = f"{key}={getattr(self, key)!r}"
                raise ValueError(f"{given} is empty. Give the folder of a run, outputs/<name>/<time>")
        if self.prompts is not None and (not is_string_list(self.prompts) or not self.prompts):
            raise ValueError(f"prompts={self.prompts!r} must be a list of strings, or null for the run's own prompts")
        if self.references is not None and self.prompts is None:
            raise ValueError(f"references={self.references!r} has no effect without prompts. Give both")
        for key, low, numbers in (("seeds", 0, self.seeds), ("checkpoints", 1, self.checkpoints)):
            if numbers is None and key == "checkpoints":
                continue
            if not isinstance(numbers, list | tuple) or not numbers or len(set(map(str, numbers))) < len(numbers):
                raise ValueError(f"{key}={numbers!r} must be a list of different integers")
            for one in numbers:
                check_count(key, one, low, 2**63 - 1)
        if not isinstance(self.strengths, list | tuple) or not all(is_number(one) for one in self.strengths):
            raise ValueError(f"strengths={self.strengths!r} must be a list of numbers")
        if len(set(self.strengths)) < len(self.strengths):
            raise ValueError(f"strengths={self.strengths!r} has a number twice. Remove one")
        check_count("training_pictures", self.training_pictures, 1)

    @property
    def compared(self) -> Sequence[str]:
        return [self.compare] if isinstance(self.compare, str) else self.compare

    @property
    def sample(self) -> dict[str, Any]:
        """The settings that replace those of the run's group `sample`."""
        found: dict[str, Any] = {key: value for key in DRAWING_KEYS if (value := getattr(self, key)) is not None}
        if self.prompts is not None:
            found |= {"prompts": list(self.prompts), "references": list(self.references or [])}
        return found


def choose(folder: Path, found: Sequence[Candidate]) -> tuple[Candidate, str]:
    """Return the adapter that the run recommends, or the last, and the reason if it is not the recommended one."""
    recommended = recommend(folder).checkpoint
    if recommended is None:
        return found[-1], ""
    for one in found:
        if one.place.parent == recommended:
            return one, ""
    return found[-1], f"{recommended.name} has the lowest validation loss, but is not among those evaluated"


def evaluate(run: SavedRun, features: Features, settings: EvaluationSettings, chosen_alone: bool) -> Evaluation:
    """Draw missing images, measure all, and write grid.png and evaluation.json.

    With `chosen_alone` only the chosen adapter is evaluated, at strength 1, and no file except the images is written.
    Raises ValueError if the run has no adapter or memory runs out.
    """
    found, damaged = candidates(run.folder, None if chosen_alone else settings.checkpoints)
    chosen, why_not = choose(run.folder, found)
    notes = [why_not] if why_not else []
    if chosen_alone:
        found = [chosen]
    for text in damaged:
        warn(f"skipping {text}")
    columns = [(i, seed) for i in range(len(run.prompts)) for seed in run.seeds]
    adapters: list[Candidate | None] = [None, *found]
    strengths = [] if chosen_alone else [float(one) for one in settings.strengths]
    work: list[tuple[Candidate | None, float, list[int]]] = [(one, 1.0, run.seeds) for one in adapters]
    work += [(chosen, strength, run.seeds[:1]) for strength in strengths if strength not in (0, 1)]
    try:
        total = sum(len(run.missing(*one)) for one in work)
        with closing(ItemProgress("images")) as count:
            done = itertools.count(1)
            for one in work:
                for _ in run.draw(*one):
                    count.update(next(done), total, one[0].name if one[0] else BASE)
    except AdapterError as error:
        if (gone := one[0]) is None or gone.place.is_dir():
            raise
        raise ValueError(
            f"{gone.place} was removed during the evaluation, for example by a run that still trains with keep_last. "
            "Repeat the command: it keeps the images and evaluates the checkpoints that exist now"
        ) from error
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"out of GPU memory while drawing ({' '.join(str(error).split())}). Repeat the command with smaller width= "
            "and height=, or another device=; it keeps the images that were drawn"
        ) from error

    def row(adapter: Candidate | None, strength: float, columns: Sequence[tuple[int, int]], name: str) -> Row:
        files = [run.file(adapter, strength, i, seed) for i, seed in columns]
        step = None if adapter is None else adapter.step
        return Row(name, step, strength, [file if file.exists() else None for file in files])

    rows = [row(one, 1.0, columns, one.name if one else BASE) for one in adapters]
    first = [column for column in columns if column[1] == run.seeds[0]]
    sweep = [row(chosen if strength else None, strength, first, f"{strength:g}") for strength in strengths]
    prompts, name = run.prompts, chosen.name
    result = Evaluation(run.folder, features.name, prompts, columns, rows, name, sweep, damaged=damaged, notes=notes)
    result.edited = list(run.sampler.edited)
    run.free_transformer()
    measure(result, run, features, settings.training_pictures)
    result.notes += run.notes
    if not chosen_alone:  # the files of the run's own evaluation cover all its checkpoints
        write_whole(run.place / NUMBERS, json.dumps(result.numbers(), indent=1) + "\n")
        write_grid(result, run.place / GRID)
    return result


def measure(result: Evaluation, run: SavedRun, features: Features, training_pictures: int) -> None:
    """Measure the distances of all rows and the nearest training images."""
    describe = features.load(lambda: run.sampler.autoencoder, run.config.accelerator.device)
    known: dict[Path, Tensor] = {}

    def vector(file: Path | None) -> Tensor | None:
        if file is None:
            return None
        if file not in known:
            picture = read_image(file)
            if picture is None:
                raise ValueError(f"{file} cannot be read. Delete it and repeat the command, which draws it again")
            known[file] = describe(picture)
        return known[file]

    loads: list[Callable[[], Image.Image]] = []
    vectors: list[Tensor] = []
    for one in run.training_images(training_pictures):
        vectors.append(describe(one.image))
        result.trained.append(one.name)
        loads.append(one.load)
    trained = distances.TrainingDistances.from_vectors(vectors) if vectors else None
    result.own = trained.own if trained else ()
    prompts: list[Tensor] = []
    if isinstance(features, Clip):
        prompts = list(map(features.load_text(run.config.accelerator.device), result.prompts))
    bases = dict(zip(result.columns, map(vector, result.base.files), strict=True))
    first = [column for column in result.columns if column[1] == run.seeds[0]]
    for row, columns in [*((row, result.columns) for row in result.rows), *((row, first) for row in result.strengths)]:
        own = [vector(file) for file in row.files]
        pairs = [(one, bases[column]) for one, column in zip(own, columns, strict=True)]
        row.to_base = distances.mean_distance([(a, b) for a, b in pairs if a is not None and b is not None])
        if prompts:
            fits = [float(one @ prompts[i]) for one, (i, _) in zip(own, columns, strict=True) if one is not None]
            row.to_prompt = sum(fits) / len(fits) if fits else None
        row.spread = distances.spread([one for one in own if one is not None])
        row.nearest = [None if one is None or trained is None else trained.nearest(one) for one in own]
        near = [one.distance for one in row.nearest if one is not None]
        row.to_training = sum(near) / len(near) if near else None
    shown = {one.index for one in result.chosen_row.nearest if one is not None}
    result.pictures = {index: loads[index]() for index in sorted(shown)}


def write_grid(result: Evaluation, file: Path) -> None:
    """Write the sample grid of all rows, with a column for each prompt and seed."""
    images = [[None if one is None else read_image(one) for one in row.files] for row in result.rows]
    some = next((picture for row in images for picture in row if picture is not None), Image.new("RGB", (256, 256)))
    blank = Image.new("RGB", some.size, "grey")
    captions = [f"{masked_text(result.prompts[i])} (seed {seed})" for i, seed in result.columns]
    names = [row.name for row in result.rows]
    side = 256 if len(result.columns) <= 12 else 128
    references = [result.reference(column) for column in range(len(result.columns))]
    if any(image is not None for image in references):
        images, names = [references, *images], ["reference", *names]
    page = sample_grid([[picture or blank for picture in row] for row in images], captions, names, side)
    write_whole(file, page)
    free_memory()


def evaluate_runs(settings: EvaluationSettings, features: Features) -> list[Evaluation]:
    """Evaluate the run, then the compared runs, which draw the same prompts with the recommended adapter alone."""
    folders = [user_path(folder) for folder in (settings.run, *settings.compared)]
    for number, folder in enumerate(folders):
        check_run_folder(folder, "compare" if number else "run")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise ValueError("compare names a run twice, or the run that is evaluated. Give other runs")
    if settings.text_encoder_url and not any(encoder_address(resume.configuration(folder)) for folder in folders):
        raise ValueError(
            f"text_encoder_url={settings.text_encoder_url!r}: the text encoder is on this machine. Omit it"
        )
    found: list[Evaluation] = []
    sample = settings.sample
    for number, folder in enumerate(folders):
        run = SavedRun(folder, settings.device, sample, settings.seeds, settings.text_encoder_url)
        if number == 0:  # the compared runs draw the same as the first
            first = run.config.sample
            sample = {key: getattr(first, key) for key in DRAWING_KEYS}
            sample |= {"prompts": run.prompts, "references": first.edits}
        run.config.say(
            f"evaluating {folder}: {run.config.variant.name}, {many(len(run.prompts), 'prompt')}, seeds {run.seeds}"
        )
        found.append(evaluate(run, features, settings, chosen_alone=number > 0))
        del run
        free_memory()
    return found


def main(config: DictConfig) -> None:
    """Evaluate, write the report, and print the recommendation and the files."""
    values = to_plain(config)
    group = values.pop("features")
    if not isinstance(group, dict):
        raise ValueError(f"features={group!r} must be a group of settings. See conf/features/latents.yaml")
    features: Features = instantiate("features", group)
    settings: EvaluationSettings = parse_settings("", values, EvaluationSettings)
    features.check()
    found = evaluate_runs(settings, features)
    words = list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []
    evaluated_by = f"python train/evaluate.py {masked_command(words)}" if words else ""
    page = run_report.write(found[0].folder, found, evaluated_by=evaluated_by)
    for one in found:
        for note in one.notes:
            warn(note)
    say(*recommend_or_warn(found[0].folder).lines, *find_problems(found[0].folder, found[0]))
    say(f"images    {found[0].folder / FOLDER}", f"report    {page}")


if __name__ == "__main__":
    command(main, "evaluate")
