"""A busy machine: the demo's step alone, and next to processes that keep every core busy.

    python benchmarks/busy.py

Two trainings of the demo (train/run.py) are alive at once: one whose OpenMP threads spin as flux2/__init__.py sets it,
one with libgomp's own default. They take turns of a few steps, in changing order, so that both meet the same machine;
the first step of a turn does not count. `--launch` starts them with `accelerate launch`. The result has the share of
the machine that other processes used during the idle turns: above a few percent, the idle figures mean little.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import flux2  # noqa: I001  before torch, as in the commands

import argparse
import json
import os
import runpy
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from benchmarks.common import at_least, environment, hardware, write_result

WORK = "--work"  # as the first argument: be a training
RESULT = ROOT / "benchmarks" / "results" / "busy_cpu.json"
VARIANTS: dict[str, dict[str, str]] = {
    "libgomp's default": {"GOMP_SPINCOUNT": "300000"},  # what it takes where no variable is set
    "flux2-lora": {},
}


def work(settings: Sequence[str]) -> None:
    """Train as train/run.py does: as many steps as a line of stdin asks for; their seconds are a line of stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what training prints
    left, began, seconds = 0, 0.0, []

    def step(*_: object) -> None:
        nonlocal left, began, seconds
        if left:
            seconds.append(time.perf_counter() - began)
            left -= 1
        if not left:
            print(json.dumps({"pid": os.getpid(), "seconds": seconds}), file=answers, flush=True)
            left, seconds = int(sys.stdin.readline() or 0), []
            if not left:
                os._exit(0)  # the benchmark has ended
        began = time.perf_counter()

    register_optimizer_step_post_hook(step)
    sys.argv = ["train/run.py", *settings]
    runpy.run_path(str(ROOT / "train" / "run.py"), run_name="__main__")


class Training:
    """A training of the demo in a process of its own, whose OpenMP threads spin as `variables` say."""

    def __init__(self, folder: Path, variables: dict[str, str], launch: bool) -> None:
        settings = ("+experiment=demo", f"cache_dir={folder}/cache", f"output_dir={folder}/run", "steps=1000000")
        settings += ("sample_every=0", "validate_every=0", "checkpoint_every=0")
        start = ["-m", "accelerate.commands.launch"] if launch else []
        plain = {key: value for key, value in os.environ.items() if key not in flux2.SPIN_VARIABLES}
        self.started = subprocess.Popen(
            [sys.executable, *start, __file__, WORK, *settings],
            cwd=ROOT,
            env=plain | variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.process = psutil.Process(self.answer()["pid"])  # after the first step
        self.others: list[float] = []  # share of the machine that other processes used, for each turn

    def answer(self) -> dict[str, Any]:
        assert self.started.stdout is not None
        line = self.started.stdout.readline()
        if not line:
            raise RuntimeError("a training ended early")
        found: dict[str, Any] = json.loads(line)
        return found

    def steps(self, count: int) -> list[float]:
        """Seconds of each of `count` steps, after one that does not count."""
        assert self.started.stdin is not None
        began, machine, own = time.perf_counter(), used(psutil.cpu_times()), used(self.process.cpu_times())
        print(count + 1, file=self.started.stdin, flush=True)
        seconds: list[float] = self.answer()["seconds"]
        other = used(psutil.cpu_times()) - machine - (used(self.process.cpu_times()) - own)
        self.others.append(other / (time.perf_counter() - began) / (os.cpu_count() or 1))
        return seconds[1:]

    def close(self) -> None:
        assert self.started.stdin is not None
        self.started.stdin.close()
        self.started.wait()


def used(times: Any) -> float:
    """CPU seconds of a process or of the machine, idle ones left out."""
    return sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal"))


@contextmanager
def every_core_busy() -> Iterator[None]:
    """Context manager that runs one process per core, and each would use all of it."""
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        time.sleep(0.5)
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


def measure(trainings: dict[str, Training], rounds: int, idle: int, busy: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of the steps of each training, alone and next to busy processes."""
    seconds: dict[str, dict[str, list[float]]] = {name: {"idle": [], "busy": []} for name in trainings}
    for turn in range(rounds):
        order = list(trainings)[:: 1 if turn % 2 else -1]
        for name in order:
            seconds[name]["idle"] += trainings[name].steps(idle)
        others = {name: list(training.others) for name, training in trainings.items()}
        with every_core_busy():
            for name in order:
                seconds[name]["busy"] += trainings[name].steps(busy)
        for name, training in trainings.items():  # only of the turns alone
            training.others = others[name]
        print(f"round {turn + 1} of {rounds}:", summary(seconds), flush=True)
    return seconds


def summary(seconds: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    return {name: {when: statistics.median(found) for when, found in of.items()} for name, of in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=at_least(1), default=8)
    parser.add_argument("--idle-steps", type=at_least(1), default=20, help="of a turn")
    parser.add_argument("--busy-steps", type=at_least(1), default=3, help="of a turn")
    parser.add_argument("--launch", action="store_true", help="start the trainings with `accelerate launch`")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as name:
        trainings = {
            variant: Training(Path(name) / str(number), variables, options.launch)
            for number, (variant, variables) in enumerate(VARIANTS.items())
        }
        try:
            seconds = measure(trainings, options.rounds, options.idle_steps, options.busy_steps)
        finally:
            for training in trainings.values():
                training.close()
    medians = summary(seconds)
    default, ours = VARIANTS
    result = {
        "what": "a step of the demo, alone and next to one busy process per core",
        "hardware": hardware(torch.device("cpu")),
        "seconds": {
            variant: {
                when: {"median": statistics.median(found), "min": min(found), "max": max(found), "steps": len(found)}
                for when, found in of.items()
            }
            for variant, of in seconds.items()
        },
        "idle": {"flux2-lora / default": medians[ours]["idle"] / medians[default]["idle"]},
        "busy / idle": {variant: values["busy"] / values["idle"] for variant, values in medians.items()},
        "used by other processes": statistics.mean(share for each in trainings.values() for share in each.others),
        "launched by accelerate": options.launch,
        **environment(),
    }
    print(json.dumps(result, indent=2))
    write_result(options.out, result)


if __name__ == "__main__":
    if sys.argv[1:2] == [WORK]:
        work(sys.argv[2:])
    else:
        main()
