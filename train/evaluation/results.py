"""What train/evaluate.py drew and measured of a run, and report.html shows."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from train.evaluation.distances import Nearest
from train.utils.redact import masked

BASE = "base"


@dataclass
class Row:
    """One adapter at one strength, or the base, with an image for each column of the evaluation.

    Attributes:
        files: The images; None where the model gave pixels that are not finite.
        to_training: Mean distance from an image to the nearest training picture.
        to_base: Mean distance from an image to the base's with the same prompt and seed.
        spread: Mean distance between two of the row's own images.
        nearest: The training picture nearest to each image; None without training pictures.
    """

    name: str
    step: int | None = None
    strength: float = 1.0
    files: list[Path | None] = field(default_factory=list)
    to_training: float | None = None
    to_base: float | None = None
    spread: float | None = None
    nearest: list[Nearest | None] = field(default_factory=list)

    @property
    def failed(self) -> int:
        return sum(file is None for file in self.files)

    @property
    def suspicious(self) -> int:
        """How many images are closer to a training picture than training pictures usually are to one another."""
        return sum(one is not None and one.suspicious for one in self.nearest)

    def to_dict(self) -> dict[str, Any]:
        """Return what was measured as plain values."""
        names = [None if file is None else file.name for file in self.files]
        return {**asdict(self), "files": names, "failed": self.failed}


@dataclass
class Evaluation:
    """What was drawn and measured of one run.

    Attributes:
        features: Name of what images are compared by.
        columns: Number of the prompt and seed of each image of a row.
        rows: The base, then the adapters in the order of steps.
        chosen: Name of the recommended row, otherwise of the last.
        strengths: The chosen adapter at each strength, with images from the first seed alone.
        trained: Names of the training pictures.
        own: Distance of each training picture to its nearest other one, ascending.
        pictures: The training pictures that are nearest to an image of the chosen row, by number.
        damaged: What could not be evaluated.
        notes: What else a reader should know.
    """

    folder: Path
    features: str
    prompts: list[str]
    columns: list[tuple[int, int]]
    rows: list[Row]
    chosen: str
    strengths: list[Row] = field(default_factory=list)
    trained: list[str] = field(default_factory=list)
    own: tuple[float, ...] = ()
    pictures: dict[int, Image.Image] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def labels(self) -> list[str]:
        """A caption for each column."""
        return [f"{self.prompts[i]} (seed {seed})" for i, seed in self.columns]

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
