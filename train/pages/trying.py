"""Try adapters: prompts, references, masks and strengths; every image gives back its settings.

An image is made by `python -m flux2.generate` in the queue, into a folder of outputs/studio/images. The history is what
is in these folders: flux2.generate records in each PNG how it was made.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastapi import APIRouter, Request, Response
from pydantic import Field

from flux2.adapters.files import PEFT_FILE
from flux2.generate import metadata
from flux2.generate.metadata import Record
from flux2.models.variants import VARIANTS
from flux2.utils.choices import PRECISIONS
from train.checkpoints.checkpoint import checkpoints
from train.checkpoints.resume import configuration
from train.pages.base import Form, Studio, page, studio
from train.pages.settings import SettingError
from train.utils.files import make_new
from train.validation.twin import twins

router = APIRouter()
IMAGES = "studio/images"
SHOWN = 60  # newest images of the history


class Wish(Form):
    """What to generate, as typed."""

    model: str
    prompts: list[str] = Field(min_length=1, max_length=100)
    adapters: list[str] = Field(default_factory=list, max_length=20)  # PATH or PATH:STRENGTH
    images: list[str] = Field(default_factory=list, max_length=10)
    mask: str = ""
    strength: float | None = None
    path: str = ""
    precision: str = ""
    device: str = ""
    seed: int = 0
    count: int = Field(default=1, ge=1, le=100)
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance: float | None = None


@dataclass(frozen=True)
class Shown:
    """An image of the history and how it was made."""

    file: Path
    record: Record = field(repr=False)

    @property
    def about(self) -> str:
        record = self.record
        parts = [record.model, f"seed {record.seed}", f"{record.steps} steps", f"{record.width} x {record.height}"]
        return ", ".join([*parts, *(adapter.option() for adapter in record.adapters)])


def history(known: Studio) -> list[Shown]:
    """Return the newest images that were made here and record how."""
    files = sorted((known.workspace.outputs / IMAGES).glob("*/*.png"), key=modified, reverse=True)
    found = []
    for file in files[:SHOWN]:
        try:
            found.append(Shown(file, metadata.read(file, str(file))))
        except ValueError:  # it is being written, or is another program's
            continue
    return found


def modified(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0


def adapters(known: Studio) -> list[str]:
    """Return the finished adapters and the checkpoints of the runs, the newest run first."""
    found: list[str] = []
    for run in known.workspace.runs():
        own = [run / "adapter"] if (run / "adapter" / PEFT_FILE).is_file() else []
        found += [known.workspace.show(place) for place in (*own, *reversed(checkpoints(run)))]
    return found


def usual_model(known: Studio, adapter: str) -> str:
    """Return the model that draws with an adapter of a run: the distilled one of the base that it was trained on."""
    folder = known.workspace.resolve(adapter) if adapter else next(iter(known.workspace.runs()), Path())
    for run in (folder, folder.parent, folder.parent.parent):
        try:
            name = str(configuration(run)["model"]["name"])
        except (ValueError, OSError, KeyError, TypeError):  # it is no run folder
            continue
        same = [name, *twins(VARIANTS[name])] if name in VARIANTS else ["tiny"]
        return min(same, key=lambda other: VARIANTS[other].steps)
    return "tiny"


def words(known: Studio, wish: Wish) -> list[str]:
    """Return the command of a wish, without the file that it writes.

    Raises SettingError, or Refused for a path outside of the opened folders.
    """
    if wish.model not in VARIANTS:
        raise SettingError(f"model={wish.model!r} must be one of {', '.join(VARIANTS)}", "model")
    if wish.precision not in ("", *PRECISIONS):
        raise SettingError(f"precision={wish.precision!r} must be one of {', '.join(PRECISIONS)}", "precision")

    def place(text: str) -> str:
        return known.workspace.show(known.workspace.resolve(text))

    options: list[tuple[str, object]] = [("--model", wish.model)]
    known.workspace.check(wish.path)
    options += [("--path", wish.path)] if wish.path else []
    options += [("--prompt", prompt) for prompt in wish.prompts]
    for adapter in wish.adapters:
        path, colon, rest = adapter.rpartition(":") if not Path(adapter).exists() else (adapter, "", "")
        options.append(("--adapter", f"{place(path or adapter)}{colon}{rest if path else ''}"))
    options += [("--image", place(image)) for image in wish.images]
    options += [("--mask", place(wish.mask))] if wish.mask else []
    values = {
        name: getattr(wish, name) for name in ("strength", "seed", "count", "width", "height", "steps", "guidance")
    }
    options += [(f"--{name}", value) for name, value in values.items() if value is not None]
    options += [(f"--{name}", getattr(wish, name)) for name in ("precision", "device") if getattr(wish, name)]
    texts = [text for name, value in options for text in argument(name, value)]
    return [sys.executable, "-m", "flux2.generate", *texts]


def argument(name: str, value: object) -> Sequence[str]:
    """Return an option with its value, in one word if the value could be read as an option."""
    text = f"{value}"
    return [f"{name}={text}"] if text.startswith("-") else [name, text]


@router.get("/try")
def show(request: Request, image: str = "", adapter: str = "") -> Response:
    """The form, with the settings of `image` or for an `adapter`, and the history."""
    known = studio(request)
    record = None
    if image:
        record = metadata.read(known.workspace.resolve(image), image)
    return page(
        request,
        "try.html",
        title="Try",
        record=record,
        adapter=adapter,
        model=record.model if record else usual_model(known, adapter),
        models=list(VARIANTS),
        precisions=PRECISIONS,
        adapters=adapters(known),
        shown=history(known),
        show=known.workspace.show,
    )


@router.get("/try/live")
def live(request: Request) -> Response:
    known = studio(request)
    return page(request, "try_history.html", shown=history(known), show=known.workspace.show)


@router.post("/try")
def make(request: Request, wish: Wish) -> dict[str, str]:
    """Put the wish into the queue."""
    known = studio(request)
    parent = known.workspace.outputs / IMAGES
    command = words(known, wish)
    folder = make_new(parent / time.strftime("%Y-%m-%d_%H-%M-%S"))
    command += ["--out", known.workspace.show(folder / "image.png")]
    job = known.queue.add(f"generate {wish.prompts[0][:40]}", command, wish.device, folder)
    return {"message": f"job {job.number}: {job.shown}"}
