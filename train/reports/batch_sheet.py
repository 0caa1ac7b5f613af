"""A sheet of training samples: each with its images, what is done to them, and its captions, on one page.

What is on it comes from train/stages/first_batch.py. Pixels are shown as they are trained: large images are shrunk, and
small ones enlarged by an integer, so that their pixels stay square.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from train.validation.sample_grid import wrap

FIRST_BATCH = "first_batch.png"  # in the run folder
WIDTH = 1600  # pixels of a page, at most
SIDE = 384  # of an image, at most
GAP = 12
TEXT, SMALL, TITLE = 15, 13, 20  # font sizes
SPACING = 5  # pixels between lines
LINES = 10  # of a caption
MOST_CHARACTERS = 3000  # of a text, of which only lines that fit are drawn
# Pillow's own font has no letters beyond ASCII; of these the first that has the letters is used
SYSTEM_FONTS = (
    "DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "NotoSansCJK-Regular.ttc", "arial.ttf",
    "Arial Unicode.ttf", "msyh.ttc", "malgun.ttf", "YuGothM.ttc", "PingFang.ttc",
)  # fmt: skip
DIM, GRAY = 0.25, (112, 112, 120)  # share that is seen of a pixel that does not count, and what covers it

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Tile:
    """An image, or the reason why there is none, and what it is to its sample."""

    label: str
    image: Image.Image | None
    problem: str = ""


@dataclass(frozen=True)
class Card:
    """A sample: its images side by side, its name, what is to be known of it, and the texts that are trained."""

    tiles: Sequence[Tile]
    name: str
    facts: Sequence[str]
    captions: Sequence[str]


def with_mask(image: Image.Image, weights: np.ndarray) -> Image.Image:
    """Return an image with gray over what does not count; `weights` (H/16, W/16), from 0 to 1, are those of tokens."""
    sides = image.height // weights.shape[0], image.width // weights.shape[1]
    seen = DIM + (1 - DIM) * np.kron(weights, np.ones(sides))[..., None]
    return Image.fromarray(np.rint(seen * np.asarray(image) + (1 - seen) * np.array(GRAY)).astype(np.uint8))


def one_line(text: str) -> str:
    """Return a text without control characters, which become spaces, and without the end of a very long one."""
    printed = "".join(one if one.isprintable() else " " for one in text[:MOST_CHARACTERS])
    return f"{printed} ..." if len(text) > MOST_CHARACTERS else printed


def pieces(text: str, font: Font, width: int) -> Iterator[str]:
    """Yield the words of a text; what is longer than `width` pixels, such as a text without spaces, in parts."""
    for word in text.split():
        part = ""
        for letter in word:
            if part and font.getlength(part + letter) > width:
                yield part
                part = ""
            part += letter
        yield part


def broken(text: str, font: Font, width: int, lines: int) -> str:
    """Return a text in at most `lines` lines of `width` pixels; "..." marks what is left out."""
    words = " ".join(pieces(one_line(text), font, width - round(font.getlength(" ..."))))
    return wrap(words, font, width, lines)


def missing_letters(text: str, font: Font) -> int:
    """Return of how many different characters of a text a font has no picture; it draws a box for each."""
    box = bytes(font.getmask("\uffff"))
    return sum(not letter.isascii() and bytes(font.getmask(letter)) == box for letter in set(one_line(text)))


def height_of(text: str, font: Font) -> int:
    """Return the height in pixels of a text of one or several lines, with a distance to the next."""
    canvas = ImageDraw.Draw(Image.new("L", (1, 1)))
    return round(canvas.multiline_textbbox((0, 0), f"{text}\nx", font, spacing=SPACING)[3] - font.getbbox("x")[3]) + 2


@cache
def system_fonts(size: int) -> list[Font]:
    """Return those of the usual fonts that this machine has."""
    found: list[Font] = []
    for name in SYSTEM_FONTS:
        with suppress(OSError):  # it is not installed
            found.append(ImageFont.truetype(name, size))
    return found


def font_for(text: str, size: int) -> Font:
    """Return the font in which a text is drawn: Pillow's own, or one of the machine that has more of its letters."""
    own = ImageFont.load_default(size)
    if not missing_letters(text, own):
        return own
    return min([own, *system_fonts(size)], key=lambda font: missing_letters(text, font))


def tile_side(cards: Sequence[Card], most: int = SIDE) -> int:
    """Return the side of the square that each image has."""
    widest = max(len(card.tiles) for card in cards)
    return min(most, (WIDTH - GAP) // widest - GAP)


def scaled(image: Image.Image, side: int) -> Image.Image:
    """Return an image shrunk to `side` pixels per side, or enlarged by an integer."""
    longest = max(image.size)
    if longest > side:
        size = [max(1, round(length * side / longest)) for length in image.size]
        return image.resize((size[0], size[1]), Image.Resampling.LANCZOS)
    factor = side // longest
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def draw_card(card: Card, side: int, tiles: int) -> Image.Image:
    """Return the picture of one sample, with `tiles` images of `side` pixels; `info["boxes"]` has where each is."""
    small = ImageFont.load_default(SMALL)
    width = tiles * (side + GAP) - GAP
    fonts = [font_for(caption, TEXT) for caption in card.captions]
    captions = [(broken(words, font, width, LINES), font) for words, font in zip(card.captions, fonts, strict=True)]
    facts = list(card.facts)
    if any(missing_letters(words, font) for words, font in zip(card.captions, fonts, strict=True)):
        facts.append("boxes in the caption: letters that no font here has; they are trained as they are")
    name = font_for(card.name, TEXT)
    lines: list[tuple[str, Font, str]] = [(broken(card.name, name, width, 1), name, "black")]
    lines += [(broken(fact, small, width, 2), small, "#555555") for fact in facts]
    lines += [(words, font, "#003377") for words, font in captions]
    heights = [height_of(words, font) for words, font, _ in lines]
    images = [None if tile.image is None else scaled(tile.image, side) for tile in card.tiles]
    highest = max([side // 3, *(image.height for image in images if image is not None)])
    top = round(SMALL * 1.3) + 4
    page = Image.new("RGB", (width, top + highest + 8 + sum(heights)), "white")
    page.info["boxes"] = []
    canvas = ImageDraw.Draw(page)
    for number, (tile, image) in enumerate(zip(card.tiles, images, strict=True)):
        left = number * (side + GAP)
        canvas.text((left, 0), broken(tile.label, small, side, 1), "#555555", small)
        if image is None:
            canvas.rectangle((left, top, left + side - 1, top + side // 3 - 1), "#eeeeee")
            canvas.multiline_text((left + 8, top + 8), broken(tile.problem, small, side - 16, 5), "#aa0000", small)
        else:
            page.paste(image, (left, top))
            page.info["boxes"].append((left, top, left + image.width, top + image.height))
    place = top + highest + 8
    for (words, font, color), height in zip(lines, heights, strict=True):
        canvas.multiline_text((0, place), words, color, font, spacing=SPACING)
        place += height
    return page


def batch_sheet(cards: Sequence[Card], title: str, notes: Sequence[str] = ()) -> Image.Image:
    """Return the page of all samples, in their order; `info["boxes"]` has where each image is, card by card."""
    side, tiles = tile_side(cards), max(len(card.tiles) for card in cards)
    pages = [draw_card(card, side, tiles) for card in cards]
    across = min(len(pages), max(1, (WIDTH - GAP) // (pages[0].width + GAP)))
    rows = [pages[start : start + across] for start in range(0, len(pages), across)]
    width = GAP + across * (pages[0].width + GAP)
    big, small = ImageFont.load_default(TITLE), ImageFont.load_default(SMALL)
    head = [(broken(title, big, width - 2 * GAP, 3), big)]
    head += [(broken(note, small, width - 2 * GAP, 3), small) for note in notes]
    sheet_rows = sum(max(page.height for page in row) + 2 * GAP for row in rows)
    tops = [height_of(words, font) for words, font in head]
    sheet = Image.new("RGB", (width, GAP + sum(tops) + GAP + sheet_rows), "white")
    sheet.info["boxes"] = []
    canvas, top = ImageDraw.Draw(sheet), GAP
    for (words, font), height in zip(head, tops, strict=True):
        canvas.multiline_text((GAP, top), words, "black", font, spacing=SPACING)
        top += height
    top += GAP
    for row in rows:
        for number, page in enumerate(row):
            left = GAP + number * (page.width + GAP)
            sheet.paste(page, (left, top))
            boxes = page.info["boxes"]
            sheet.info["boxes"].append([(x0 + left, y0 + top, x1 + left, y1 + top) for x0, y0, x1, y1 in boxes])
        top += max(page.height for page in row) + 2 * GAP
    return sheet
