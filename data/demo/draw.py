"""Draw the dataset of the demonstration: 24 tarot cards with captions, in a style unlike `data.synthetic.drawings`.

What: a gold frame with an ink line, a parchment panel with one subject, a dark bar above it, and a dark title bar with
a Roman numeral below. `python data/demo/draw.py` writes data/demo/*.png and metadata.jsonl, identical on every run.

Why these cards: a LoRA trained on them must apply the style with the trigger word ("trtcrd"), and must transfer it to
things that no card shows: six of the fourteen subjects and four of the ten colors are omitted.
"""

import json
import sys
from pathlib import Path

if __name__ == "__main__":
    # imports need the root; Python put the folder of this script first, where a file could shadow a library
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from data.synthetic.tarot import all_cards, card_caption, draw_card


def main(folder: Path) -> None:
    lines = []
    for shape, color, number in all_cards():
        name = f"{number:02d}_{color}_{shape}.png"
        draw_card(shape, color, number).save(folder / name, optimize=True)
        lines.append(json.dumps({"file_name": name, "text": card_caption(shape, color)}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main(Path(__file__).resolve().parent)
