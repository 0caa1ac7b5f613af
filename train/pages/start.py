"""Plan and start a run: what is trained, whether it fits, the command, and its place in the queue."""

from __future__ import annotations

import re
import time
from itertools import chain
from urllib.parse import urlencode

import torch
from fastapi import APIRouter, Request, Response
from omegaconf import OmegaConf
from pydantic import Field

from train import plan as planning
from train.cli.errors import USER_ERRORS
from train.pages import settings as forms
from train.pages.base import Form, Studio, page, studio
from train.pages.datasets import check_files
from train.pages.settings import MISSING, SettingError
from train.pages.workspace import Refused
from train.planner.gpus import SIZES
from train.planner.lighter_runs import lighter_runs
from train.planner.plan_tables import GPU_COLUMNS, gpu_rows
from train.planner.plans import make_plan
from train.reports.batch_sheet import WIDTH
from train.reports.html import data_uri
from train.stages.first_batch import plan_first_batch
from train.stages.memory import distilled_model
from train.utils.text import many

router = APIRouter()
USE_CASES = ("style", "character", "object", "edit", "slider")
FIRST = (  # what is asked first; everything else is in the list of all settings
    "dataset.path",
    "dataset.captions.trigger",
    "name",
    "steps",
    "buckets.resolution",
    "adapter.rank",
    "optimizer.lr",
    "sample.prompts",
)
MOST_SAMPLES = 2000  # of a dataset that is read while the page waits


class StartForm(Form):
    """Choices of groups by group, and values of settings by name, as typed; those of the choices are left out.

    `lists` has those of lists of texts.
    """

    groups: dict[str, str] = Field(default_factory=dict, max_length=64)
    values: dict[str, str] = Field(default_factory=dict, max_length=1000)
    lists: dict[str, list[str]] = Field(default_factory=dict, max_length=64)
    card: float | None = Field(default=None, ge=1, le=10_000)


def group_overrides(chosen: StartForm) -> list[str]:
    """Return the overrides of the chosen groups. Raises SettingError for a group or a choice that conf/ has not."""
    found = []
    for group, choice in chosen.groups.items():
        if group not in forms.groups():
            raise SettingError(f"{group!r} is no group of settings", group)
        if choice and choice not in forms.groups()[group]:
            raise SettingError(f"{group}={choice} is not one of {', '.join(forms.groups()[group])}", group)
        if choice:
            found.append(f"+experiment={choice}" if group == "experiment" else f"{group}={choice}")
    return found


def overrides_of(known: Studio, chosen: StartForm) -> list[str]:
    """Return the overrides of a form: groups, then the values that differ from what they compose.

    Raises SettingError for what is no setting, and Refused for a path outside of the opened folders.
    """
    choices = group_overrides(chosen)
    before = {one.name: one.value for one in forms.settings(choices)}
    found = []
    for name, value in chosen.values.items():
        if name not in before:
            raise SettingError(f"{name} is no setting of these choices", name)
        if value.strip() == before[name].strip() or (not value.strip() and before[name] == "null"):
            continue
        if forms.PLACES.search(name):
            known.workspace.check(value)
        found.append(forms.override(name, value.strip()))
    for name, lines in chosen.lists.items():
        if name not in before or name in chosen.values:
            raise SettingError(f"{name} is no setting of these choices, or is given twice", name)
        found.append(forms.override_of_lines(name, lines))
    composed = forms.flatten(OmegaConf.to_container(forms.compose(choices + found), resolve=True))
    for name in filter(forms.PLACES.search, [*chosen.values, *chosen.lists]):
        known.workspace.check(composed.get(name, ""))  # as it is read in the end
    return choices + found


@router.get("/start")
def start(request: Request, experiment: str = "", dataset: str = "", path: str = "") -> Response:
    """The form; `experiment`, and the dataset at `path`, are chosen at first."""
    known = [name for name in (experiment,) if name in forms.groups()["experiment"]]
    choices = [f"+experiment={name}" for name in known]
    data = {"dataset": dataset} if dataset in forms.choices("dataset") else {}
    composed = choices + [f"dataset={name}" for name in data.values()]
    data |= {"path": path} if path else {}
    found = forms.settings(composed)
    first = [*FIRST, *(one.name for one in found if one.value == MISSING and one.name not in FIRST)]
    return page(
        request,
        "start.html",
        title="Start",
        experiment=next(iter(known), ""),
        cases=USE_CASES,
        groups=forms.groups(),
        defaults=chosen_groups(choices),
        chosen=chosen_groups(composed),
        given={"dataset.path": path} if path else {},
        is_told_model=bool(known),
        with_data=urlencode(data),
        settings=sorted(found, key=lambda one: first.index(one.name) if one.name in first else len(first)),
        first=first,
        about=forms.about("experiment", known[0]) if known else "",
        sizes=SIZES,
    )


def chosen_groups(choices: list[str]) -> dict[str, str]:
    """Return the choice of each group that `choices` compose."""
    return dict.fromkeys(forms.groups(), "") | forms.chosen_groups(choices)


@router.post("/start/settings")
def list_settings(request: Request, chosen: StartForm) -> dict[str, str]:
    """The list of all settings that the chosen groups have."""
    choices = group_overrides(chosen)
    found = page(request, "start_settings.html", settings=forms.settings(choices), given=chosen.values, first=FIRST)
    return {"html": bytes(found.body).decode()}


@router.post("/start/plan")
def plan(request: Request, chosen: StartForm) -> dict[str, str]:
    """What is predicted for the form."""
    overrides = overrides_of(studio(request), chosen)
    card = [] if chosen.card is None else [f"+card={chosen.card:g}"]
    config = forms.compose([*overrides, *card])
    try:
        found = make_plan(config)
        rows, about = list(gpu_rows(found)) if found.on_gpu else [], planning.about_images(found)
        lighter = [(one, forms.typed_command(one.command(overrides))) for one in lighter_runs(config, found)]
    except USER_ERRORS as error:
        raise forms.error_of(error, overrides) from error
    step = planning.describe(found.planner, found.now, found.on, found.name)
    best = found.best()
    return {
        "html": bytes(
            page(
                request,
                "start_plan.html",
                plan=found,
                best=best,
                step=step,
                total=planning.total_time(found),
                notes=[
                    *here(found.on_gpu and chosen.card is None),
                    *about,
                    planning.text_encoder_text(found),
                    distilled_model(found.run.variant),
                ],
                host=planning.host_text,
                lighter=lighter,
                columns=GPU_COLUMNS,
                rows=rows,
                colors={name: place for place, name in enumerate(dict.fromkeys(chain(*found.now.phases.values())))},
                widest=max([found.limit, *map(found.now.total, found.now.phases)]),
                command=forms.typed_command(overrides),
                plan_command=forms.typed_command([*overrides, *card], "plan"),
            ).body
        ).decode()
    }


def here(is_for_this_machine: bool) -> list[str]:
    """Return what is to be known of a plan without the size of a GPU."""
    if torch.cuda.is_available() or not is_for_this_machine:
        return []
    return ["This machine has no GPU, so a run here trains on the CPU: the embedded model in minutes, others hardly."]


@router.post("/start/batch")
def batch(request: Request, chosen: StartForm) -> dict[str, str]:
    """The first samples as the form would train them: a picture, made at once where the images are here and few."""
    known = studio(request)
    overrides = overrides_of(known, chosen)
    config, began = forms.compose(overrides), time.monotonic()
    command = forms.typed_command([*overrides, "+preview=batch.png"], "plan")
    try:
        classes = config.preservation.get("dataset")
        groups = [config.dataset] if classes is None else [config.dataset, classes]
        plain = [OmegaConf.to_container(group, resolve=True, throw_on_missing=True) for group in groups]
        count = sum(check_files(known.workspace, group) for group in plain)
        if count > MOST_SAMPLES:
            raise ValueError(f"{many(count, 'image')} are too many to read while a page waits. Type: {command}")
        first = plan_first_batch(make_plan(config).run)
        image = data_uri(first.sheet(), WIDTH)
    except Refused:
        raise
    except USER_ERRORS as error:
        raise forms.error_of(error, overrides) from error
    values = {"image": image, "seconds": time.monotonic() - began, "command": command}
    return {"html": bytes(page(request, "start_batch.html", **values).body).decode()}


@router.post("/start/run")
def run(request: Request, chosen: StartForm) -> dict[str, str]:
    """Put the run into the queue, after the checks that it makes before it computes anything."""
    known = studio(request)
    overrides = overrides_of(known, chosen)
    config = forms.compose(overrides)
    try:
        found = make_plan(config.copy())
    except USER_ERRORS as error:
        raise forms.error_of(error, overrides) from error
    if text := planning.missing_images(found.run):
        raise SettingError(f"{text}. Give the folder or file with the images", "dataset.path")
    name = str(config.name)
    if config.get("output_dir") is None:
        if not re.fullmatch(r"[\w.-]+", name):
            raise SettingError(f"name={name!r} must be a word without slashes: it becomes a folder", "name")
        folder = known.workspace.outputs / name / time.strftime("%Y-%m-%d_%H-%M-%S")
        overrides.append(forms.override("output_dir", known.workspace.show(folder)))
    else:
        folder = known.workspace.resolve(str(config.output_dir))
    device = str(config.get("device") or "")
    job = known.queue.add(f"train {name}", forms.command(overrides), device, folder)
    return {"redirect": f"/jobs/{job.number}"}
