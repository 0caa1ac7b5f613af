"""What the studio's pages share: the workspace, the forms that a browser sends, and the pages that it gets."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
from fastapi import Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import BaseModel, ConfigDict

from train.pages.queue import Queue
from train.pages.workspace import Workspace
from train.reports import html
from train.utils.redact import masked_text

TEMPLATES = Path(__file__).with_name("templates")
PAGES = {  # path and name, in the order of work
    "/pictures": "Pictures",
    "/start": "Start",
    "/runs": "Runs",
    "/compare": "Compare",
    "/try": "Try",
    "/export": "Take away",
}


@dataclass(frozen=True)
class Studio:
    """What the pages share, as `request.app.state.studio`."""

    workspace: Workspace
    queue: Queue
    hosts: frozenset[str] | None  # accepted values of the header Host; None accepts all, with a token
    token: str | None = None


class Form(BaseModel):
    """Base of the JSON that a page sends; unknown keys and wrong types are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def studio(request: Request) -> Studio:
    found = request.app.state.studio
    assert isinstance(found, Studio)
    return found


@cache
def environment() -> jinja2.Environment:
    """Return the templates' environment, whose `urlencode` takes names that are not UTF-8."""
    found = html.environment(TEMPLATES)
    found.filters["urlencode"] = lambda value: quote(os.fsencode(str(value)))
    return found


def page(request: Request, template: str, **values: Any) -> HTMLResponse:
    """Return the page or fragment that a template makes of `values`."""
    made = environment().get_template(template)
    queue = studio(request).queue
    values = {"pages": PAGES, "path": request.url.path, "jobs": queue.jobs(), "queue_problem": queue.problem, **values}
    text = made.render(values)
    return HTMLResponse(text.encode(errors="replace"))


def error_response(request: Request, status: int, text: str, field: str = "") -> Response:
    """Return an error as JSON for a form, and as a page for a page."""
    text = masked_text(text)
    is_open = request.url.path.startswith(("/static/", "/login"))  # without a token, which a page's queue needs
    if is_open or request.method != "GET" or request.headers.get("accept", "").startswith("application/json"):
        return JSONResponse({"error": text, "field": field}, status)
    found = page(request, "error.html", title="Error", error=text)
    found.status_code = status
    return found
