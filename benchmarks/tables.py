"""README's tables, from what the benchmarks wrote and what the planner predicts: `python benchmarks/tables.py`.

Each table stands in README.md between `<!-- table: name -->` and `<!-- end -->` and is written anew from
benchmarks/results/*.json; `fits` is predicted by the planner (train/planner/predictor.py) and says so. `--check`
changes nothing and fails if a table is not what it would be.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import argparse
import json
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from benchmarks.fits import planner
from flux2.models.variants import VARIANTS
from train.planner.gpus import gpu, usable
from train.planner.predictor import Planner
from train.planner.search import choose

README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
CARDS = (8, 12, 16, 24, 32, 48, 80, 141)
MODELS = {"dev": "dev", "klein_base_9b": "klein base 9B", "klein_base_4b": "klein base 4B"}
MEASURES = {
    "style_moved": "style moved",
    "subjects_right": "new subjects right",
    "plain_style_moved": "plain prompts moved",
    "plain_subjects_right": "plain prompts right",
}


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the columns after the first are numbers, on the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def result(name: str) -> dict[str, Any]:
    """One file of results, empty if there is none."""
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else {}


# ------------------------------------------------------------------ predicted


@lru_cache
def known(name: str, storage: str | None, in_fp8: bool) -> Planner:
    return planner(VARIANTS[name], storage, 1024, in_fp8)


def fits() -> str:
    """Seconds a step on a common card of each size; an asterisk where blocks stream from host memory."""
    cards = {size: gpu(None, size) for size in CARDS}
    rows = []
    for name, title in MODELS.items():
        for storage in (None, "fp8", "nf4"):
            cells = []
            for size, card in cards.items():
                found = choose(known(name, storage, card.fp8 is not None), {}, usable(size), card)
                streams = found is not None and found.choice.offload_blocks
                cells.append("no" if found is None else f"{found.seconds(card):.1f}{'*' if streams else ''}")
            rows.append([f"{title}, {storage or 'bf16'}", *cells])
    return markdown(["predicted s/step", *(f"{size} GB ({card.name})" for size, card in cards.items())], rows)


# ------------------------------------------------------------------ measured


def steps() -> str:
    """A step beside diffusers + PEFT, on each machine that was measured."""
    rows = []
    for name in ("step_cpu", "step_gpu"):
        if found := result(name):
            ours, theirs = (found["seconds"][side] for side in ("flux2-lora", "diffusers + PEFT"))
            shown = [f"{side['median']:.2f} s ({side['min']:.2f} to {side['max']:.2f})" for side in (ours, theirs)]
            rows.append([f"{found['hardware']}: {found['what']}", *shown, f"{found['ratio']:.2f}"])
    table = markdown(["median of a step (least to most)", "flux2-lora", "diffusers + PEFT", "ratio"], rows)
    for file in sorted(RESULTS.glob("matrix_*.json")):
        table += "\n" + matrix(json.loads(file.read_text()))
    for file in sorted(RESULTS.glob("fits_*.json")):
        table += "\n" + runs(json.loads(file.read_text()))
    return table


def matrix(found: dict[str, Any]) -> str:
    """The cases of one run of benchmarks/matrix.py."""
    rows = []
    for name, case in found["cases"].items():
        if "seconds" not in case:
            rows.append([name, *case.values(), "", ""])
            continue
        times, memory = case["seconds"], case.get("GB", {}).get("allocated")
        cosine = case.get("cosine of LoRA gradients with bf16")
        rows.append(
            [
                name,
                f"{times['median']:.3f} s ({times['min']:.3f} to {times['max']:.3f})",
                "" if memory is None else f"{memory:.1f} GB",
                "" if cosine is None else f"{cosine:.4f}",
            ]
        )
    head = [f"{found['hardware']}: {found['what']}", "step", "peak memory", "cosine with bf16"]
    return markdown(head, rows)


def runs(found: dict[str, Any]) -> str:
    """The cases of one run of benchmarks/fits.py."""
    rows = []
    for name, run in found["runs"].items():
        missing = run.get("left out") or run.get("out of memory")
        if missing:
            rows.append([name, missing, "", ""])
            continue
        chosen = ", ".join(f"{key}={value}" for key, value in run.get("memory", {}).items() if value)
        gigabytes = run.get("GB", {"predicted": float("nan"), "allocated": float("nan")})
        rows.append(
            [
                name,
                chosen,
                f"{gigabytes['allocated']:.1f} GB ({gigabytes['predicted']:.1f} predicted)",
                f"{run['seconds']['median']:.2f} s ({run['predicted seconds']:.2f} predicted)",
            ]
        )
    return markdown([f"{found['hardware']}: model, base, px, card", "memory", "peak", "step"], rows)


def precisions() -> str:
    """The demo trained on bases of other precisions."""
    found = result("demo_precisions")
    head = [f"mean of {found['seeds']} seeds (least to most)", *MEASURES.values()]

    def cell(value: dict[str, Any]) -> str:
        return f"{value['mean']:.0%} ({value['min']:.0%} to {value['max']:.0%})"

    rows = [[name, *(cell(values[key]) for key in MEASURES)] for name, values in found["summary"].items()]
    return markdown(head, rows)


TABLES: dict[str, Callable[[], str]] = {"fits": fits, "steps": steps, "precisions": precisions}


def written(text: str, only: Sequence[str] = tuple(TABLES)) -> str:
    """`text` with its tables of these names made anew."""

    def anew(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        if name not in TABLES:
            raise ValueError(f"README.md has a place for a table {name!r}; known are {', '.join(TABLES)}")
        return begin + TABLES[name]() + end if name in only else match.group()

    return TABLE.sub(anew, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if README is not up to date")
    options = parser.parse_args()
    before = README.read_text()
    after = written(before)
    if options.check and after != before:
        sys.exit("README.md's tables are not those of benchmarks/results: run python benchmarks/tables.py")
    README.write_text(after)
    print(f"{README.name}: {'up to date' if after == before else 'written'}")


if __name__ == "__main__":
    main()
