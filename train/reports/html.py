"""Render the pages of this project: one self-contained HTML file each, readable on a phone, that loads nothing.

Images are data URIs, styles and scripts are in the page, and a content security policy in its head forbids the browser
to fetch anything and to run any script but the project's own, whose hash it names, whatever a text from outside
contains. Jinja2 escapes what it prints, and secrets are masked.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup
from PIL import Image

from train.utils.redact import masked_text

if TYPE_CHECKING:
    import jinja2

TEMPLATES = Path(__file__).with_name("templates")
QUALITY = 88
LOSSLESS_PIXELS = 256**2  # up to this size images are PNG: enlarged, they would show the artifacts of JPEG


@dataclass(frozen=True)
class Table:
    """A table: columns of texts, then columns of numbers. The first cell of a row is its name."""

    texts: Sequence[str]
    numbers: Sequence[str]
    rows: Sequence[Sequence[Any]]
    best: Sequence[bool] = ()  # whether to highlight each row; empty for none
    caption: str = ""


def number(value: float | None, form: str) -> str:
    """Return the text of a table cell, empty for None."""
    return "" if value is None else format(value, form)


def data_uri(image: Image.Image, widest: int, *, jpeg: bool = False) -> Markup:
    """Return `image` as a value for `src`, at most `widest` pixels wide; small images as PNG unless `jpeg`."""
    image = image.convert("RGB")
    if image.width > widest:
        size = (widest, max(1, round(image.height * widest / image.width)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    kind = "jpeg" if jpeg or image.width * image.height > LOSSLESS_PIXELS else "png"
    data = io.BytesIO()
    image.save(data, kind, **({"quality": QUALITY} if kind == "jpeg" else {"optimize": True}))
    return Markup(f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}")


def source_hash(script: str) -> Markup:
    """Return the source of a content security policy that allows this script alone, or none if it is empty."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return Markup(f"'sha256-{digest}'" if script else "'none'")


@cache
def environment(*folders: Path) -> jinja2.Environment:
    """Return the Jinja2 environment of the templates in `folders`, then of those here."""
    import jinja2

    found = jinja2.Environment(
        loader=jinja2.FileSystemLoader([*folders, TEMPLATES]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: masked_text(value) if type(value) is str else value,  # not Markup, which is ours
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters["data_uri"] = data_uri
    found.filters["source_hash"] = source_hash
    found.globals["asset"] = lambda name: Markup((TEMPLATES / name).read_text(encoding="utf-8"))
    return found


def render(template: str, **values: Any) -> str:
    """Return the page that `template`, a file of `templates/`, makes of `values`."""
    page = environment().get_template(template).render(values)
    return page.encode(errors="replace").decode()  # file names that are not UTF-8
