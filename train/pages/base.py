"""What the studio's pages share: the workspace, the forms that a browser sends, and the pages that it gets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

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

    model_config = ConfigDict(extra="forbid", strict=True)


def studio(request: Request) -> Studio:
    found = request.app.state.studio
    assert isinstance(found, Studio)
    return found


def page(request: Request, template: str, **values: Any) -> HTMLResponse:
    """Return the page or fragment that a template makes of `values`."""
    made = html.environment(TEMPLATES).get_template(template)
    text = made.render(pages=PAGES, path=request.url.path, jobs=studio(request).queue.jobs(), **values)
    return HTMLResponse(text.encode(errors="replace"))


def error_response(request: Request, status: int, text: str, field: str = "") -> Response:
    """Return an error as JSON for a form, and as a page for a page."""
    text = masked_text(text)
    if request.method != "GET" or request.headers.get("accept", "").startswith("application/json"):
        return JSONResponse({"error": text, "field": field}, status)
    found = page(request, "error.html", title="Error", error=text)
    found.status_code = status
    return found
