"""Draw the pairs of the edit demonstration: pictures, and the same pictures in a spotlight.

What: `python data/demo_edit/draw.py` writes source/*.png, target/*.png and metadata.jsonl, 40 pairs to learn from, and
new/*.png, pictures for the sample grids; the same pixels on every run. All pairs have one and the same instruction.

How: an edited picture is its source, pixel by pixel, under a colored light: warm in a disc in the middle, dim and cool
around it. It follows from the source alone, so that only who looks at the reference can draw it.

Why this edit: the embedded model has seen neither dark pictures nor discs, so that it cannot come out of the base; and
subject, color, background and size must all be taken from the reference. Only combinations of subject, color and
background are used that are on no picture of the embedded model's training (`data.synthetic.drawings.held_out`). The
pairs show the subjects and colors of `data.demo`'s cards; the other six subjects and four colors are for measuring.
"""

import json
import shutil
import sys
from pathlib import Path

if __name__ == "__main__":
    # Python put this script's own folder first, where a file could shadow a library; the imports need the root.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from data.synthetic.drawings import draw
from data.synthetic.spotlight import INSTRUCTION, PIXELS, SHOWN, pairs, spotlight


def main(folder: Path) -> None:
    for name in ("source", "target", "new"):
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir()
    lines = []
    for number, (drawing, placed) in enumerate(pairs(), start=1):
        name = f"{number:02d}_{drawing.size}_{drawing.color}_{drawing.shape}.png"
        source = draw(drawing, PIXELS, **placed)
        source.save(folder / "source" / name, optimize=True)
        spotlight(source).save(folder / "target" / name, optimize=True)
        row = {"file_name": f"target/{name}", "references": [f"source/{name}"], "text": INSTRUCTION}
        lines.append(json.dumps(row) + "\n")
    for drawing in SHOWN:
        draw(drawing, PIXELS).save(folder / "new" / f"{drawing.color}_{drawing.shape}.png", optimize=True)
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main(Path(__file__).resolve().parent)
