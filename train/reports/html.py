"""What the HTML pages of this project share: one file each, readable on a phone, that asks the network for nothing.

Pictures are data URIs, style and script are in the page, and a policy in its head forbids the browser to fetch
anything, whatever a text from outside might hold.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape

from PIL import Image

WIDEST = 800  # pixels of an embedded sheet; the whole one is in its file
QUALITY = 88
EXACT = 256**2  # pixels: smaller pictures are kept as PNG, as JPEG shows in them when they are enlarged
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --good: #2a8a4a; --bad: #c43c3c }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1.2rem; max-width: 90rem }
h1 { font-size: 1.4rem; margin: 0; overflow-wrap: anywhere }
h2 { font-size: 1.1rem; margin: 2rem 0 .6rem; overflow-wrap: anywhere }
p { margin: .3rem 0 1rem }
code { font-family: ui-monospace, monospace; font-size: .9em; overflow-wrap: anywhere }
.wide { overflow-x: auto; margin-bottom: 1.2rem }
.caption { margin: 1rem 0 .2rem; font-size: .9rem; overflow-wrap: anywhere }
table { border-collapse: collapse; width: 100% }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: left; white-space: nowrap }
th { font-weight: 600 }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums }
tr.best > * { background: color-mix(in srgb, var(--good) 14%, transparent) }
figure { margin: 0; border: 1px solid var(--line); border-radius: .5rem; overflow: hidden; background: var(--soft) }
figure.best { border-color: var(--good); outline: 1px solid var(--good) }
figcaption { padding: .5rem .7rem; overflow-wrap: anywhere }
figure img { display: block; width: 100%; height: auto; background: #fff }
"""


def data_uri(image: Image.Image, widest: int = WIDEST, *, jpeg: bool = False) -> str:
    """`image` for an attribute `src`, at most `widest` pixels wide; small ones as PNG unless `jpeg`."""
    image = image.convert("RGB")
    if image.width > widest:
        size = (widest, max(1, round(image.height * widest / image.width)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    kind = "jpeg" if jpeg or image.width * image.height > EXACT else "png"
    data = io.BytesIO()
    image.save(data, kind, **({"quality": QUALITY} if kind == "jpeg" else {"optimize": True}))
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"


def number(value: float | None, form: str) -> str:
    """A cell of a table; empty for None."""
    return f'<td class="number">{"" if value is None else format(value, form)}</td>'


def heads(names: Iterable[str], numbers: Iterable[str] = ()) -> str:
    """The first row of a table: columns of texts, then columns of numbers."""
    cells = [f'<th scope="col">{escape(name)}</th>' for name in names]
    cells += [f'<th scope="col" class="number">{escape(name)}</th>' for name in numbers]
    return f"<tr>{''.join(cells)}</tr>"


def table(head: str, rows: Sequence[str], caption: str = "") -> str:
    """A table that scrolls by itself where the screen is narrow. All arguments are HTML."""
    named = f'<p class="caption">{caption}</p>' if caption else ""  # a <caption> would be as wide as the table
    return f'{named}<div class="wide" tabindex="0"><table>{head}{"".join(rows)}</table></div>'


def document(title: str, body: Iterable[str], style: str = "", script: str = "") -> str:
    """The whole page. `title` is a text, the rest is HTML, CSS and JavaScript."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{escape(title)}</title><style>{STYLE}{style}</style></head>\n"
        f"<body>{chr(10).join(body)}"
        f"{f'<script>{script}</script>' if script else ''}</body></html>\n"
    )
