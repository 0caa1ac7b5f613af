"""The edit demonstration: `python train/demo_edit.py [key=value ...]`.

Trains the LoRA of conf/experiment/demo_edit.yaml on 40 pairs of a picture and the same picture in a spotlight, then
looks at what came of it, on pictures whose subjects and colors are in no pair and that the base never saw:

- edit: the share of pictures that are the given one, in all it shows, and in the spotlight; before and after;
- reference: the same with each picture given in place of another, which must then be the one that is edited. An adapter
  that draws from its memory of the pairs, or from the instruction alone, fails here;
- plain edits, without the trigger word, which should be as before;
- whether the base, adapter off, still makes the very same pictures.

`data.synthetic.recognize` says what a picture shows. It knows nothing of training.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

if __name__ == "__main__":  # a script's own folder comes first in sys.path, and ours would hide libraries
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from train.cli.start import start

    sys.argv.append("+experiment=demo_edit")  # at the end, as -m takes what follows it for its own
    start()

import json
import time
from collections.abc import Sequence
from contextlib import closing

import torch
from omegaconf import DictConfig
from PIL import Image

from data.synthetic.drawings import BACKGROUNDS, COLORS, Drawing, draw, plain_edit
from data.synthetic.recognize import difference, recognize
from data.synthetic.spotlight import INSTRUCTION, PIXELS, SHOWN, new_drawings, spotlight
from flux2.adapters import adapters_disabled
from flux2.pipeline import Pipeline, render
from train.checkpoints.resume import RunLocation
from train.cli.app import command
from train.config.run_config import RunConfig
from train.demo import end, line, load_demo_config, moved, same
from train.run import train
from train.stages.run_folder import claim_run_folder
from train.utils.progress import ItemProgress
from train.validation.sample_grid import sample_grid

BATCH = 8


def edited(pipe: Pipeline, sources: Sequence[Image.Image], prompts: Sequence[str]) -> list[Image.Image]:
    """Each source edited as its prompt says; the i-th with seed i."""
    text, empty = pipe.embeddings(prompts)
    references = torch.cat([pipe.encode_references([source])[0] for source in sources])
    pictures: list[Image.Image] = []
    with closing(ItemProgress("pictures", shown=os.environ.get("RANK", "0") == "0")) as count:
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
    """Shares of pictures that are lit as asked for, that show each attribute of `wanted`, and all of it together."""
    found = recognize(pictures)
    right = {
        key: [getattr(one.drawing, key) == getattr(drawing, key) for one, drawing in zip(found, wanted, strict=True)]
        for key in ("shape", "color", "background", "size")
    }
    right["light"] = [one.lit == lit for one in found]
    right["all"] = [all(each) for each in zip(*right.values(), strict=True)]
    return {key: sum(values) / len(values) for key, values in right.items()}


def others(drawings: Sequence[Drawing]) -> list[int]:
    """For each drawing the index of another, each taken once: the one half of the list further, another subject."""
    count = len(drawings)
    indices = [(i + count // 2) % count for i in range(count)]
    assert all(one.shape != drawings[i].shape for one, i in zip(drawings, indices, strict=True))
    return indices


def plain_edits(drawings: Sequence[Drawing]) -> list[tuple[str, Drawing]]:
    """An instruction without the trigger for each: in turn another color and another background."""
    edits = []
    for i, drawing in enumerate(drawings):
        kind, names = ("background", list(BACKGROUNDS)) if i % 2 else ("color", list(COLORS))
        new = names[(names.index(getattr(drawing, kind)) + 1 + i // 2 % (len(names) - 1)) % len(names)]
        edits.append(plain_edit(drawing, kind, new))
    return edits


def judge(report: dict[str, float]) -> list[str]:
    """The report in sentences; each says what was measured, then yes or no."""
    right, before = report["edits_right"], report["edits_right_before"]
    follow, wrong = report["shuffled_follow"], report["shuffled_right"]
    plain, plain_before = report["plain_right"], report["plain_right_before"]
    return [
        line(
            right >= 0.8 and before <= 0.1,
            f"the edit was learned: {right:.0%} of new pictures are the given one in the spotlight (base: "
            f"{before:.0%}), {report['moved']:.0%} of the way from the base's pictures to the intended",
        ),
        line(
            follow >= 0.8 and wrong <= 0.1,
            f"the reference is what is edited: given another picture, {follow:.0%} are that one in the spotlight and "
            f"{wrong:.0%} still the one before",
        ),
        line(plain >= plain_before - 0.1, f"plain edits stay right: {plain:.0%} (base: {plain_before:.0%})"),
        line(bool(report["base_unchanged"]), "with the adapter off, the base's pictures are the same, bit for bit"),
    ]


def main(config: DictConfig) -> None:
    """Train, measure, and write `grid.png` and `demo_edit.json` into the run folder."""
    run = load_demo_config(config)
    with claim_run_folder(run) as location:  # what cannot be written says so before pictures are made
        demonstrate(run, location)


def demonstrate(run: RunConfig, location: RunLocation) -> None:
    """Train in a run folder that is claimed, with pictures before and after."""
    drawings = new_drawings()
    sources = [draw(drawing, PIXELS) for drawing in drawings]
    intended = [spotlight(source) for source in sources]
    instructions = [INSTRUCTION] * len(drawings)
    shuffled = others(drawings)
    plain, results = zip(*plain_edits(drawings), strict=True)

    run.say(f"{2 * len(drawings)} pictures of the base, then {run.settings.steps} steps, then {4 * len(drawings)} more")
    pipe = Pipeline(run.source, run.accelerator.device, run.precision, keep_text_encoder=True, cache=run.copies)
    before, plain_before = edited(pipe, sources, instructions), edited(pipe, sources, plain)

    began = time.perf_counter()
    adapter, _ = train(run, location)
    seconds = time.perf_counter() - began

    run.say("pictures with the adapter, and once more without it")
    pipe.load_adapter(adapter)
    after, plain_after = edited(pipe, sources, instructions), edited(pipe, sources, plain)
    of_another = edited(pipe, [sources[i] for i in shuffled], instructions)
    with adapters_disabled(pipe.transformer):
        unchanged = same(before, edited(pipe, sources, instructions))

    looks = {
        "before": shares(before, drawings, lit=True),
        "after": shares(after, drawings, lit=True),
        "shuffled": shares(of_another, drawings, lit=True),
        "shuffled_given": shares(of_another, [drawings[i] for i in shuffled], lit=True),
        "plain_before": shares(plain_before, results, lit=False),
        "plain_after": shares(plain_after, results, lit=False),
    }
    distances = [
        sum(difference(one, other) for one, other in zip(pictures, intended, strict=True)) / len(intended)
        for pictures in (before, after)
    ]
    found = {
        "training_seconds": round(seconds, 1),
        "edits_right_before": looks["before"]["all"],
        "edits_right": looks["after"]["all"],
        "distance_before": distances[0],
        "distance": distances[1],
        "moved": moved(distances[0], distances[1], 0),
        "shuffled_right": looks["shuffled"]["all"],
        "shuffled_follow": looks["shuffled_given"]["all"],
        "plain_right_before": looks["plain_before"]["all"],
        "plain_right": looks["plain_after"]["all"],
        "base_unchanged": float(unchanged),
    }
    folder = adapter.parent
    (folder / "demo_edit.json").write_text(json.dumps(found | looks, indent=2) + "\n")

    rows = [[pictures[drawings.index(one)] for one in SHOWN] for pictures in (sources, before, after, intended)]
    names = ["reference", "base", "adapter", "intended"]
    sample_grid(rows, [INSTRUCTION] * len(SHOWN), names).save(folder / "grid.png", optimize=True)

    use = ["--image", "data/demo_edit/new/pink_fish.png", "--prompt", INSTRUCTION, "--out", "fish.png"]
    chosen = [drawings.index(one) for one in SHOWN]
    pairs = [(f"{drawings[i].color} {drawings[i].shape}, {INSTRUCTION}", before[i], after[i]) for i in chosen]
    end(run, adapter, seconds, judge(found), folder / "demo_edit.json", use, pairs)


if __name__ == "__main__":
    command(main)
