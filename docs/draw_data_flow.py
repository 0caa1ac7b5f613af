"""Draw docs/data_flow.svg, the way from images to the adapter: `python docs/draw_data_flow.py`.

Boxes have their own background and lines are medium gray, so the picture reads on light and dark pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

FILE = Path(__file__).with_name("data_flow.svg")
WIDTH, HEIGHT = 960, 560
LINE = "#768390"  # contrast of about 4 on white, on the dark theme of the site and on #0d1117
DATA, MODEL, STEP, TRAINED, OUTPUT = "#dbeafe", "#d1d5db", "#f9fafb", "#fde68a", "#bbf7d0"
BOX_HEIGHT = 74


def text(x: float, y: float, content: str, size: int, color: str, bold: bool = False, anchor: str = "middle") -> str:
    weight = ' font-weight="600"' if bold else ""
    style = f'font-size="{size}" fill="{color}" text-anchor="{anchor}"{weight}'
    return f'<text x="{x}" y="{y}" {style}>{escape(content)}</text>'


def box(x: int, y: int, width: int, fill: str, title: str, *lines: str) -> list[str]:
    """A box with its title in bold and up to two lines below it."""
    first = y + BOX_HEIGHT / 2 - 8 * len(lines) + 5
    drawn = [f'<rect x="{x}" y="{y}" width="{width}" height="{BOX_HEIGHT}" rx="8" fill="{fill}" stroke="{LINE}"/>']
    drawn.append(text(x + width / 2, first, title, 15, "#111827", bold=True))
    return drawn + [text(x + width / 2, first + 17 * i, line, 12, "#374151") for i, line in enumerate(lines, 1)]


def arrow(*points: tuple[int, int]) -> str:
    path = " ".join(f"{x},{y}" for x, y in points)
    return f'<polyline points="{path}" fill="none" stroke="{LINE}" stroke-width="2" marker-end="url(#head)"/>'


def phase(y: int, height: int, title: str, title_x: int = 24) -> list[str]:
    frame = f'<rect x="8" y="{y}" width="{WIDTH - 16}" height="{height}" rx="12" fill="none" stroke="{LINE}"'
    return [f'{frame} stroke-dasharray="4 4"/>', text(title_x, y + 24, title, 15, LINE, bold=True, anchor="start")]


def prepare() -> list[str]:
    return [
        *phase(8, 218, "1  Prepare, once: each encoder is loaded, used and freed"),
        *box(24, 92, 190, DATA, "Images, captions", "folder, pairs, Hub, tables,", "tar shards"),
        arrow((214, 129), (250, 129)),
        *box(252, 92, 190, DATA, "Samples", "captions, references, mask", "data/sources"),
        arrow((442, 118), (462, 118), (462, 82), (488, 82)),
        arrow((442, 140), (462, 140), (462, 176), (488, 176)),
        *box(490, 46, 200, MODEL, "Text encoder", "captions to embeddings", "flux2/prompts"),
        *box(490, 140, 200, MODEL, "Autoencoder", "images to latents, per bucket", "flux2/models"),
        arrow((690, 82), (716, 82), (716, 118), (744, 118)),
        arrow((690, 176), (716, 176), (716, 140), (744, 140)),
        *box(746, 92, 190, DATA, "Cache", "one file per content", "data/cache"),
    ]


def train() -> list[str]:
    return [
        arrow((841, 166), (841, 233), (90, 233), (90, 296)),
        *phase(240, 180, "2  Train, every step", title_x=110),
        *box(24, 298, 150, DATA, "Batch", "latents, references,", "embeddings"),
        arrow((174, 335), (202, 335)),
        *box(204, 298, 150, STEP, "Noise, timestep", "x_t = (1 - t) x + t e", "train/objective"),
        arrow((354, 335), (382, 335)),
        *box(384, 298, 130, MODEL, "Transformer", "frozen: fp32, bf16,", "fp8, int8 or nf4"),
        *box(514, 298, 110, TRAINED, "Adapter", "trained, float32", "flux2/adapters"),
        arrow((624, 335), (652, 335)),
        *box(654, 298, 130, STEP, "Loss", "distance from e - x", "train/objective"),
        arrow((784, 335), (812, 335)),
        *box(814, 298, 122, STEP, "Optimizer", "and schedule", "train/optim"),
        arrow((875, 372), (875, 398), (569, 398), (569, 374)),
        text(722, 392, "update of the adapter alone", 12, LINE),
    ]


def use() -> list[str]:
    return [
        *phase(434, 118, "3  Use"),
        arrow((540, 372), (540, 427), (265, 427), (265, 460)),
        *box(170, 462, 190, TRAINED, "adapter/", "PEFT and diffusers files", "train/checkpoints"),
        arrow((360, 499), (406, 499)),
        arrow((384, 499), (384, 448), (672, 448), (672, 460)),
        arrow((672, 448), (856, 448), (856, 460)),
        *box(408, 462, 160, OUTPUT, "flux2.generate", "images, edits", "also flux2.load in Python"),
        *box(592, 462, 160, OUTPUT, "diffusers", "load_lora_weights"),
        *box(776, 462, 160, OUTPUT, "flux2.export", "ComfyUI, kohya,", "merged checkpoints"),
    ]


def draw() -> str:
    """Return the SVG."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'role="img" font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif">'
    )
    title = "<title>How data flows from images to the adapter</title>"
    marker = (
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0,0 L8,4 L0,8 z" fill="{LINE}"/></marker></defs>'
    )
    parts: Sequence[str] = [head, title, marker, *prepare(), *train(), *use(), "</svg>"]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    FILE.write_text(draw())
    print(FILE)
