"""Draw the pictures of docs/training.md on the embedded model: `python docs/draw_objectives.py [slider ...]`.

Each takes minutes on a CPU. A picture shows grids of runs that the script trains, in a temporary folder.
"""

from __future__ import annotations

import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from PIL import Image

import flux2
from data.synthetic.drawings import BACKGROUNDS, COLORS, SHAPES, Drawing, draw
from train.validation.sample_grid import sample_grid, split_grid

ROOT = Path(__file__).resolve().parent.parent
SLIDER_STEPS, ENDS_STEPS, PREFERENCE_STEPS, PRESERVATION_STEPS = 120, 60, 60, 200
SLIDER = ["a red cup on a blue background", "a green fish on a white background", "a pink star on a grey background"]
PREFERENCE = [f"a large {shape} on a white background" for shape in ("cup", "star", "moon", "crown")]
PRESERVATION = ["a trtcrd of a green fish, tarot style", "a card of a green fish, tarot style"]


def draw_images(folder: Path, count: int) -> None:
    """Write images of the base with their captions, which have no article: a slider's prompts begin with it."""
    pipe, rng = flux2.load("tiny"), random.Random(0)
    for number in range(count):
        color, shape, background = (rng.choice(list(words)) for words in (COLORS, SHAPES, BACKGROUNDS))
        caption = f"{color} {shape} on a {background} background"
        pipe.generate(f"a {caption}", seed=100 + number)[0].save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)


def draw_pairs(folder: Path) -> None:
    """Write pairs of drawings of which the red one is preferred to the blue one."""
    for name, color in (("chosen", "red"), ("rejected", "blue")):
        (folder / name).mkdir(parents=True)
        for shape in ("cup", "star", "heart", "fish", "bell", "key"):
            draw(Drawing(shape, color, "white", "large")).save(folder / name / f"{shape}.png")
            (folder / "chosen" / f"{shape}.txt").write_text(f"a large {shape} on a white background")


def draw_ends(folder: Path) -> None:
    """Write pairs of a large and a small drawing of the same, with captions that name no size."""
    rng = random.Random(0)
    for shape in SHAPES[:8]:
        color, background = rng.choice(list(COLORS)), rng.choice(list(BACKGROUNDS))
        for size in ("large", "small"):
            (folder / size).mkdir(parents=True, exist_ok=True)
            draw(Drawing(shape, color, background, size)).save(folder / size / f"{shape}.png")
        (folder / "large" / f"{shape}.txt").write_text(f"a {color} {shape} on a {background} background")


def command(images: Path, out: Path, *more: str) -> list[str]:
    """Return the command that trains a slider."""
    settings = ["memory=default", "optimizer.lr=2e-3", "batch_size=4", f"steps={SLIDER_STEPS}"]
    prompts = {"positive": "a large {caption}", "negative": "a small {caption}", "neutral": "a {caption}"}
    ends = [f'target.{key}="{prompt}"' for key, prompt in prompts.items()]
    return run_command(out, "+experiment=slider", *settings, *ends, f"dataset.path={images}", *more)


def slider_images_command(pairs: Path, out: Path, *more: str) -> list[str]:
    """Return the command that trains a slider from pairs of images."""
    folders = [f"dataset.path={pairs}", "dataset.chosen_folder=large", "dataset.rejected_folder=small"]
    settings = ["memory=default", "optimizer.lr=2e-3", "batch_size=2", f"steps={ENDS_STEPS}", *more]
    return run_command(out, "+experiment=slider", "target=slider_images", "dataset=preference", *folders, *settings)


def run_command(out: Path, *settings: str) -> list[str]:
    places = [f"output_dir={out / 'run'}", f"cache_dir={out.parent / 'cache'}"]
    return [sys.executable, "train/run.py", "model=tiny", *settings, "checkpoint_every=0", "validate_every=0", *places]


def grids(out: Path, call: list[str], prompts: list[str]) -> list[Image.Image]:
    """Train and return the sample grids of the run, first and last."""
    given = ", ".join(f"'{prompt}'" for prompt in prompts)
    subprocess.run([*call, f"sample.prompts=[{given}]", "sample_every=1000"], check=True, cwd=ROOT)
    return [Image.open(file) for file in sorted((out / "run" / "samples").iterdir())]


def rows_of(pages: list[Image.Image]) -> list[list[Image.Image]]:
    return [[image for _, image in split_grid(page)] for page in pages]


def slider(folder: Path) -> Image.Image:
    """Five scales of a slider for sizes."""
    images = folder / "images"
    images.mkdir()
    draw_images(images, 16)
    return grids(folder / "slider", command(images, folder / "slider"), SLIDER)[-1]


def slider_images(folder: Path) -> Image.Image:
    """Five scales of a slider from pairs of a large and a small drawing."""
    draw_ends(folder / "sizes")
    return grids(folder / "ends", slider_images_command(folder / "sizes", folder / "ends"), SLIDER)[-1]


def preference(folder: Path) -> Image.Image:
    """Before and after training on pairs that prefer red to blue, with two shapes of the pairs and two others."""
    draw_pairs(folder / "pairs")
    settings = ["dataset=preference", f"dataset.path={folder / 'pairs'}", "loss=dpo", "loss.beta=200", "batch_size=4"]
    call = run_command(folder / "dpo", *settings, f"steps={PREFERENCE_STEPS}", "optimizer.lr=1e-3")
    rows = rows_of(grids(folder / "dpo", call, PREFERENCE))
    return sample_grid(rows, PREFERENCE, ["base", f"{PREFERENCE_STEPS} steps"])


def preservation(folder: Path) -> Image.Image:
    """The demo's cards, with the trigger word and with "card" in its place, without and with class preservation."""
    names = {"without": ["preservation=none"]}
    held = ["preservation=class", "preservation.trigger=trtcrd", "preservation.word=card", "preservation.weight=3"]
    names["preservation=class"] = held
    rows = []
    for name, settings in names.items():
        out = folder / name.partition("=")[0] / "card"
        call = run_command(out, "batch_size=8", "optimizer.lr=2e-3", f"steps={PRESERVATION_STEPS}", *settings)
        rows.append(rows_of(grids(out, call, PRESERVATION))[-1])
    return sample_grid(rows, PRESERVATION, list(names))


FIGURES: dict[str, Callable[[Path], Image.Image]] = {
    "slider": slider,
    "slider_images": slider_images,
    "preference": preference,
    "preservation": preservation,
}


def main() -> None:
    for name in sys.argv[1:] or FIGURES:
        with tempfile.TemporaryDirectory() as folder:
            FIGURES[name](Path(folder)).save(Path(__file__).with_name(f"{name}.png"), optimize=True)


if __name__ == "__main__":
    main()
