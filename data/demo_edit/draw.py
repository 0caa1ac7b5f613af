"""Draw the pairs of the edit demonstration: images, and the same images in a spotlight.

What: `python data/demo_edit/draw.py` writes source/*.png, target/*.png and metadata.jsonl, 40 pairs to learn from, and
data/demo_edit_new/*.png, images for the sample grids, outside of the dataset; identical pixels on every run. All pairs
have the same instruction.

Why this edit: the embedded model was trained on neither dark images nor discs, so the base cannot draw it; and subject,
color, background and size must all be taken from the reference. All combinations of subject, color and background are
held out from the training of the embedded model (`data.synthetic.drawings.held_out`). The pairs show the subjects and
colors of the cards in `data/demo`; the other six subjects and four colors are for measuring.
"""

import json
import shutil
import sys
from pathlib import Path

if __name__ == "__main__":
    # imports need the root; Python put the folder of this script first, where a file could shadow a library
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from data.synthetic.drawings import draw
from data.synthetic.spotlight import INSTRUCTION, PIXELS, SHOWN, pairs, spotlight


def main(folder: Path) -> None:
    new = folder.with_name("demo_edit_new")
    for place in (folder / "source", folder / "target", new):
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
    lines = []
    for number, (drawing, placed) in enumerate(pairs(), start=1):
        name = f"{number:02d}_{drawing.size}_{drawing.color}_{drawing.shape}.png"
        source = draw(drawing, PIXELS, **placed)
        source.save(folder / "source" / name, optimize=True)
        spotlight(source).save(folder / "target" / name, optimize=True)
        row = {"file_name": f"target/{name}", "references": [f"source/{name}"], "text": INSTRUCTION}
        lines.append(json.dumps(row) + "\n")
    for drawing in SHOWN:
        draw(drawing, PIXELS).save(new / f"{drawing.color}_{drawing.shape}.png", optimize=True)
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main(Path(__file__).resolve().parent)
