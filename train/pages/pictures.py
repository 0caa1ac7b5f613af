"""Pictures and captions of a dataset as training reads them: sizes, buckets, crops, problems; captions are edited."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import JSONResponse
from pydantic import Field

from data.sources.base import CaptionPlace
from data.sources.images import BadPicture, FileOpener
from data.sources.listing import METADATA, is_image_name
from train.pages import caption_changes, settings
from train.pages.base import Form, Studio, error_response, page, studio
from train.pages.caption_changes import Changes, insertions, replacements
from train.pages.datasets import Chosen, Library, OpenedDataset
from train.pages.near_duplicates import METHOD, LookAlikes, read_look_alikes
from train.pages.picture_items import Item, item_of
from train.pages.queue import typed
from train.pages.settings import SettingError
from train.pages.thumbnails import SIDES, Thumbnails
from train.utils.caption_files import Change, is_writable, state_of
from train.utils.redact import masked_text
from train.utils.text import many

router = APIRouter()
LIBRARY, THUMBNAILS = Library(), Thumbnails()
ON_A_PAGE = 60
SHOWN = 8  # captions of a preview
RESOLUTION = "1024"
TEMPLATES = ("subject", "style", "edit")  # of train/caption.py
WITH_FILES = ("folder", "pairs")  # datasets that train/caption.py writes to
MOST_FOLDERS = 2000  # that are looked at for images
SUGGESTED = 24
Text = Annotated[str, Field(max_length=200_000)]


class ChosenForm(Form):
    """A dataset; each of its forms has these fields."""

    dataset: Text
    path: Text
    settings: Text
    resolution: Text

    @property
    def chosen(self) -> Chosen:
        return Chosen(self.dataset, self.path, self.settings, self.resolution)


class CaptionForm(ChosenForm):
    key: str
    state: str
    caption: Text


class TriggerForm(ChosenForm):
    trigger: Text
    state: str = ""


class ReplaceForm(ChosenForm):
    find: Text
    by: Text
    state: str = ""


class WriteForm(ChosenForm):
    template: str
    more: Text
    action: str


@router.get("/pictures")
def pictures(
    request: Request,
    dataset: str = "folder",
    path: str = "",
    settings_: Annotated[str, Query(alias="settings")] = "",
    resolution: str = RESOLUTION,
    show: str = "all",
    trigger: str = "",
    search: str = "",
    number: Annotated[int, Query(alias="page", ge=1)] = 1,
) -> Response:
    """The grid of one page of a dataset, or what went wrong above the form that chooses it."""
    known, chosen = studio(request), Chosen(dataset, path, settings_, resolution)
    values: dict[str, Any] = {"chosen": chosen, "choices": settings.choices("dataset"), "resolution": resolution}
    opened, error = None, ""
    if path or dataset == "demo" or settings_:
        try:
            opened = LIBRARY.read(known.workspace, chosen)
        except (ValueError, OSError) as problem:
            error = str(problem)
    if opened is None:
        found = image_folders(known)
        made = page(request, "pictures.html", title="Pictures", opened=None, error=error, folders=found, **values)
        made.status_code = 400 if error else 200
        return made
    alikes = read_look_alikes(alikes_file(known, chosen))
    groups, uncompared = alikes_in(opened, alikes)
    trigger = trigger or opened.captions.trigger or ""
    lacking = {id(change.place) for change in insertions(opened, trigger).changes} if trigger.strip() else set()
    kinds = {
        "all": opened.places,
        "problems": [place for place in opened.places if place.sample.name in opened.reasons],
        "unwritten": opened.unwritten,
        "trigger": [place for place in opened.places if id(place) in lacking],
        "alike": sorted(
            (place for place in opened.places if place.sample.name in groups), key=lambda one: groups[one.sample.name]
        ),
    }
    matching = [place for place in kinds.get(show, opened.places) if is_found(place, search)]
    pages = max(1, -(-len(matching) // ON_A_PAGE))
    number = min(number, pages)
    part = matching[(number - 1) * ON_A_PAGE : number * ON_A_PAGE]

    template = "edit" if chosen.dataset == "pairs" else TEMPLATES[0]

    def address(**other: Any) -> str:
        given = {"show": show, "trigger": trigger, "search": search, **other}
        return f"/pictures?{urlencode({**asdict(chosen), **given}, errors='surrogateescape')}"

    return page(
        request,
        "pictures.html",
        title="Pictures",
        error="",
        opened=opened,
        items=[item(opened, place, groups) for place in part],
        counts={kind: len(places) for kind, places in kinds.items()},
        matching=len(matching),
        show=show,
        search=search,
        trigger=trigger,
        number=number,
        pages_of_pictures=pages,
        address=address,
        alikes=alikes,
        uncompared=uncompared,
        method=METHOD,
        templates=TEMPLATES,
        writes=chosen.dataset in WITH_FILES,
        described=template,
        write_command=typed(write_command(chosen, template, "")),
        near_command=typed(near_command(known, chosen)),
        **values,
    )


def is_found(place: CaptionPlace, search: str) -> bool:
    words = search.casefold().split()
    text = "\n".join((place.sample.name, *place.written)).casefold()
    return all(word in text for word in words)


def item(opened: OpenedDataset, place: CaptionPlace, groups: dict[str, int], said: str = "") -> Item:
    return item_of(opened, place, group=groups.get(place.sample.name, 0), said=said)


def image_folders(known: Studio) -> list[str]:
    """Return folders in the opened ones that hold images or metadata, a few levels deep."""
    waiting, found = [(folder, 0) for folder in known.workspace.folders], list[str]()
    for folder, depth in waiting:
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            continue
        if any(is_image_name(entry.name) or entry.name in METADATA for entry in entries):
            found.append(known.workspace.show(folder))
        inside = [
            Path(entry.path)
            for entry in entries
            if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False)
        ]
        if depth < 3 and len(waiting) < MOST_FOLDERS:
            waiting += [(one, depth + 1) for one in inside if one != known.workspace.outputs]
    return list(dict.fromkeys(found))[:SUGGESTED]


@router.get("/pictures/image")
def image(
    request: Request,
    name: str,
    dataset: str = "folder",
    path: str = "",
    settings_: Annotated[str, Query(alias="settings")] = "",
    resolution: str = RESOLUTION,
    side: int = SIDES[0],
) -> Response:
    """An image of a dataset as a small JPEG."""
    known = studio(request)
    try:
        if side not in SIDES:
            raise ValueError(f"side={side} is not one of {', '.join(map(str, SIDES))}")
        picture = LIBRARY.recent(known.workspace, Chosen(dataset, path, settings_, resolution)).pictures.get(name)
        if picture is None:
            raise ValueError(f"{name} is not in the dataset any more")
        if isinstance(picture.open, FileOpener):
            known.workspace.resolve(picture.open.path)
        content = THUMBNAILS.jpeg(picture, side)
    except BadPicture as error:
        return JSONResponse({"error": masked_text(f"{error.name} {error.reason}"), "field": ""}, 400)
    except (ValueError, OSError) as error:
        return JSONResponse({"error": masked_text(str(error)), "field": ""}, 400)
    return Response(content, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=3600"})


def place_of(opened: OpenedDataset, key: str) -> CaptionPlace | None:
    index = opened.keys.get(key)
    return None if index is None else opened.places[index]


@router.post("/pictures/caption")
def caption(request: Request, form: CaptionForm) -> Any:
    """Write one caption, if it is as the page last saw it."""
    known = studio(request)
    opened = LIBRARY.recent(known.workspace, form.chosen)
    place = place_of(opened, form.key)
    if place is None or state_of(place) != form.state:
        opened = LIBRARY.read(known.workspace, form.chosen)
        place = place_of(opened, form.key)
    if place is None or state_of(place) != form.state:
        what = "it is not where it was" if place is None else f"{place.file} was changed since this page read it"
        text = f"not saved: {what}, and is kept. Copy your text, and load the page again"
        return error_response(request, 409, text, "caption")
    is_list = isinstance(place.row.get(place.column), list)
    text = form.caption.strip()
    captions = tuple(line.strip() for line in text.split("\n") if line.strip()) if is_list else (text,)
    said = "saved"
    try:
        if not is_writable(place):
            raise ValueError(f"the captions of {place.sample.name} are not in a file that is written here")
        caption_changes.check(opened, [Change(place, captions)])
        if captions == tuple(text.strip() for text in place.written):
            said = "nothing to save"
        else:
            caption_changes.write(known.workspace, [Change(place, captions)])
    except ValueError as error:
        return error_response(request, 400, str(error), "caption")
    opened = LIBRARY.read(known.workspace, form.chosen)
    place = place_of(opened, form.key)
    if place is None:
        return {"message": said}
    return fragment(request, "pictures_caption.html", chosen=form.chosen, item=item(opened, place, {}, said))


def fragment(request: Request, template: str, **values: Any) -> dict[str, str]:
    return {"html": bytes(page(request, template, **values).body).decode()}


@router.post("/pictures/trigger")
def trigger(request: Request, form: TriggerForm) -> Any:
    """Show which captions lack a trigger word, or put it into them all."""
    if not form.trigger.strip():
        return error_response(request, 400, "give the word that each caption should have", "trigger")
    opened = LIBRARY.read(studio(request).workspace, form.chosen)
    return previewed(request, form, opened, insertions(opened, form.trigger.strip()), "/pictures/trigger")


@router.post("/pictures/replace")
def replace_all(request: Request, form: ReplaceForm) -> Any:
    """Show which captions a replacement changes, or do it."""
    if not form.find:
        return error_response(request, 400, "give the text to find", "find")
    opened = LIBRARY.read(studio(request).workspace, form.chosen)
    return previewed(request, form, opened, replacements(opened, form.find, form.by), "/pictures/replace")


def previewed(
    request: Request, form: TriggerForm | ReplaceForm, opened: OpenedDataset, found: Changes, address: str
) -> Any:
    """Return what changes; with the state of an earlier such answer, change it if it is still the same."""
    done = 0
    caption_changes.check(opened, found.changes)
    if form.state and form.state != found.state:
        text = "nothing is written: the captions were changed since they were shown. Look at the new list"
        return error_response(request, 409, text)
    if form.state:
        done = found.apply(studio(request).workspace)
        LIBRARY.read(studio(request).workspace, form.chosen)
    return fragment(
        request,
        "pictures_changes.html",
        found=found,
        first=found.changes[:SHOWN],
        form=form.model_dump(exclude={"state"}),
        address=address,
        done=done,
        again=f"/pictures?{urlencode(asdict(form.chosen), errors='surrogateescape')}",
    )


def write_command(chosen: Chosen, template: str, more: str) -> list[str]:
    """Return the command that writes the captions that are missing. Raises SettingError for what is no setting."""
    if template not in TEMPLATES:
        raise SettingError(f"template={template!r} is not one of {', '.join(TEMPLATES)}", "template")
    words = [word for word in chosen.words if word.startswith("dataset")]
    try:
        own = caption_settings(more)
    except SettingError as error:
        raise SettingError(str(error), "more") from error
    return settings.command([*words, f"caption.template={template}", *own], "caption")


def caption_settings(more: str) -> list[str]:
    """Return overrides of train/caption.py, one a line."""
    found = []
    for line in filter(None, map(str.strip, more.split("\n"))):
        name, equals, value = line.partition("=")
        if not equals or (not name.startswith("caption.") and name not in ("device", "seed")):
            raise SettingError(f"{line!r} is no setting of train/caption.py, such as caption.model=dev")
        found.append(settings.override(name, value))
    return found


@router.post("/pictures/write")
def write(request: Request, form: WriteForm) -> Any:
    """Show the command that writes missing captions, or put it into the queue."""
    known = studio(request)
    try:
        command = write_command(form.chosen, form.template, form.more)
        opened = LIBRARY.read(known.workspace, form.chosen)
    except SettingError as error:
        return error_response(request, 400, str(error), error.field)
    if form.action != "queue":
        return fragment(request, "pictures_command.html", command=typed(command), said="")
    if not opened.unwritten:
        raise ValueError("every image has a caption: there is nothing to write")
    title = f"captions for {many(len(opened.unwritten), 'image')} of {form.path}"
    job = known.queue.add(title, command, device=device_of(command))
    return fragment(request, "pictures_command.html", command=job.shown, said=f"job {job.number} is in the queue")


def device_of(command: Sequence[str]) -> str:
    return next((word.partition("=")[2] for word in command if word.startswith("device=")), "")


def alikes_file(known: Studio, chosen: Chosen) -> Path:
    """Return the file of what the search for near-duplicates in a dataset finds."""
    text = "\0".join((str(Path.cwd()), chosen.dataset, chosen.path, chosen.settings))
    name = hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:20]
    return known.workspace.outputs / "studio" / "near_duplicates" / f"{name}.json"


def alikes_in(opened: OpenedDataset, alikes: LookAlikes | None) -> tuple[dict[str, int], int]:
    """Return the group of each image that looks like another one, by name, and how many are not compared yet."""
    targets = {place.sample.name: place.sample.target for place in opened.places}
    return ({}, len(targets)) if alikes is None else alikes.group_of(targets.values())


def near_command(known: Studio, chosen: Chosen) -> list[str]:
    command = [sys.executable, "-m", "train.pages.near_duplicates"]
    command += ["--into", known.workspace.show(alikes_file(known, chosen)), f"--dataset={chosen.dataset}"]
    command += [f"--path={chosen.path}"] if chosen.path else []
    return command + ([f"--settings={chosen.settings}"] if chosen.settings else [])


@router.post("/pictures/near")
def near(request: Request, form: ChosenForm) -> dict[str, str]:
    """Put the search for near-duplicates into the queue."""
    known = studio(request)
    LIBRARY.recent(known.workspace, form.chosen)
    job = known.queue.add(f"near-duplicates in {form.path or form.dataset}", near_command(known, form.chosen), "cpu")
    return {"message": f"job {job.number} is in the queue: load this page again when it is done"}
