"""Pictures before and after, in an HTML page: a slider over both, and below it the row that the second is chosen from.

A cell is one prompt from one seed, its pictures in the order of the rows of the sheet: the base first, then one for
each checkpoint. Each picture is in the page once; without script the row alone is shown. The handle is an
`<input type=range>`, so keys and screen readers know it; the pointer is followed by hand, as browsers differ in
whether a range moves when it is not its knob that is touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from PIL import Image

from train.reports.html import data_uri

STYLE = """
.cells { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(17rem, 100%), 1fr)); gap: 1rem }
.cells.wide-ones { grid-template-columns: minmax(0, 1fr) }
.compare { position: relative; overflow: hidden; background: #fff; --at: 50%; touch-action: pan-y; cursor: ew-resize }
.compare img { pointer-events: none; user-select: none }
.compare .after { position: absolute; inset: 0; height: 100%; clip-path: inset(0 0 0 var(--at)) }
.compare::after { content: ""; position: absolute; top: 0; bottom: 0; left: var(--at); width: 2px; margin-left: -1px;
  background: #fff; box-shadow: 0 0 3px #000; pointer-events: none }
.compare input { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; opacity: 0; touch-action: pan-y;
  cursor: ew-resize }
.compare:focus-within { outline: 3px solid var(--c0, #2f6fde); outline-offset: -3px }
.names { display: flex; justify-content: space-between; gap: .5rem; padding: .2rem .7rem 0; font-size: .85rem }
.names span { overflow-wrap: anywhere }
.strip { display: flex; gap: .3rem; overflow-x: auto; margin: 0; padding: .4rem .7rem .6rem; list-style: none }
.strip li { flex: 1 1 3.2rem; min-width: 3.2rem; max-width: 4.6rem; font-size: .75rem; text-align: center }
.strip button { all: unset; display: block; cursor: pointer; border: 2px solid transparent; border-radius: .3rem;
  overflow: hidden; width: 100% }
.strip button:focus-visible { outline: 2px solid var(--c0, #2f6fde) }
.strip button[aria-pressed=true] { border-color: var(--c0, #2f6fde) }
.strip .missing { border: 1px dashed var(--bad); color: var(--bad); aspect-ratio: 1; display: grid;
  place-items: center; border-radius: .3rem }
.strip b { display: block; font-weight: 400; overflow-wrap: anywhere }
"""

SCRIPT = """
for (const cell of document.querySelectorAll('.cell')) {
  const buttons = [...cell.querySelectorAll('.strip button')];
  if (buttons.length < 2) continue;
  const name = button => button.dataset.name;
  const make = (tag, kind, parent) => {
    const made = document.createElement(tag);
    if (kind) made.className = kind;
    parent.append(made);
    return made;
  };
  const compare = document.createElement('div');
  compare.className = 'compare';
  const before = make('img', 'before', compare), after = make('img', 'after', compare);
  const handle = make('input', '', compare);
  handle.type = 'range'; handle.min = 0; handle.max = 100; handle.step = 1; handle.value = 50;
  const names = document.createElement('div');
  names.className = 'names';
  const left = make('span', '', names), right = make('span', '', names);
  const move = () => {
    compare.style.setProperty('--at', handle.value + '%');
    handle.setAttribute('aria-valuetext', `${handle.value} % ${left.textContent}`);
  };
  const show = chosen => {
    for (const button of buttons) button.setAttribute('aria-pressed', button === chosen);
    after.src = chosen.querySelector('img').src;
    after.alt = chosen.querySelector('img').alt;
    right.textContent = name(chosen);
    move();
  };
  before.src = buttons[0].querySelector('img').src;
  before.alt = buttons[0].querySelector('img').alt;
  left.textContent = name(buttons[0]);
  handle.setAttribute('aria-label', `how much of ${name(buttons[0])} is shown: ${cell.dataset.label}`);
  handle.addEventListener('input', move);
  const follow = event => {
    const box = compare.getBoundingClientRect();
    handle.value = Math.round(100 * (event.clientX - box.left) / box.width);
    move();
  };
  let held = false;
  handle.addEventListener('pointerdown', event => {
    event.preventDefault();  // a browser would put the knob beside the pointer
    held = true;
    handle.focus({preventScroll: true});
    handle.setPointerCapture(event.pointerId);
    follow(event);
  });
  handle.addEventListener('pointermove', event => { if (held) follow(event); });
  for (const end of ['pointerup', 'pointercancel'])
    handle.addEventListener(end, event => {
      if (held && end === 'pointerup') follow(event);
      held = false;
    });
  for (const button of buttons) button.addEventListener('click', () => show(button));
  cell.querySelector('.strip').before(compare, names);
  show(buttons.find(button => button.dataset.first !== undefined) || buttons[buttons.length - 1]);
}
"""


@dataclass(frozen=True)
class Shot:
    """One picture of a cell.

    Attributes:
        name: of its row in the sheet, as `base` or `step 400`.
        image: None where none could be computed.
        first: whether the slider shows it at first, against the first of the cell.
    """

    name: str
    image: Image.Image | None
    first: bool = False


@dataclass(frozen=True)
class Cell:
    """The pictures of one prompt and seed; `label` is a text for its caption, `notes` are further lines."""

    label: str
    shots: Sequence[Shot]
    notes: Sequence[str] = field(default_factory=list)


def shot(one: Shot, label: str, widest: int) -> str:
    name = escape(one.name)
    if one.image is None:
        return f'<li><div class="missing">none</div><b>{name}</b></li>'
    alt = escape(f"{one.name}: {label}")
    first = " data-first" if one.first else ""
    return (
        f'<li><button type="button" data-name="{name}"{first}><img src="{data_uri(one.image, widest)}" alt="{alt}" '
        f'width="{one.image.width}" height="{one.image.height}"></button><b>{name}</b></li>'
    )


def cell(one: Cell, widest: int) -> str:
    """A figure; empty where no picture is there and none is missed."""
    if not one.shots:
        return ""
    label = escape(one.label)
    notes = "".join(f"<br><small>{escape(note)}</small>" for note in one.notes)
    shots = "".join(shot(each, one.label, widest) for each in one.shots)
    return (
        f'<figure class="cell" data-label="{label}"><ul class="strip">{shots}</ul>'
        f"<figcaption>{label}{notes}</figcaption></figure>"
    )


def cells(found: Sequence[Cell], *, whole: bool = False) -> str:
    """All cells; `whole` where each is a sheet of several pictures, which takes the width of the page."""
    count = sum(len(one.shots) for one in found)
    widest = 1100 if whole else 640 if count <= 80 else 400  # a page of some ten MB at most
    figures = [text for one in found if (text := cell(one, widest))]
    return f'<div class="cells{" wide-ones" if whole else ""}">{"".join(figures)}</div>' if figures else ""
