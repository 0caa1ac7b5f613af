"""What train/evaluate.py drew and measured of a run, and report.html shows."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from flux2.utils.json_files import read_json
from train.evaluation.distances import Nearest
from train.utils.checks import is_count, is_number
from train.utils.redact import masked

BASE, FINISHED = "base", "finished"  # rows that are no checkpoint
FOLDER, NUMBERS = "evaluation", "evaluation.json"  # in the run folder, and what was measured in that
MOST_BYTES, MOST_IMAGES = 64 << 20, 100_000  # of the file, which may come from someone else


def row_name(step: int) -> str:
    """Return the name of the row of a checkpoint, or of the base for step 0."""
    return f"step {step}" if step else BASE


@dataclass
class Row:
    """One adapter at one strength, or the base, with an image for each column of the evaluation."""

    name: str
    step: int | None = None
    strength: float = 1.0
    files: list[Path | None] = field(default_factory=list)  # None where the model gave pixels that are not finite
    to_training: float | None = None  # mean distance from an image to the nearest training image
    to_base: float | None = None  # mean distance from an image to the base's with the same prompt and seed
    spread: float | None = None  # mean distance between two of the row's own images
    nearest: list[Nearest | None] = field(default_factory=list)  # of each image; None without training images
    to_prompt: float | None = None  # mean cosine of an image's vector and its prompt's; None for features without text

    @property
    def failed(self) -> int:
        return sum(file is None for file in self.files)

    @property
    def suspicious(self) -> int:
        """Number of images that are closer to a training image than training images usually are to one another."""
        return sum(one is not None and one.suspicious for one in self.nearest)

    def to_dict(self) -> dict[str, Any]:
        """Return what was measured as plain values."""
        return asdict(self) | {"files": [file and file.name for file in self.files], "failed": self.failed}


@dataclass
class Evaluation:
    """What was drawn and measured of one run."""

    folder: Path
    features: str  # name of what images are compared by
    prompts: list[str]
    columns: list[tuple[int, int]]  # number of the prompt, and seed, of each image of a row
    rows: list[Row]  # the base, then the adapters in the order of steps
    chosen: str  # name of the recommended row, otherwise of the last
    strengths: list[Row] = field(default_factory=list)  # the chosen adapter, with images from the first seed alone
    trained: list[str] = field(default_factory=list)  # names of the training images
    own: tuple[float, ...] = ()  # distance of each training image to its nearest other one, ascending
    pictures: dict[int, Image.Image] = field(default_factory=dict)  # training images nearest to one of the chosen row
    edited: list[Image.Image | None] = field(default_factory=list)  # what each prompt edits
    damaged: list[str] = field(default_factory=list)  # what could not be evaluated
    notes: list[str] = field(default_factory=list)  # what else a reader should know

    @property
    def labels(self) -> list[str]:
        """A caption for each column."""
        return [f"{self.prompts[i]} (seed {seed})" for i, seed in self.columns]

    def reference(self, column: int) -> Image.Image | None:
        """What the image in a column is an edit of; None if it is none."""
        return self.edited[self.columns[column][0]] if self.edited else None

    @property
    def base(self) -> Row:
        return self.rows[0]

    @property
    def chosen_row(self) -> Row:
        return next(row for row in self.rows if row.name == self.chosen)

    def numbers(self) -> dict[str, Any]:
        """Return everything that was measured as plain values, without secrets."""
        keys = ("features", "prompts", "columns", "chosen", "rows", "strengths", "trained", "own", "damaged", "notes")
        found = {key: getattr(self, key) for key in keys}
        found |= {key: [row.to_dict() for row in found[key]] for key in ("rows", "strengths")}
        return {key: masked(value) for key, value in found.items()}


def read_row(values: Mapping[str, Any], place: Path, columns: int) -> Row:
    """Return the name, step, strength and image files of a row of evaluation.json. Raises ValueError for another."""
    name, step, strength, names = (values[key] for key in ("name", "step", "strength", "files"))
    is_row = isinstance(name, str) and (step is None or is_count(step)) and is_number(strength)
    if not is_row or not isinstance(names, list) or len(names) != columns:
        raise ValueError(f"{name!r} is not a row of it")
    if not all(file is None or (isinstance(file, str) and Path(file).name == file) for file in names):
        raise ValueError(f"a file of {name!r} is outside of its folder")
    return Row(name, step, strength, [None if file is None else place / file for file in names])


def read_evaluation(folder: Path) -> Evaluation | None:
    """Return what train/evaluate.py drew of the run in `folder`, without what it measured; None if there is nothing.

    Raises ValueError, naming the file, for one that is not an evaluation's.
    """
    file, pictures = folder / FOLDER / NUMBERS, folder / FOLDER / "pictures"
    if not file.exists():
        return None
    found = read_json(file, MOST_BYTES)
    try:
        prompts = [str(prompt) for prompt in found["prompts"]]
        columns = [(i, seed) for i, seed in found["columns"]]
        if not all(is_count(i) and i < len(prompts) and is_count(seed) for i, seed in columns):
            raise ValueError("a column has no prompt")
        rows = [read_row(row, pictures, len(columns)) for row in found["rows"]]
        first = [column for column in columns if column[1] == columns[0][1]]
        strengths = [read_row(row, pictures, len(first)) for row in found["strengths"]]
        if not rows or len(rows) * len(columns) > MOST_IMAGES:
            raise ValueError(f"it has {len(rows)} rows of {len(columns)} images")
        return Evaluation(folder, str(found["features"]), prompts, columns, rows, str(found["chosen"]), strengths)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is not the file of an evaluation ({error}). Run train/evaluate.py again") from error
