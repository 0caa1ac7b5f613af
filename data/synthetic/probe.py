"""Recognize subject, color, background and size in an image, and its similarity to the cards, without a learned model.

How: the color of the background is the median of the border (of the panel, on a card). Pixels far from it are the mask;
those inside its outline that differ most from ink vote for the color. Mask and ink are aligned by centroid and
root-mean-square radius to a small grid and compared with templates from `data.synthetic.drawings` after the same steps.
Decoys (ellipses, boxes and other plain outlines) compete with the subjects: if one wins, or if the best match is poor,
the subject is None.

Why not a learned classifier: it would need training and a file, and could share the model's weaknesses. The price is
leniency: a wobbly star is still nearest to the star. The probe identifies the subject that an image resembles, not how
well it is drawn; `Reading.score` (1 for a clean drawing) is a weak measure of that. About one percent of random smooth
blobs are accepted as a subject, mostly as a heart. Colors are the nearest of the ten and sizes the nearer of the two,
so that an unusual color or size still gets a name. Report accuracies accordingly.
"""

from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFilter

from data.synthetic.drawings import BACKGROUNDS, COLORS, INK, SHAPES, SIZES, Drawing, draw
from data.synthetic.tarot import FRAME, PANEL_BOTTOM, PANEL_TOP, draw_card

Array = npt.NDArray[np.float32]
Mask = npt.NDArray[np.bool_]

PIXELS = 128
GRID = 40
MINIMUM_SCORE = 0.70  # clean drawings score 0.92 to 0.99 (white on grey 0.8), wobbly ones about 0.87
CARD_FRAME_DISTANCE = 90.0  # an image whose frame is nearer than this to that of the cards is read as a card

_REACH = 2.5  # the grid covers this many root-mean-square radii on each side of the centroid
_MASK_DISTANCE = 21.0  # a white subject on the white background is 36 away
_BACKGROUND_DISTANCE = 60.0  # a background farther than this from all known ones has no name
_INK_LUMINANCE = float(np.mean(INK))


@dataclass(frozen=True)
class Reading:
    """Recognized attributes of an image. None is nothing recognizable; on a card, `background` is None."""

    shape: str | None
    color: str | None
    background: str | None
    size: str | None
    card: bool
    score: float  # similarity to the best template, 0 to 1


def _array(image: Image.Image) -> Array:
    """Return RGB values (PIXELS, PIXELS, 3)."""
    if image.width != image.height:
        raise ValueError(f"the image is {image.width} x {image.height}; it must be square")
    picture = image.convert("RGB")
    if picture.width != PIXELS:
        picture = picture.resize((PIXELS, PIXELS), Image.Resampling.BOX)
    return np.asarray(picture, dtype=np.float32)


def _smooth(values: Array) -> Array:
    """Return the mean over 3 x 3 pixels, with repeated edges, which keeps noise out of the mask."""
    padded = np.pad(values, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    return (rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]) / 9


def _without_specks(mask: Mask) -> Mask:
    """Return the connected components that have at least a tenth of the largest one's pixels.

    Components are computed on blocks of 4 x 4 pixels, which is fast in numpy and connects parts that almost touch.
    """
    height, width = mask.shape
    padded = np.pad(mask, ((0, -height % 4), (0, -width % 4)))
    rows, columns = padded.shape[0] // 4, padded.shape[1] // 4
    counts = padded.reshape(rows, 4, columns, 4).sum((1, 3))
    occupied = counts > 0
    labels = np.arange(1, counts.size + 1).reshape(counts.shape) * occupied  # 0 where there is nothing
    while True:
        around = np.pad(labels, 1)
        spread = np.maximum(np.maximum(around[:-2], around[1:-1]), around[2:])
        spread = np.maximum(np.maximum(spread[:, :-2], spread[:, 1:-1]), spread[:, 2:]) * occupied
        if np.array_equal(spread, labels):
            break
        labels = spread
    sizes = np.bincount(labels.ravel(), weights=counts.ravel())
    keep = sizes >= 0.1 * sizes.max()
    return mask & np.repeat(np.repeat(keep[labels], 4, 0), 4, 1)[:height, :width]


def _eroded(mask: Mask) -> Mask:
    """Return the pixels whose 3 x 3 neighborhood is in the mask."""
    padded = np.pad(mask, 1)
    rows = padded[:-2] & padded[1:-1] & padded[2:]
    return rows[:, :-2] & rows[:, 1:-1] & rows[:, 2:]


def _closed(mask: Mask) -> Mask:
    """Close gaps of one or two pixels, which arise where white blends into ink through the grey of a background."""
    return _eroded(~_eroded(~np.pad(mask, 1)))[1:-1, 1:-1]


def _read_color(pixels: Array, mask: Mask) -> str | None:
    """Return the subject color of most pixels inside the outline, without ink."""
    inside = _eroded(_eroded(mask))
    values = pixels[inside if inside.any() else mask]
    names = list(COLORS)
    palette = np.array([*COLORS.values(), INK], dtype=np.float32)
    # |v - p|^2 without |v|^2, which is the same for every p
    nearest = ((palette**2).sum(1) - 2 * values @ palette.T).argmin(1)
    counted = nearest < len(names)
    if not counted.any():
        return None
    # a blend of ink with a color resembles another color (orange: brown), so only the third farthest from ink votes
    contrast = ((values[counted] - np.array(INK, dtype=np.float32)) ** 2).sum(1)
    votes = nearest[counted][contrast >= np.quantile(contrast, 0.67)]
    return names[int(np.bincount(votes, minlength=len(names)).argmax())]


def _aligned(values: Array, x: float, y: float, radius: float) -> Array:
    """Resample values (H, W) from 0 to 1 to a flattened grid around a centroid."""
    pad = max(values.shape)
    reach = min(_REACH * radius, pad)
    image = Image.fromarray(np.pad(np.round(values * 255).astype(np.uint8), pad))
    box = (x - reach + pad, y - reach + pad, x + reach + pad, y + reach + pad)
    grid: Array = np.asarray(image.resize((GRID, GRID), Image.Resampling.BILINEAR, box), dtype=np.float32).ravel()
    grid /= np.float32(255)
    return grid


@dataclass(frozen=True)
class _Look:
    """The subject of an image in the form of the templates: aligned mask and ink (GRID * GRID), sizes in pixels."""

    mask: Array
    ink: Array
    color: str | None
    radius: float
    extent: float


def _look(pixels: Array) -> tuple[_Look | None, Array]:
    """Return the subject in (H, W, 3) pixels, None if there is none, and the color (3,) of the background."""
    smooth = _smooth(pixels)
    border = np.ones(pixels.shape[:2], dtype=bool)
    border[3:-3, 3:-3] = False
    background = np.median(smooth[border], axis=0).astype(np.float32)
    mask: Mask = np.sqrt(((smooth - background) ** 2).sum(2)) > _MASK_DISTANCE
    # an empty image, or one without a background around the subject (noise, a texture)
    if mask.mean() < 0.01 or mask[border].mean() > 0.5:
        return None, background
    mask = _without_specks(_closed(mask))
    ys, xs = np.nonzero(mask)
    x, y = float(xs.mean()), float(ys.mean())
    radius = float(np.sqrt(((xs - x) ** 2 + (ys - y) ** 2).mean()))
    color = _read_color(pixels, mask)
    fill = float(np.mean(COLORS[color])) if color else 255.0
    ink = np.clip((fill - smooth.mean(2)) / (fill - _INK_LUMINANCE), 0, 1) * mask
    center = x + 0.5, y + 0.5
    aligned_mask, aligned_ink = (_aligned(values.astype(np.float32), *center, radius) for values in (mask, ink))
    extent = float(max(np.ptp(xs), np.ptp(ys)) + 1)
    return _Look(aligned_mask, aligned_ink, color, radius, extent), background


def _decoys() -> list[Image.Image]:
    """Draw outlines that are no subject: ellipses, boxes, diamonds, random blobs; with and without ink, and blurred."""
    outlines = []
    t = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    for aspect in (0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.9):
        w, h = min(1.0, aspect), min(1.0, 1 / aspect)
        for power in (1.0, 0.5, 2.0):  # an ellipse, a rounded box, a diamond
            x, y = (np.sign(f) * np.abs(f) ** power for f in (np.cos(t), np.sin(t)))
            outlines.append(np.stack([w * x, h * y], axis=1))
        outlines.append(np.array([(-w, -h), (w, -h), (w, h), (-w, h)]))
    rng = np.random.default_rng(0)
    for _ in range(40):
        r = 1 + sum(rng.normal(0, 0.22 / k**0.5) * np.cos(k * t + rng.uniform(0, 2 * np.pi)) for k in range(1, 6))
        outline = np.stack([r * np.cos(t), r * np.sin(t)], axis=1)
        outlines.append(outline / np.abs(outline).max())
    pictures = []
    for outline in outlines:
        corners = [(float(x), float(y)) for x, y in PIXELS / 2 + 0.3 * PIXELS * outline]
        for ink, blur in ((0, 0.0), (3, 0.0), (3, 3.0), (5, 5.0)):
            picture = Image.new("RGB", (PIXELS, PIXELS), BACKGROUNDS["blue"])
            canvas = ImageDraw.Draw(picture)
            canvas.polygon(corners, COLORS["yellow"])
            if ink:
                canvas.line([*corners, *corners[:2]], INK, ink, joint="curve")
            pictures.append(picture.filter(ImageFilter.GaussianBlur(blur)))
    return pictures


@cache
def _templates() -> tuple[list[str | None], Array, Array, dict[str, float]]:
    """Return names (None for decoys), masks and inks of all templates, and each subject's radius at size 1."""

    def look(image: Image.Image) -> _Look:
        found, _ = _look(_array(image))
        assert found is not None
        return found

    def drawn(shape: str, size: str, angle: float = 0.0) -> Image.Image:
        return draw(Drawing(shape, "yellow", "blue", size), PIXELS, angle=angle)

    kinds = list(product(SHAPES, SIZES, (-5.0, 0.0, 5.0)))
    decoys = _decoys()
    names: list[str | None] = [*(shape for shape, _, _ in kinds), *[None] * len(decoys)]
    looks = [look(image) for image in [*(drawn(*kind) for kind in kinds), *decoys]]
    radii = {shape: look(drawn(shape, "large")).radius / SIZES["large"] for shape in SHAPES}
    return names, np.stack([look.mask for look in looks]), np.stack([look.ink for look in looks]), radii


def read(image: Image.Image) -> Reading:
    """Return the attributes of a square image of any size, a plain drawing or a card."""
    pixels = _array(image)
    card = style_components(image)["frame"] < CARD_FRAME_DISTANCE
    if card:
        # two pixels inside the panel, in case the frame is blurred
        left, top, bottom = (round(edge * PIXELS) for edge in (FRAME, PANEL_TOP, PANEL_BOTTOM))
        pixels = pixels[top + 2 : bottom - 2, left + 2 : PIXELS - left - 2]
    look, background = _look(pixels)
    distances = {name: float(np.linalg.norm(background - tint)) for name, tint in BACKGROUNDS.items()}
    nearest = min(distances, key=distances.__getitem__)
    tint = None if card or distances[nearest] > _BACKGROUND_DISTANCE else nearest
    if look is None:
        return Reading(None, None, tint, None, card, 0.0)
    names, masks, inks, radii = _templates()
    overlaps = np.minimum(look.mask, masks).sum(1) / np.maximum(look.mask, masks).sum(1).clip(1e-6)
    lengths: Array = np.sqrt((look.ink @ look.ink) * (inks * inks).sum(1))
    scores = 0.6 * overlaps + 0.4 * ((inks @ look.ink) / lengths.clip(1e-6))  # of the masks and of the ink, each 0 to 1
    best = int(scores.argmax())
    score = float(scores[best])
    shape = names[best] if score >= MINIMUM_SCORE else None
    scale = look.radius / radii[shape] if shape else look.extent / (1.07 * PIXELS)
    size = min(SIZES, key=lambda name: abs(np.log(scale / SIZES[name])))
    return Reading(shape, look.color, tint, size, card, score)


@cache
def _card_template() -> tuple[Array, dict[str, Mask]]:
    """Return a card of PIXELS, and its regions that are the same on all cards."""
    cards = [np.asarray(draw_card(shape, "white", i, PIXELS), dtype=np.float32) for i, shape in enumerate(SHAPES, 1)]
    cards += [np.asarray(draw_card("cup", "white", number, PIXELS), dtype=np.float32) for number in range(15, 31)]
    fixed: Mask = np.ptp(np.stack(cards), axis=0).max(2) == 0
    frame, top, bottom = (round(edge * PIXELS) for edge in (FRAME, PANEL_TOP, PANEL_BOTTOM))
    rows, columns = np.mgrid[:PIXELS, :PIXELS]
    inside = (np.minimum(rows, columns) >= frame) & (np.maximum(rows, columns) < PIXELS - frame)
    regions = {
        "frame": ~inside,
        "parchment": inside & fixed & (rows >= top) & (rows < bottom),
        "bars": inside & fixed & ((rows < top) | (rows >= bottom)),
    }
    return cards[0], regions


def style_components(image: Image.Image) -> dict[str, float]:
    """Return the mean RGB distance (0 to 441) to the cards in the regions "frame", "parchment" and "bars"."""
    template, regions = _card_template()
    distance = np.sqrt(((_array(image) - template) ** 2).sum(2))
    return {name: float(distance[region].mean()) for name, region in regions.items()}


def style_distance(image: Image.Image) -> float:
    """Return the distance of an image from the style of the cards, the mean of the three components."""
    return float(np.mean(list(style_components(image).values())))
