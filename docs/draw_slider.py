"""Draw docs/slider.png, a slider for sizes on the embedded model: `python docs/draw_slider.py` (minutes on a CPU).

The base draws the images that the slider is trained on; their captions have no article, which the prompts begin with.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import flux2
from data.synthetic.drawings import BACKGROUNDS, COLORS, SHAPES

FILE = Path(__file__).with_name("slider.png")
STEPS = 120
PROMPTS = ["a red cup on a blue background", "a green fish on a white background", "a pink star on a grey background"]


def draw_images(folder: Path, count: int) -> None:
    """Write images of the base with their captions."""
    pipe, rng = flux2.load("tiny"), random.Random(0)
    for number in range(count):
        color, shape, background = (rng.choice(list(words)) for words in (COLORS, SHAPES, BACKGROUNDS))
        caption = f"{color} {shape} on a {background} background"
        pipe.generate(f"a {caption}", seed=100 + number)[0].save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)


def command(images: Path, out: Path, *more: str) -> list[str]:
    """Return the command that trains the slider."""
    settings = ["model=tiny", "memory=default", "optimizer.lr=2e-3", "batch_size=4", f"steps={STEPS}"]
    ends = [
        'target.positive="a large {caption}"',
        'target.negative="a small {caption}"',
        'target.neutral="a {caption}"',
    ]
    places = [f"dataset.path={images}", f"output_dir={out / 'run'}", f"cache_dir={out / 'cache'}"]
    return [sys.executable, "train/run.py", "+experiment=slider", *settings, *ends, *places, *more]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        images, out = Path(folder, "images"), Path(folder)
        images.mkdir()
        draw_images(images, 16)
        grids = [f"sample.prompts=[{','.join(PROMPTS)}]", f"sample_every={STEPS}", "checkpoint_every=0"]
        subprocess.run(command(images, out, *grids), check=True, cwd=FILE.parent.parent)
        shutil.copyfile(out / "run" / "samples" / f"step_{STEPS:06d}.png", FILE)


if __name__ == "__main__":
    main()
