"""The edit demonstration: `python train/demo_edit.py [key=value ...]`.

Trains the LoRA of conf/experiment/demo_edit.yaml on 40 pairs of an image and the same image in a spotlight, then
measures it on images whose subjects and colors are in no pair and that the base never saw:

- edit: the share of images that show the reference in the spotlight, before and after training;
- reference: the same with shuffled references, which must then be the ones that are edited. An adapter that draws from
  its memory of the pairs, or from the instruction alone, fails here;
- plain edits, without the trigger word, which should not change;
- whether the base, with the adapter disabled, still generates identical images.

`data.synthetic.recognize` reads what an image shows, independently of training.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if __name__ == "__main__":  # train/ comes first in sys.path and would hide libraries
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from train.cli.start import start_command

    sys.argv.append("+experiment=demo_edit")  # at the end, because -m takes the words after it
    start_command()  # before the imports below: they take seconds, and --help needs none of them

from collections.abc import Sequence
from contextlib import closing

import torch
from omegaconf import DictConfig
from PIL import Image

from data.synthetic.captions import plain_edit
from data.synthetic.drawings import BACKGROUNDS, COLORS, Drawing, draw
from data.synthetic.recognize import difference, recognize
from data.synthetic.spotlight import INSTRUCTION, PIXELS, SHOWN, new_drawings, spotlight
from flux2.adapters import adapters_disabled
from flux2.pipeline import Pipeline, render
from train.checkpoints.resume import RunLocation
from train.cli.app import command
from train.config.run_config import RunConfig
from train.demo import are_identical, report_results, run_demo, share_moved, train_and_load, verdict
from train.utils.progress import ItemProgress
from train.validation.sample_grid import sample_grid

BATCH = 8


def edit_sources(pipe: Pipeline, sources: Sequence[Image.Image], prompts: Sequence[str]) -> list[Image.Image]:
    """Edit each source according to its prompt, the i-th with seed i."""
    text, empty = pipe.embeddings(prompts)
    references = torch.cat([pipe.encode_references([source])[0] for source in sources])
    pictures: list[Image.Image] = []
    with closing(ItemProgress("images", shown=os.environ.get("RANK", "0") == "0")) as count:
        for start in range(0, len(sources), BATCH):
            part = slice(start, start + BATCH)
            pictures += render(
                pipe.transformer,
                pipe.autoencoder,
                text[part],
                seeds=range(len(sources))[part],
                width=PIXELS,
                height=PIXELS,
                steps=pipe.variant.steps,
                guidance=pipe.variant.guidance,
                references=[references[part]],
                empty=empty,
            )
            count.update(len(pictures), len(sources))
    return pictures


def shares(pictures: Sequence[Image.Image], wanted: Sequence[Drawing], lit: bool) -> dict[str, float]:
    """Return the shares of images with the requested light, with each attribute of `wanted`, and with all of them."""
    found = recognize(pictures)
    right = {
        key: [getattr(one.drawing, key) == getattr(drawing, key) for one, drawing in zip(found, wanted, strict=True)]
        for key in ("shape", "color", "background", "size")
    }
    right["light"] = [one.lit == lit for one in found]
    right["all"] = [all(each) for each in zip(*right.values(), strict=True)]
    return {key: sum(values) / len(values) for key, values in right.items()}


def others(drawings: Sequence[Drawing]) -> list[int]:
    """Return for each drawing the index of another with another subject, half the list further; each is used once."""
    count = len(drawings)
    indices = [(i + count // 2) % count for i in range(count)]
    assert all(one.shape != drawings[i].shape for one, i in zip(drawings, indices, strict=True))
    return indices


def plain_edits(drawings: Sequence[Drawing]) -> list[tuple[str, Drawing]]:
    """Return an instruction without the trigger for each drawing, in turn another color and another background."""
    edits = []
    for i, drawing in enumerate(drawings):
        kind, names = ("background", list(BACKGROUNDS)) if i % 2 else ("color", list(COLORS))
        new = names[(names.index(getattr(drawing, kind)) + 1 + i // 2 % (len(names) - 1)) % len(names)]
        edits.append(plain_edit(drawing, kind, new))
    return edits


def judge(report: dict[str, float]) -> list[str]:
    """Return the report as sentences that start with yes or NO."""
    right, before = report["edits_right"], report["edits_right_before"]
    follow, wrong = report["shuffled_follow"], report["shuffled_right"]
    plain, plain_before = report["plain_right"], report["plain_right_before"]
    return [
        verdict(
            right >= 0.8 and before <= 0.1,
            f"the edit was learned: {right:.0%} of new images show the reference in the spotlight (base: "
            f"{before:.0%}), {report['moved']:.0%} of the way from the base's images to the intended ones",
        ),
        verdict(
            follow >= 0.8 and wrong <= 0.1,
            f"the reference is what is edited: with another reference, {follow:.0%} show that one in the spotlight and "
            f"{wrong:.0%} still the previous one",
        ),
        verdict(plain >= plain_before - 0.1, f"plain edits stay right: {plain:.0%} (base: {plain_before:.0%})"),
        verdict(bool(report["base_unchanged"]), "with the adapter off, the base's images are the same, bit for bit"),
    ]


def main(config: DictConfig) -> None:
    """Train, measure, and write `grid.png` and `demo_edit.json` into the run folder."""
    run_demo(config, demonstrate)


def demonstrate(run: RunConfig, location: RunLocation) -> None:
    """Train in a claimed run folder and compare images before and after."""
    drawings = new_drawings()
    sources = [draw(drawing, PIXELS) for drawing in drawings]
    intended = [spotlight(source) for source in sources]
    instructions = [INSTRUCTION] * len(drawings)
    shuffled = others(drawings)
    plain, results = zip(*plain_edits(drawings), strict=True)

    run.say(f"{2 * len(drawings)} images of the base, then {run.settings.steps} steps, then {4 * len(drawings)} more")
    pipe = Pipeline(run.source, run.accelerator.device, run.precision, keep_text_encoder=True, cache=run.copies)
    before, plain_before = edit_sources(pipe, sources, instructions), edit_sources(pipe, sources, plain)

    adapter, seconds = train_and_load(run, location, pipe)
    after, plain_after = edit_sources(pipe, sources, instructions), edit_sources(pipe, sources, plain)
    of_another = edit_sources(pipe, [sources[i] for i in shuffled], instructions)
    with adapters_disabled(pipe.transformer):
        unchanged = are_identical(before, edit_sources(pipe, sources, instructions))

    scores = {
        "before": shares(before, drawings, lit=True),
        "after": shares(after, drawings, lit=True),
        "shuffled": shares(of_another, drawings, lit=True),
        "shuffled_given": shares(of_another, [drawings[i] for i in shuffled], lit=True),
        "plain_before": shares(plain_before, results, lit=False),
        "plain_after": shares(plain_after, results, lit=False),
    }
    distances = [sum(map(difference, pictures, intended)) / len(intended) for pictures in (before, after)]
    found = {
        "training_seconds": seconds,
        "edits_right_before": scores["before"]["all"],
        "edits_right": scores["after"]["all"],
        "distance_before": distances[0],
        "distance": distances[1],
        "moved": share_moved(distances[0], distances[1], 0),
        "shuffled_right": scores["shuffled"]["all"],
        "shuffled_follow": scores["shuffled_given"]["all"],
        "plain_right_before": scores["plain_before"]["all"],
        "plain_right": scores["plain_after"]["all"],
        "base_unchanged": float(unchanged),
    }
    chosen = [drawings.index(one) for one in SHOWN]
    rows = [[pictures[i] for i in chosen] for pictures in (sources, before, after, intended)]
    grid = sample_grid(rows, [INSTRUCTION] * len(SHOWN), ["reference", "base", "adapter", "intended"])
    pairs = [(f"{drawings[i].color} {drawings[i].shape}, {INSTRUCTION}", before[i], after[i]) for i in chosen]
    use = ["--image", "data/demo_edit_new/pink_fish.png", "--prompt", INSTRUCTION, "--out", "fish.png"]
    report_results(run, adapter, "demo_edit.json", found | scores, judge(found), grid, use, pairs)


if __name__ == "__main__":
    command(main)
