"""The demo: `make demo`, or `python train/demo.py [key=value ...]`.

Trains the LoRA of conf/experiment/demo.yaml on 24 drawn tarot cards, then measures it on subjects and colors that are
on no card:

- style: the distance of images from the cards' frame, parchment and title bar, before and after training;
- subject: the share of images that show the requested subject in its color, read by `data.synthetic.probe`;
- both again for plain prompts, without the trigger word, which should not change;
- whether the base, with the adapter disabled, still generates identical images.

The measures are independent of training: an adapter that learned nothing moves 0 % of the way and fails.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":  # train/ comes first in sys.path and would hide libraries
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from train.cli.start import start_command

    sys.argv.append("+experiment=demo")  # at the end, because -m takes the words after it
    start_command()  # before the imports below: they take seconds, and --help needs none of them

import json
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from typing import Any

from omegaconf import DictConfig
from PIL import Image, ImageChops
from torch import Tensor

from data.synthetic import probe
from flux2.adapters import adapters_disabled
from flux2.pipeline import Pipeline
from flux2.utils.text import join_words
from train.checkpoints.resume import RunLocation
from train.cli.app import command
from train.config.run_config import RunConfig
from train.reports import run_report
from train.reports.run_pictures import Pair
from train.run import train
from train.stages.memory import load_config
from train.stages.run_folder import claim_run_folder
from train.utils.progress import ItemProgress
from train.validation.sample_grid import sample_grid, stack

SUBJECTS = ("heart", "fish", "tree", "wheel", "lantern", "bell")  # on no card
COLORS = ("green", "pink", "brown", "black")  # on no card
PICTURES = 2  # images per prompt
BATCH = 8
SHOWN = ("green fish", "pink heart", "brown tree", "black bell")


def score_pictures(pictures: Sequence[Image.Image], wanted: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Return the mean distance from the cards' style, and the shares of images that show `wanted` (color, subject)."""
    read = [probe.read(picture) for picture in pictures]
    right = {
        "subject": [r.shape == subject for r, (_, subject) in zip(read, wanted, strict=True)],
        "color": [r.color == color for r, (color, _) in zip(read, wanted, strict=True)],
    }
    right["both"] = [all(each) for each in zip(*right.values(), strict=True)]
    distance = sum(map(probe.style_distance, pictures)) / len(pictures)
    return {"style_distance": distance} | {key: sum(values) / len(values) for key, values in right.items()}


def share_moved(before: float, after: float, cards: float) -> float:
    """Return the share of the way from `before` to `cards` that the style moved, 1 for all of it."""
    return (before - after) / (before - cards) if before != cards else 0.0


def are_identical(one: Sequence[Image.Image], other: Sequence[Image.Image]) -> bool:
    """Return whether all images are equal, bit for bit."""
    return all(ImageChops.difference(a, b).getbbox() is None for a, b in zip(one, other, strict=True))


def verdict(good: bool, text: str) -> str:
    """Return a sentence that starts with yes or NO."""
    return f"{'yes' if good else 'NO ':3}  {text}"


def judge(report: dict[str, float]) -> list[str]:
    """Return the report as sentences that start with yes or NO."""
    style, leak = report["style_moved"], report["plain_style_moved"]
    cards, cards_before = report["subjects_right"], report["subjects_right_before"]
    plain, plain_before = report["plain_subjects_right"], report["plain_subjects_right_before"]
    return [
        verdict(style >= 0.9, f"the cards' style was learned: {style:.0%} of the way from the base to the cards"),
        verdict(
            cards >= 0.8,
            f"new subjects and colors stay right on cards: {cards:.0%} (base, same prompts: {cards_before:.0%})",
        ),
        verdict(leak <= 0.2, f"plain prompts keep the base's style: moved {leak:.0%} of the way to the cards"),
        verdict(plain >= 0.8, f"plain prompts keep their subjects: {plain:.0%} (base: {plain_before:.0%})"),
        verdict(bool(report["base_unchanged"]), "with the adapter off, the base's images are the same, bit for bit"),
    ]


def draw(pipe: Pipeline, prompts: Sequence[str], count: ItemProgress, done: int, total: int) -> list[Image.Image]:
    """Draw an image for each prompt; `count` shows the progress from `done` to `total`."""
    steps = 0

    def step(_: Tensor) -> None:
        nonlocal steps
        steps += 1
        count.update(done + min(len(prompts), steps * BATCH // pipe.variant.steps), total)

    return pipe.generate(prompts, batch_size=BATCH, progress=step)


def run_demo(config: DictConfig, demonstrate: Callable[[RunConfig, RunLocation], None]) -> None:
    """Call `demonstrate` with a claimed run folder. Raises ValueError for any but the embedded model."""
    run = load_config(config)
    if run.variant.name != "tiny":
        raise ValueError(f"model={run.variant.name}: the demo needs the embedded model. Train others with train/run.py")
    with claim_run_folder(run) as location:  # fails before images are drawn if the folder cannot be written
        demonstrate(run, location)


def train_and_load(run: RunConfig, location: RunLocation, pipe: Pipeline) -> tuple[Path, float]:
    """Train in a claimed run folder and load the adapter; return it and the seconds that the training took."""
    began = time.perf_counter()
    adapter, _ = train(run, location)
    seconds = round(time.perf_counter() - began, 1)
    run.say("images with the adapter, and again without it")
    pipe.load_adapter(adapter)
    return adapter, seconds


def report_results(
    run: RunConfig,
    adapter: Path,
    name: str,
    numbers: dict[str, Any],
    judged: Sequence[str],
    grid: Image.Image,
    use: Sequence[str],
    pairs: Sequence[Pair],
) -> None:
    """Write grid and numbers into the run folder; print the results, and how to generate more images."""
    folder = adapter.parent
    grid.save(folder / "grid.png", optimize=True)
    (folder / name).write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    run.say(f"\ntrained in {numbers['training_seconds']:.0f} s")
    for sentence in judged:
        run.say(sentence)
    run.say(f"\nbefore and after  {folder / 'grid.png'}")
    run.say(f"all numbers       {folder / name}")
    run.say(f"the adapter       {adapter}")
    python = "python" if sys.platform == "win32" else sys.executable  # PowerShell starts no path in quotes
    run.say(f"more images       {join_words([python, '-m', 'flux2.generate', '--adapter', str(adapter), *use])}")
    if run.accelerator.is_main_process and (page := run_report.write_or_warn(folder, pairs)):
        run.say(f"the report        {page}")


def main(config: DictConfig) -> None:
    """Train, measure, and write `grid.png` and `demo.json` into the run folder."""
    run_demo(config, demonstrate)


def demonstrate(run: RunConfig, location: RunLocation) -> None:
    """Train in a claimed run folder and compare images before and after."""
    dataset = run.instantiate("dataset")
    pairs = [(color, subject) for subject in SUBJECTS for color in COLORS] * PICTURES
    prompts = [f"a trtcrd of a {color} {subject}, tarot style" for color, subject in pairs]
    plain = [f"a large {color} {subject} on a blue background" for color, subject in pairs]
    images: dict[str, list[Image.Image]] = {}

    total = len(prompts) + len(plain)
    again_too = total + len(prompts)  # the cards once more, with the adapter switched off
    run.say(f"{total} images of the base, then {run.settings.steps} steps, then {again_too} images")
    base = Pipeline(run.source, run.accelerator.device, run.precision, keep_text_encoder=True, cache=run.copies)
    with closing(ItemProgress("images", shown=run.accelerator.is_main_process)) as count:
        images["cards_before"] = draw(base, prompts, count, 0, total)
        images["plain_before"] = draw(base, plain, count, len(prompts), total)

    adapter, seconds = train_and_load(run, location, base)
    with closing(ItemProgress("images", shown=run.accelerator.is_main_process)) as count:
        images["cards_after"] = draw(base, prompts, count, 0, again_too)
        images["plain_after"] = draw(base, plain, count, len(prompts), again_too)
        with adapters_disabled(base.transformer):
            again = draw(base, prompts, count, total, again_too)

    cards = sum(probe.style_distance(sample.target.load()) for sample in dataset) / len(dataset)
    scores = {name: score_pictures(drawn, pairs) for name, drawn in images.items()}
    found = {"training_seconds": seconds, "style_distance_of_the_cards": cards}
    found["base_unchanged"] = float(are_identical(images["cards_before"], again))
    shown = [pairs.index((color, subject)) for color, _, subject in (words.partition(" ") for words in SHOWN)]
    grids: list[Image.Image] = []
    pairs_shown: list[Pair] = []
    for prefix, kind, texts in (("", "cards", prompts), ("plain_", "plain", plain)):
        before, after = scores[f"{kind}_before"], scores[f"{kind}_after"]
        found[f"{prefix}style_moved"] = share_moved(before["style_distance"], after["style_distance"], cards)
        found[f"{prefix}subjects_right_before"] = before["both"]
        found[f"{prefix}subjects_right"] = after["both"]
        captions = [texts[i] for i in shown]
        rows = [[images[f"{kind}_{when}"][i] for i in shown] for when in ("before", "after")]
        grids.append(sample_grid(rows, captions, ["before", "after"]))
        pairs_shown += zip(captions, *rows, strict=True)
    use = ["--prompt", "a trtcrd of a purple bell, tarot style", "--out", "bell.png"]
    report_results(run, adapter, "demo.json", found | scores, judge(found), stack(grids), use, pairs_shown)


if __name__ == "__main__":
    command(main)
