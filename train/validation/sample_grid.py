"""Sample grids: images in rows and columns with captions, and cutting a grid into its images again."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from flux2.utils.json_files import parse_json

LAYOUT = "flux2-lora-grid"  # keyword of the PNG text with the prompts and the positions of the images
REFERENCES = "references"  # key of the layout: the position of what each prompt edits
NAME = re.compile(r"step_(\d{1,12})\.png")


def sample_grids(folder: Path) -> dict[int, Path]:
    """Return the sample grids of a run by step, in ascending order."""
    named = {file: NAME.fullmatch(file.name) for file in (folder / "samples").glob("step_*.png")}
    found = {int(match[1]): file for file, match in named.items() if match is not None}
    return {step: found[step] for step in sorted(found)}


def wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, lines: int) -> str:
    """Break `text` at spaces into at most `lines` lines of `width` pixels; "..." marks omitted text."""
    broken = [""]
    for word in text.split():
        longer = f"{broken[-1]} {word}".strip()
        if font.getlength(longer) <= width or not broken[-1]:
            broken[-1] = longer
        elif len(broken) < lines:
            broken.append(word)
        else:
            while font.getlength(broken[-1] + " ...") > width and " " in broken[-1]:
                broken[-1] = broken[-1].rpartition(" ")[0]
            broken[-1] += " ..."
            break
    return "\n".join(broken)


def stack(strips: Sequence[Image.Image], *, right: bool = False) -> Image.Image:
    """Return grids below each other on one page, at its left or its right edge, with all their `info["boxes"]`."""
    page = Image.new("RGB", (max(strip.width for strip in strips), sum(strip.height for strip in strips)), "white")
    page.info["boxes"], y = [], 0
    for strip in strips:
        x = page.width - strip.width if right else 0
        page.paste(strip, (x, y))
        page.info["boxes"] += [(x0 + x, y0 + y, x1 + x, y1 + y) for x0, y0, x1, y1 in strip.info["boxes"]]
        y += strip.height
    return page


def sample_grid(
    rows: Sequence[Sequence[Image.Image]], columns: Sequence[str], names: Sequence[str] = (), side: int = 256
) -> Image.Image:
    """Return rows of images of equal length, with a caption above each column and a name left of each row.

    Images are scaled to a width of about `side` pixels; a single row is broken after four. `info["boxes"]` has the
    (left, top, right, bottom) of each image, row by row.
    """
    if len(rows) == 1 and len(rows[0]) > 4 and not names:
        starts = range(0, len(rows[0]), 4)
        return stack([sample_grid([rows[0][i : i + 4]], columns[i : i + 4], side=side) for i in starts])
    rows = [[_scaled(picture, side) for picture in row] for row in rows]
    size = tuple(max(picture.size[axis] for row in rows for picture in row) for axis in (0, 1))
    gap, font_size = 6, max(12, size[0] // 18)
    font = ImageFont.load_default(font_size)
    top = round(font_size * 1.25 * 3 + 8) if any(columns) else 0
    left = round(max((font.getlength(name) for name in names), default=0)) + 16 if names else 0
    width, height = left + len(rows[0]) * (size[0] + gap) + gap, top + len(rows) * (size[1] + gap) + gap
    page = Image.new("RGB", (width, height), "white")
    page.info["boxes"] = []
    canvas = ImageDraw.Draw(page)
    for x, caption in enumerate(columns):
        text = wrap(caption, font, size[0], 3)
        canvas.multiline_text((left + gap + x * (size[0] + gap), 6), text, "black", font, spacing=2)
    for y, row in enumerate(rows):
        row_top = top + y * (size[1] + gap)
        if names:
            canvas.text((8, row_top + size[1] // 2), names[y], "black", font, anchor="lm")
        for x, picture in enumerate(row):
            corner = (left + gap + x * (size[0] + gap), row_top)
            page.paste(picture, corner)
            page.info["boxes"].append((*corner, corner[0] + picture.width, row_top + picture.height))
    return page


def _scaled(picture: Image.Image, side: int) -> Image.Image:
    """Scale an image to a width of about `side` pixels, small ones by integer factors, so that pixels stay square."""
    width, height = picture.size
    if width < side:
        factor = round(side / width)
        return picture.resize((width * factor, height * factor), Image.Resampling.NEAREST)
    return picture.resize((side, round(height * side / width)), Image.Resampling.LANCZOS)


def side_by_side(images: Sequence[Image.Image], height: int = 256) -> Image.Image | None:
    """Return images in one row, scaled to `height` pixels; None without any."""
    if not images:
        return None
    scaled = [image.resize((max(1, round(image.width * height / image.height)), height)) for image in images]
    row = Image.new("RGB", (sum(image.width for image in scaled), height))
    for i, image in enumerate(scaled):
        row.paste(image, (sum(other.width for other in scaled[:i]), 0))
    return row


Box = tuple[int, int, int, int]  # left, top, right, bottom


def checked_boxes(grid: Image.Image, boxes: Sequence[Any]) -> list[Box]:
    """Return the boxes of a grid's layout. Raise ValueError if these are outside of it or together larger than it."""
    found = [(int(x0), int(y0), int(x1), int(y1)) for x0, y0, x1, y1 in boxes]
    inside = all(0 <= x0 < x1 <= grid.width and 0 <= y0 < y1 <= grid.height for x0, y0, x1, y1 in found)
    if not inside or sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in found) > grid.width * grid.height:
        raise ValueError("the boxes are not those of a grid")
    return found


def grid_boxes(grid: Image.Image) -> list[tuple[str, Box]]:
    """Return the prompts of a sample grid and the boxes of their images, from the file's header alone.

    An empty list if the file has no layout, or not that of a grid. It may come from someone else: the images lie in the
    grid and are together no larger than it.
    """
    try:
        layout = parse_json(grid.info[LAYOUT])
        boxes = checked_boxes(grid, layout["boxes"])
        return [(str(prompt), box) for prompt, box in zip(layout["prompts"], boxes, strict=True)]
    except (KeyError, TypeError, ValueError, OverflowError):
        return []


def split_grid(grid: Image.Image) -> list[tuple[str, Image.Image]]:
    """Return the prompts and images of a sample grid, as `grid_boxes` finds them."""
    return [(prompt, grid.crop(box)) for prompt, box in grid_boxes(grid)]


def split_references(grid: Image.Image) -> list[Image.Image | None]:
    """Return what each prompt of a sample grid edits; an empty list if no prompt edits anything, as in `split_grid`."""
    try:
        boxes = parse_json(grid.info[LAYOUT]).get(REFERENCES, [])
        found = iter(checked_boxes(grid, [box for box in boxes if box is not None]))
        return [None if box is None else grid.crop(next(found)) for box in boxes]
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
        return []
