"""Take an adapter away: a file for another program, the model card, the Hub."""

from __future__ import annotations

import sys
from pathlib import Path

from fastapi import APIRouter, Request, Response

from flux2.export.arguments import FORMATS, FULL
from flux2.generate.metadata import adapter_files
from flux2.utils.json_files import read_text
from flux2.utils.text import gigabytes
from train.pages.base import Form, page, studio
from train.pages.settings import SettingError
from train.pages.trying import adapters
from train.publishing.hub import given_settings
from train.publishing.model_card import CARD

router = APIRouter()
READ_BY = {  # what the other program reads
    "diffusers": "diffusers: pipe.load_lora_weights(FILE)",
    "comfyui": "ComfyUI: put the file into models/loras, and use LoraLoaderModelOnly",
    "kohya": "musubi-tuner and other programs with kohya's keys",
    "full-bfl": "a whole transformer with the adapter merged, in Black Forest Labs' keys; needs the base's files",
    "full-diffusers": "a whole transformer with the adapter merged, as a diffusers folder; needs the base's files",
}
MOST_CARD = 1 << 20


class Export(Form):
    """An adapter, a format and where to write."""

    adapter: str
    format: str
    out: str
    strength: float | None = None


class Push(Form):
    """A finished run and a repository."""

    run: str
    repo_id: str
    private: bool = True


@router.get("/export")
def show(request: Request, adapter: str = "") -> Response:
    known, card = studio(request), ""
    found = adapters(known)
    chosen = adapter or next(iter(found), "")
    size = ""
    if chosen:
        folder = known.workspace.resolve(chosen)
        if not folder.exists():
            raise ValueError(f"{chosen} does not exist any more")
        if (folder / CARD).is_file():
            card = read_text(folder / CARD, MOST_CARD)
        try:
            size = gigabytes(adapter_files(str(folder))[0].stat().st_size)
        except (ValueError, OSError):  # it is being written
            size = ""
    return page(
        request, "export.html", title="Take away", adapters=found, chosen=chosen, formats=READ_BY, card=card, size=size
    )


@router.post("/export")
def export(request: Request, wish: Export) -> dict[str, str]:
    """Put the conversion into the queue."""
    known = studio(request)
    if wish.format not in FORMATS:
        raise SettingError(f"format={wish.format!r} must be one of {', '.join(FORMATS)}", "format")
    adapter, out = known.workspace.resolve(wish.adapter), known.workspace.resolve(wish.out)
    if not wish.out or out == Path.cwd():
        raise SettingError("out is missing: give the file to write, such as exports/mine.safetensors", "out")
    if wish.format != "full-diffusers" and out.suffix != ".safetensors":
        raise SettingError(f"out={wish.out} must end in .safetensors", "out")
    if out.exists():
        raise SettingError(f"out={wish.out} exists: give another name", "out")
    scale = "" if wish.strength is None else f":{wish.strength:g}"
    out.parent.mkdir(parents=True, exist_ok=True)
    words = [f"{known.workspace.show(adapter)}{scale}", "--format", wish.format, "--out", known.workspace.show(out)]
    kind = "merge" if wish.format in FULL else "export"
    job = known.queue.add(f"{kind} {out.name}", [sys.executable, "-m", "flux2.export", *words], "", out.parent)
    return {"message": f"job {job.number}: {job.shown}"}


@router.post("/export/push")
def push(request: Request, wish: Push) -> dict[str, str]:
    """Put the upload to the Hub into the queue. The token is that of `hf auth login`, and is not asked for here."""
    known = studio(request)
    run = known.workspace.resolve(wish.run)
    given_settings(run, wish.repo_id, wish.private)  # names what is wrong before anything is uploaded
    words = [known.workspace.show(run), "--repo-id", wish.repo_id, "--private" if wish.private else "--public"]
    job = known.queue.add(f"push {wish.repo_id}", [sys.executable, "-m", "train.hub", *words], "", run)
    return {"message": f"job {job.number}: {job.shown}"}
