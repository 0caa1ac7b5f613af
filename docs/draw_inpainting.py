"""Draw docs/inpainting.png, images that the embedded model repaints: `python docs/draw_inpainting.py`."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw

import flux2
from data.synthetic.drawings import Drawing, draw
from train.validation.sample_grid import sample_grid

FILE = Path(__file__).with_name("inpainting.png")
SIDE = 128
# drawing, prompt, what the mask shows in white
ROWS = [
    (Drawing("cup", "red", "blue", "large"), "a large green cup on a blue background", (0, 60, 127, 127)),
    (Drawing("star", "yellow", "pink", "large"), "a large purple star on a pink background", (64, 0, 127, 127)),
    (Drawing("fish", "green", "white", "small"), "a small red fish on a white background", (24, 40, 103, 87)),
]


def main() -> None:
    pipe = flux2.load("tiny")
    rows = []
    for drawing, prompt, box in ROWS:
        image, mask = draw(drawing, SIDE), Image.new("L", (SIDE, SIDE))
        ImageDraw.Draw(mask).rectangle(box, fill=255)
        inputs = {"references": [image]}
        whole = pipe.generate(prompt, mask=mask, **inputs) + pipe.generate(prompt, mask=mask, mask_crop=8, **inputs)
        noisy = [pipe.generate(prompt, strength=strength, **inputs)[0] for strength in (0.1, 0.8)]
        rows.append([image, mask.convert("RGB"), *whole, *noisy])
    columns = ["image", "mask", "with the mask", "with mask_crop=8", "strength=0.1, no mask", "strength=0.8, no mask"]
    sample_grid(rows, columns, [prompt for _, prompt, _ in ROWS]).save(FILE, optimize=True)


if __name__ == "__main__":
    main()
