"""Run folders with numbers and pictures, as training and train/evaluate.py leave them, for tests of the studio."""

import json
from pathlib import Path

from checkpoint_helpers import CONFIG, make_run
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from train.validation.sample_grid import LAYOUT, sample_grid

PROMPTS = ["a red cup", "a blue fox"]


def color_of(step: int, place: int) -> tuple[int, int, int]:
    """The color of an image of a sample grid."""
    return (step % 256, 40 * place, 90)


def write_lines(file: Path, lines: list[dict]) -> None:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_grid(run: Path, step: int, prompts: list[str] = PROMPTS) -> Path:
    file = run / "samples" / f"step_{step:06d}.png"
    file.parent.mkdir(exist_ok=True)
    page = sample_grid([[Image.new("RGB", (64, 48), color_of(step, i)) for i in range(len(prompts))]], prompts, side=64)
    info = PngInfo()
    info.add_itxt(LAYOUT, json.dumps({"prompts": prompts, "boxes": page.info["boxes"]}))
    page.save(file, pnginfo=info)
    return file


def write_evaluation(run: Path, rows: dict[str, tuple[int, int, int]], seeds: tuple[int, ...] = (0, 1)) -> None:
    """An evaluation with an image of one color for each row."""
    place = run / "evaluation" / "pictures"
    place.mkdir(parents=True)
    columns = [(i, seed) for i in range(len(PROMPTS)) for seed in seeds]
    found = {"features": "latents", "prompts": PROMPTS, "columns": columns, "chosen": list(rows)[-1], "rows": []}
    found["strengths"] = []
    for name, color in rows.items():
        files = [f"{name.replace(' ', '_')}_{i}_{seed}.png" for i, seed in columns]
        for file in files:
            Image.new("RGB", (64, 48), color).save(place / file)
        step = int(name.split()[1]) if name.startswith("step") else None
        found["rows"].append({"name": name, "step": step, "strength": 1.0, "files": files})
    firsts = [i for i, (_, seed) in enumerate(columns) if seed == seeds[0]]
    for name, row in (("0", found["rows"][0]), ("1", found["rows"][-1])):
        found["strengths"].append({**row, "name": name, "strength": float(name)})
        found["strengths"][-1]["files"] = [row["files"][i] for i in firsts]
    (place.parent / "evaluation.json").write_text(json.dumps(found))


def logged_run(folder: Path, *steps: int, finished: bool = False, loss: float = 1.0, **settings) -> Path:
    """A run of 40 steps with checkpoints and sample grids at `steps`, that logged up to the last of them."""
    config = {
        **CONFIG,
        **{"name": "cards", "steps": 40, "sample_every": 10, "validate_every": 10},
        **{"sample": {"prompts": PROMPTS, "seed": 3}, "validation": {"times": [0.2, 0.8], "held_out": 4}},
        **settings,
    }
    run = make_run(folder, *(step for step in steps if step), finished=finished, config=config)
    lines, validated = [], []
    for step in range(max(steps, default=0) + 1):
        line = {"step": step}
        if step:
            line |= {"loss": loss - step / 100, "lr": 1e-3, "grad_norm": 1.0, "images_per_second": 8.0}
            line |= {"peak_memory_gb": 1.5}
        if step % 10 == 0:
            losses = [[loss - step / 50 + at + i / 10 for at in (0.2, 0.8)] for i in range(4)]
            line["validation_loss"] = sum(map(sum, losses)) / 8
            validated.append({"step": step, "times": [0.2, 0.8], "samples": list("abcd"), "losses": losses})
        lines.append(line)
    write_lines(run / "metrics.jsonl", lines)
    write_lines(run / "validation.jsonl", validated)
    for step in steps:
        write_grid(run, step)
    (run / "command.txt").write_text("python train/run.py +experiment=tarot steps=40 'sample.prompts=[a red cup]'\n")
    return run
