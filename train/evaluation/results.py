"""What was drawn and measured of a run, as train/evaluate.py found it and report.html shows it."""

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
    """One adapter at one strength, or the base, in the order of the evaluation's columns.

    Attributes:
        files: of its pictures; None where what the model gave was not finite.
        to_training: mean distance of a picture to the nearest training picture; to_base: to the base's picture of the
            same prompt and seed; spread: between two of its own pictures.
        nearest: the training picture nearest to each; None without training pictures.
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
        """How many pictures are as near to a training picture as hardly any two of those are."""
        return sum(one is not None and one.suspicious for one in self.nearest)


@dataclass
class Evaluation:
    """What was drawn and measured of one run.

    Attributes:
        features: what pictures are compared by.
        columns: (number of the prompt, seed) of each picture of a row.
        rows: the base, then the adapters by step.
        chosen: the name of the row that is recommended, or else the last.
        strengths: the chosen adapter at each strength, its pictures from the first seed alone.
        trained: names of the training pictures; own: the distances of each to its nearest other, ascending.
        pictures: those training pictures that are nearest to one of the chosen row, by number.
        damaged, notes: what could not be evaluated, and what else a reader should know.
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
    def base(self) -> Row:
        return self.rows[0]

    @property
    def chosen_row(self) -> Row:
        return next(row for row in self.rows if row.name == self.chosen)

    def numbers(self) -> dict[str, Any]:
        """All that was measured, as plain values, without secrets."""

        def values(row: Row) -> dict[str, Any]:
            names = [None if file is None else file.name for file in row.files]
            nearest = [None if one is None else asdict(one) for one in row.nearest]
            return {**asdict(row), "files": names, "nearest": nearest, "failed": row.failed}

        found = {
            "features": self.features,
            "prompts": self.prompts,
            "columns": self.columns,
            "chosen": self.chosen,
            "rows": [values(row) for row in self.rows],
            "strengths": [values(row) for row in self.strengths],
            "trained": self.trained,
            "own": self.own,
            "damaged": self.damaged,
            "notes": self.notes,
        }
        return {key: masked(value) for key, value in found.items()}
