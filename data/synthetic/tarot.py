"""The cards of the demonstration: a subject of `data.synthetic.drawings` in a style that no drawing has.

How: rectangles and thick strokes at four times the size, averaged down; the subject comes from
`data.synthetic.drawings.draw_subject`. Numerals are strokes and not text, because a font would differ between machines.
"""

from PIL import Image, ImageDraw

from data.synthetic.captions import with_article
from data.synthetic.drawings import COLORS, INK, RGB, draw_subject

TRIGGER = "trtcrd"

CARDS: dict[str, tuple[str, str, str]] = {
    "cup": ("red", "yellow", "purple"),
    "sword": ("blue", "white", "orange"),
    "star": ("yellow", "blue", "red"),
    "moon": ("white", "purple", "blue"),
    "sun": ("orange", "red", "yellow"),
    "tower": ("purple", "white", "red"),
    "key": ("orange", "blue", "yellow"),
    "crown": ("white", "orange", "purple"),
}

GOLD: RGB = (224, 168, 40)
PARCHMENT: RGB = (218, 186, 130)
BAR: RGB = (50, 44, 92)
NUMERAL: RGB = (250, 236, 200)

# All lengths are fractions of the card's side and integers at 128 pixels, so that lines are crisp at the training size.
# From the edge inwards: gold, ink; then a plain bar, the panel and the title bar, with ink lines between. No line is
# too thin for the embedded autoencoder, and the subject is in the center as in the drawings, so that only the style
# around it has to be learned.
GOLD_WIDTH = 9 / 128
INK_WIDTH = 3 / 128
FRAME = GOLD_WIDTH + INK_WIDTH
PANEL_TOP = 29 / 128
PANEL_BOTTOM = 97 / 128
SUBJECT_CENTER = (0.5, (PANEL_TOP + PANEL_BOTTOM) / 2)
SUBJECT_SIZE = 0.44

_OUTLINE = 2.7 / 128
_NUMERAL_HEIGHT = 0.092
_NUMERAL_STROKE = 0.03
_DOT = 4 / 128
# Width of each numeral and its strokes, both in units of its height
_NUMERALS: dict[str, tuple[float, list[tuple[float, float, float, float]]]] = {
    "I": (0.0, [(0.0, 0.0, 0.0, 1.0)]),
    "V": (0.80, [(0.0, 0.0, 0.4, 1.0), (0.4, 1.0, 0.8, 0.0)]),
    "X": (0.80, [(0.0, 0.0, 0.8, 1.0), (0.8, 0.0, 0.0, 1.0)]),
}
_NUMERAL_GAP = 0.62
_SUPERSAMPLING = 4


def roman(number: int) -> str:
    """Return a number from 1 to 39, which needs the letters I, V and X only, as a Roman numeral."""
    if not 1 <= number <= 39:
        raise ValueError(f"number={number} must be from 1 to 39")
    units = ("", "I", "II", "III", "IV", "V", "VI", "VII", "VIII", "IX")
    return "X" * (number // 10) + units[number % 10]


def _draw_numeral(canvas: ImageDraw.ImageDraw, text: str, side: int) -> None:
    width = sum(_NUMERALS[letter][0] for letter in text) + _NUMERAL_GAP * (len(text) - 1)
    x = 0.5 - width * _NUMERAL_HEIGHT / 2
    y = (PANEL_BOTTOM + INK_WIDTH + 1 - FRAME - _NUMERAL_HEIGHT) / 2
    r = _NUMERAL_STROKE / 2 * side
    for letter in text:
        letter_width, strokes = _NUMERALS[letter]
        for x0, y0, x1, y1 in strokes:
            start = ((x + x0 * _NUMERAL_HEIGHT) * side, (y + y0 * _NUMERAL_HEIGHT) * side)
            end = ((x + x1 * _NUMERAL_HEIGHT) * side, (y + y1 * _NUMERAL_HEIGHT) * side)
            canvas.line([start, end], NUMERAL, round(2 * r))
            for cx, cy in (start, end):
                canvas.ellipse((cx - r, cy - r, cx + r, cy + r), NUMERAL)
        x += (letter_width + _NUMERAL_GAP) * _NUMERAL_HEIGHT


def draw_card(shape: str, color: str, number: int, pixels: int = 256) -> Image.Image:
    """Draw a square RGB card with any subject and color of `data.synthetic.drawings`, also those on no card."""
    if color not in COLORS:
        raise ValueError(f"color={color!r} must be one of {', '.join(COLORS)}")
    side = pixels * _SUPERSAMPLING
    card = Image.new("RGB", (side, side), GOLD)
    canvas = ImageDraw.Draw(card)

    def rectangle(x0: float, y0: float, x1: float, y1: float, fill: RGB) -> None:
        canvas.rectangle((round(x0 * side), round(y0 * side), round(x1 * side) - 1, round(y1 * side) - 1), fill)

    rectangle(GOLD_WIDTH, GOLD_WIDTH, 1 - GOLD_WIDTH, 1 - GOLD_WIDTH, INK)
    rectangle(FRAME, FRAME, 1 - FRAME, PANEL_TOP - INK_WIDTH, BAR)
    rectangle(FRAME, PANEL_TOP, 1 - FRAME, PANEL_BOTTOM, PARCHMENT)
    rectangle(FRAME, PANEL_BOTTOM + INK_WIDTH, 1 - FRAME, 1 - FRAME, BAR)
    y = (FRAME + PANEL_TOP - INK_WIDTH) / 2
    for x in (0.3, 0.5, 0.7):
        canvas.ellipse([side * v for v in (x - _DOT, y - _DOT, x + _DOT, y + _DOT)], GOLD)
    _draw_numeral(canvas, roman(number), side)
    center = (SUBJECT_CENTER[0] * side, SUBJECT_CENTER[1] * side)
    draw_subject(canvas, shape, COLORS[color], center, SUBJECT_SIZE * side, 0.0, _OUTLINE * side)
    return card.reduce(_SUPERSAMPLING)


def card_caption(shape: str, color: str) -> str:
    """Return the caption of a card, e.g. "a trtcrd of a red cup, tarot style"."""
    return f"a {TRIGGER} of {with_article(color)} {shape}, tarot style"


def all_cards() -> list[tuple[str, str, int]]:
    """Return shape, color and number of the 24 cards; neighboring numbers have different subjects."""
    pairs = [(shape, colors[i]) for i in range(3) for shape, colors in CARDS.items()]
    return [(shape, color, number) for number, (shape, color) in enumerate(pairs, start=1)]
