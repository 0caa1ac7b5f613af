"""Write the tables of the documentation from the results of the benchmarks: `python benchmarks/tables.py`.

A table in one of `PAGES` is between `<!-- table: name -->` and `<!-- end -->`. It is made from the files of
benchmarks/results; `fits`, `host`, `limits` and `kernels` are predicted by the planner (train/planner/predictor.py).
`--check` writes nothing and fails if a table is not up to date.
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
from dataclasses import replace
from functools import lru_cache
from typing import Any

from benchmarks.common import RESULTS
from benchmarks.fits import make_planner
from flux2.models.variants import VARIANTS
from train.config.memory import Choice
from train.planner.gpus import Gpu, gpu, usable
from train.planner.prediction import Prediction
from train.planner.predictor import Planner
from train.planner.search import choose

PAGES = (ROOT / "docs" / "memory.md", ROOT / "docs" / "performance.md")
TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
GPU_SIZES = (8, 12, 16, 24, 32, 48, 80, 141)
PAIR_SIZES = (16, 24, 32)  # of two GPUs that a model is divided over
MODELS = {"dev": "dev", "klein_base_9b": "klein base 9B", "klein_base_4b": "klein base 4B"}
MEASURES = {
    "style_moved": "style moved",
    "subjects_right": "new subjects right",
    "plain_style_moved": "plain prompts moved",
    "plain_subjects_right": "plain prompts right",
}


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table. The columns after the first are right-aligned."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def read_result(name: str) -> dict[str, Any]:
    """Return the content of a result file, empty if there is none."""
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else {}


# ------------------------------------------------------------------ predictions


@lru_cache
def cached_planner(name: str, storage: str | None, in_fp8: bool) -> Planner:
    """Return the planner of one image of 1024 px per step."""
    return make_planner(VARIANTS[name], storage, 1024, in_fp8)


def choices(what: str, show: Callable[[Prediction, Gpu], str]) -> str:
    """Return a table of what is chosen for a typical GPU of each size: `show` of each prediction that fits."""
    cards = {size: gpu(None, size) for size in GPU_SIZES}
    rows = []
    for name, title in MODELS.items():
        for storage in (None, "fp8", "int8", "nf4"):
            cells = []
            for size, card in cards.items():
                prediction = choose(cached_planner(name, storage, card.fp8 is not None), {}, usable(size), card)
                cells.append("no" if prediction is None else show(prediction, card))
            rows.append([f"{title}, {storage or 'bf16'}", *cells])
    return markdown([what, *(f"{size} GB ({card.name})" for size, card in cards.items())], rows)


def fits() -> str:
    """Return the predicted seconds per step, with an asterisk if blocks are offloaded."""
    return choices(
        "predicted s/step", lambda one, card: f"{one.seconds(card):.1f}{'*' * bool(one.choice.offload_blocks)}"
    )


def host() -> str:
    """Return the predicted host memory in GB, and how much of it is pinned, if any."""

    def show(prediction: Prediction, card: Gpu) -> str:
        pinned = prediction.host["streamed blocks"] + prediction.host["block inputs"]
        return f"{sum(prediction.host.values()) / 1e9:.0f}{f' ({pinned / 1e9:.0f})' if pinned else ''}"

    return choices("GB of host memory (pinned)", show)


def limits() -> str:
    """Return the seconds of a step of dev by what takes them, with memory as chosen for a typical GPU of each size."""
    cards = {size: gpu(None, size) for size in (12, 16, 24, 32, 48, 80, 141)}
    rows = []
    for storage in (None, "fp8", "int8", "nf4"):
        cells = []
        for size, card in cards.items():
            found = choose(cached_planner("dev", storage, card.fp8 is not None), {}, usable(size), card)
            if found is None:
                cells.append("no")
                continue
            products = card.seconds(replace(found.work, bytes=0))
            parts = products, card.seconds(found.work) - products, found.moved / (card.bus * 1e9)
            compiled = replace(found, compiled=True).seconds(card)
            cells.append(f"{' / '.join(f'{part:.1f}' for part in parts)} ({found.seconds(card):.1f}, {compiled:.1f})")
        rows.append([storage or "bf16", *cells])
    return markdown(["s/step of dev", *(f"{size} GB ({card.name})" for size, card in cards.items())], rows)


def compilation() -> str:
    """Return memory and CPU seconds of benchmarks/compilation_simulated.py."""
    rows = []
    for name, policies in read_result("compilation_simulated").get("runs", {}).items():
        storage, capability = name.split()
        for policy, one in policies.items():
            memory = [f"{one[key]:.2f}" for key in ("uncompiled GB", "compiled GB")]
            place = f"{storage}, {policy}, {int(capability) / 10:.1f}"
            rows.append([place, *memory, f"{one['CPU seconds a graph']:.0f}"])
    head = ["base, checkpointing, capability", "uncompiled, GB", "compiled, GB", "CPU seconds to compile a graph"]
    return markdown(head, rows)


def kernels() -> str:
    """Return what lies between the products of a step of dev with full recompute, and the step's time on an H200."""
    card, rows = gpu("H200", 141), []
    for storage in (None, "fp8", "int8", "nf4"):
        planners = [make_planner(VARIANTS["dev"], storage, 1024, True) for _ in range(2)]
        planners[1] = Planner(replace(planners[1].job, kernels=True))
        eager, fused = (planner.predict(Choice(checkpointing="full")) for planner in planners)
        seconds = [one.seconds(card) for one in (eager, fused, replace(eager, compiled=True))]
        moved = [f"{one.work.bytes / 1e9:.0f} GB" for one in (eager, fused)]
        rows.append([storage or "bf16", *moved, *(f"{value:.2f} s" for value in seconds)])
    head = ["base", "moved, torch", "moved, triton", "step, torch", "step, triton", "step, compiled"]
    return markdown(head, rows)


def kernel_memory() -> str:
    """Return memory and launches of benchmarks/kernels_simulated.py."""
    rows = []
    for name, policies in read_result("kernels_simulated").get("runs", {}).items():
        storage, capability = name.split()
        for policy, one in policies.items():
            sides = one["torch"], one["triton"]
            figures = [*(f"{side['GB']:.2f} GB" for side in sides), *(f"{side['launches']:,}" for side in sides)]
            if capability == "90":
                rows.append([f"{storage}, {policy}", *figures])
    head = ["base, checkpointing", "torch", "triton", "launches, torch", "launches, triton"]
    return markdown(head, rows)


def recompute() -> str:
    """Return times and memory of benchmarks/recompute.py, ours and PyTorch's."""
    times, memory = read_result("recompute_cpu").get("policies", {}), read_result("recompute_simulated")
    rows = []
    for policy, one in times.items():
        cells = [f"{one['seconds'][side]:.2f} s" for side in ("ours", "torch")]
        rows.append([f"step, {policy}, measured on a CPU", *cells, f"{one['ours / torch']:.2f}"])
    for name, one in memory.get("checkpointing, GB", {}).items():
        for what in ("kept", "peak"):
            ours, torch = one["ours"][what], one["torch"][what]
            rows.append([f"{what}, {name}, simulated", f"{ours:.2f} GB", f"{torch:.2f} GB", f"{ours / torch:.2f}"])
    for name, one in memory.get("offload of all blocks, peak in GB", {}).items():
        theirs = one["FSDP2"]
        cells = ["fails", ""] if isinstance(theirs, str) else [f"{theirs:.2f} GB", f"{one['ours'] / theirs:.2f}"]
        rows.append([f"peak, all blocks offloaded, {name}, simulated", f"{one['ours']:.2f} GB", *cells])
    return markdown(["", "ours", "PyTorch's", "ratio"], rows)


def simulated() -> str:
    """Return the peaks that benchmarks/planner_simulated.py found: predicted, simulated and reserved, in GB."""
    runs = read_result("planner_simulated")["runs"]
    rows = []
    for name, title in MODELS.items():
        for storage in ("bf16", "fp8", "int8", "nf4"):
            found = [runs[f"{name} {storage} 1024 {size}"].get("GB") for size in GPU_SIZES]
            keys = ("predicted", "simulated", "reserved")
            cells = ["no" if one is None else " / ".join(f"{one[key]:.1f}" for key in keys) for one in found]
            rows.append([f"{title}, {storage}", *cells])
    return markdown(["GB", *(f"{size} GB" for size in GPU_SIZES)], rows)


def options() -> str:
    """Return the peaks that benchmarks/options_simulated.py found for options of training, by option and base."""
    runs = read_result("options_simulated")["runs"]
    bases, names = (list(dict.fromkeys(name.split(": ")[i] for name in runs)) for i in range(2))
    rows = []
    for option in names:
        cells = []
        for base in bases:
            phases = runs[f"{base}: {option}"]["GB"].values() if f"{base}: {option}" in runs else []
            keys = ("predicted", "simulated", "reserved") if phases else ()
            cells.append(" / ".join(f"{max(one[key] for one in phases):.2f}" for key in keys))
        setting, comma, more = option.partition(",")
        is_setting = any(mark in setting for mark in "=.")
        rows.append([f"`{setting}`{comma}{more}" if is_setting else option, *cells])
    return markdown(["GB", *bases], rows)


def split() -> str:
    """Return the peaks of benchmarks/planner_simulated.py on two GPUs: blocks, predicted and simulated GB of each."""
    runs = read_result("planner_simulated")["runs"]
    rows = []
    for name in ("dev", "klein_base_9b"):
        for storage in ("bf16", "fp8", "int8", "nf4"):
            cells = []
            for size in PAIR_SIZES:
                run = runs[f"{name} {storage} 1024 2x{size}"]
                peaks = [one["GB"] for one in run.get("GPUs", [])]
                each = [f"{one['predicted']:.1f} / {one['simulated']:.1f}" for one in peaks]
                cells.append(f"{'+'.join(map(str, run['split']))}: {', '.join(each)}" if each else "no")
            rows.append([f"{MODELS[name]}, {storage}", *cells])
    return markdown(["GB", *(f"2 x {size} GB" for size in PAIR_SIZES)], rows)


# ------------------------------------------------------------------ measurements


def steps() -> str:
    """Return the step times next to those of diffusers + PEFT, and the tables of the GPU benchmarks."""
    rows = []
    for name in ("step_cpu", "step_gpu"):
        if content := read_result(name):
            ours, theirs = (content["seconds"][side] for side in ("flux2-lora", "diffusers + PEFT"))
            shown = [f"{side['median']:.2f} s ({side['min']:.2f} to {side['max']:.2f})" for side in (ours, theirs)]
            rows.append([f"{content['hardware']}: {content['what']}", *shown, f"{content['ratio']:.2f}"])
    table = markdown(["median of a step (least to most)", "flux2-lora", "diffusers + PEFT", "ratio"], rows)
    for file in sorted(RESULTS.glob("matrix_*.json")):
        table += "\n" + matrix(json.loads(file.read_text()))
    for file in sorted(RESULTS.glob("fits_*.json")):
        table += "\n" + runs(json.loads(file.read_text()))
    return table


def matrix(content: dict[str, Any]) -> str:
    """Return the cases of a result of benchmarks/matrix.py."""
    rows = []
    for name, case in content["cases"].items():
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
    head = [f"{content['hardware']}: {content['what']}", "step", "peak memory", "cosine with bf16"]
    return markdown(head, rows)


def runs(content: dict[str, Any]) -> str:
    """Return the cases of a result of benchmarks/fits.py."""
    rows = []
    for name, run in content["runs"].items():
        missing = run.get("skipped") or run.get("out of memory")
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
    return markdown([f"{content['hardware']}: model, base, px, card", "memory", "peak", "step"], rows)


def precisions() -> str:
    """Return the measures of the demo on a base of each precision."""
    content = read_result("demo_precisions")
    head = [f"mean of {content['seeds']} seeds (least to most)", *MEASURES.values()]

    def cell(value: dict[str, Any]) -> str:
        return f"{value['mean']:.0%} ({value['min']:.0%} to {value['max']:.0%})"

    rows = [[name, *(cell(values[key]) for key in MEASURES)] for name, values in content["summary"].items()]
    return markdown(head, rows)


TABLES: dict[str, Callable[[], str]] = {
    "fits": fits,
    "host": host,
    "limits": limits,
    "compilation": compilation,
    "kernels": kernels,
    "kernel_memory": kernel_memory,
    "recompute": recompute,
    "simulated": simulated,
    "options": options,
    "split": split,
    "steps": steps,
    "precisions": precisions,
}


def update_tables(text: str, names: Sequence[str] = tuple(TABLES)) -> str:
    """Return `text` with new tables of these names. Raise ValueError if `text` has a table with an unknown name."""

    def replace(match: re.Match[str]) -> str:
        begin, name, end = match.groups()
        if name not in TABLES:
            raise ValueError(f"unknown table {name!r}. Use one of {', '.join(TABLES)}.")
        return begin + TABLES[name]() + end if name in names else match.group()

    return TABLE.sub(replace, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a table is not up to date")
    options = parser.parse_args()
    for page in PAGES:
        before = page.read_text()
        after = update_tables(before)
        if options.check and after != before:
            sys.exit(f"{page.name}: its tables are not up to date. Run python benchmarks/tables.py.")
        page.write_text(after)
        print(f"{page.name}: {'up to date' if after == before else 'written'}")


if __name__ == "__main__":
    main()
