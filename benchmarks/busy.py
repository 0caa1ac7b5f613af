"""Time a step of the demo on an idle machine, and next to processes that keep every core busy.

    python benchmarks/busy.py

Two processes train the demo (train/run.py): one with the OpenMP spinning that flux2/__init__.py sets, one with the
default of libgomp. They take turns of a few steps in alternating order, so that both see the same load; the first step
of a turn is not counted. `--launch` starts them with `accelerate launch`. The result has the share of the machine that
other processes used during the idle turns: if it exceeds a few percent, the idle figures mean little.
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

from benchmarks.common import RESULTS, environment, hardware, integer_type, write_result

WORKER = "--worker"  # as the first argument: run as one of the training processes
VARIANTS: dict[str, dict[str, str]] = {
    "libgomp's default": {"GOMP_SPINCOUNT": "300000"},  # the value that libgomp uses if no variable is set
    "flux2-lora": {},
}


def run_worker(settings: Sequence[str]) -> None:
    """Train like train/run.py: read a number of steps from stdin, run them, write their seconds to stdout, repeat."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # stdout carries the replies, so what training prints goes to stderr
    remaining, start, seconds = 0, 0.0, []

    def after_step(*_: object) -> None:
        nonlocal remaining, start, seconds
        if remaining:
            seconds.append(time.perf_counter() - start)
            remaining -= 1
        if not remaining:
            print(json.dumps({"pid": os.getpid(), "seconds": seconds}), file=replies, flush=True)
            remaining, seconds = int(sys.stdin.readline() or 0), []
            if not remaining:
                os._exit(0)  # the benchmark closed stdin
        start = time.perf_counter()

    register_optimizer_step_post_hook(after_step)
    sys.argv = ["train/run.py", *settings]
    runpy.run_path(str(ROOT / "train" / "run.py"), run_name="__main__")


class Training:
    """A process that trains the demo, with the environment `variables` for its OpenMP threads."""

    def __init__(self, folder: Path, variables: dict[str, str], launch: bool) -> None:
        settings = ("+experiment=demo", f"cache_dir={folder}/cache", f"output_dir={folder}/run", "steps=1000000")
        settings += ("sample_every=0", "validate_every=0", "checkpoint_every=0")
        launcher = ["-m", "accelerate.commands.launch"] if launch else []
        inherited = {key: value for key, value in os.environ.items() if key not in flux2.SPIN_VARIABLES}
        self.popen = subprocess.Popen(
            [sys.executable, *launcher, __file__, WORKER, *settings],
            cwd=ROOT,
            env=inherited | variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.process = psutil.Process(self.read_reply()["pid"])  # replies after its first step
        self.others: list[float] = []  # share of the machine used by other processes, per turn

    def read_reply(self) -> dict[str, Any]:
        """Return the next reply of the worker."""
        assert self.popen.stdout is not None
        line = self.popen.stdout.readline()
        if not line:
            raise RuntimeError("a training process ended early")
        reply: dict[str, Any] = json.loads(line)
        return reply

    def run_steps(self, count: int) -> list[float]:
        """Run an untimed step and then `count` steps, and return the seconds of each of these."""
        assert self.popen.stdin is not None
        start, others = time.perf_counter(), self.other_seconds()
        print(count + 1, file=self.popen.stdin, flush=True)
        seconds: list[float] = self.read_reply()["seconds"]
        others = self.other_seconds() - others
        self.others.append(others / (time.perf_counter() - start) / (os.cpu_count() or 1))
        return seconds[1:]

    def other_seconds(self) -> float:
        """Return the CPU seconds that all other processes of the machine have used."""
        return busy_seconds(psutil.cpu_times()) - busy_seconds(self.process.cpu_times())

    def close(self) -> None:
        """End the process."""
        assert self.popen.stdin is not None
        self.popen.stdin.close()
        self.popen.wait()


def busy_seconds(times: Any) -> float:
    """Return the CPU seconds of a process or of the machine, without idle time."""
    return sum(getattr(times, name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal"))


@contextmanager
def every_core_busy() -> Iterator[None]:
    """Context manager that runs one process per core, each of which spins."""
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        time.sleep(0.5)
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


def measure(trainings: dict[str, Training], rounds: int, idle: int, busy: int) -> dict[str, dict[str, list[float]]]:
    """Return the seconds of the steps of each training process, on the idle and on the busy machine."""
    seconds: dict[str, dict[str, list[float]]] = {name: {"idle": [], "busy": []} for name in trainings}
    for turn in range(rounds):
        order = list(trainings)[:: 1 if turn % 2 else -1]
        for name in order:
            seconds[name]["idle"] += trainings[name].run_steps(idle)
        others = {name: list(training.others) for name, training in trainings.items()}
        with every_core_busy():
            for name in order:
                seconds[name]["busy"] += trainings[name].run_steps(busy)
        for name, training in trainings.items():  # drop the shares of the busy turns
            training.others = others[name]
        print(f"round {turn + 1} of {rounds}:", summary(seconds), flush=True)
    return seconds


def summary(seconds: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    """Return the medians."""
    return {
        name: {load: statistics.median(times) for load, times in by_load.items()} for name, by_load in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=integer_type(1), default=8)
    parser.add_argument("--idle-steps", type=integer_type(1), default=20, help="timed steps per turn")
    parser.add_argument("--busy-steps", type=integer_type(1), default=3, help="timed steps per turn")
    parser.add_argument("--launch", action="store_true", help="start the processes with `accelerate launch`")
    parser.add_argument("--out", type=Path, default=RESULTS / "busy_cpu.json")
    options = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        trainings = {
            variant: Training(Path(folder) / str(number), variables, options.launch)
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
        "what": "a step of the demo, on an idle machine and next to one busy process per core",
        "hardware": hardware(torch.device("cpu")),
        "seconds": {
            variant: {
                load: {"median": statistics.median(times), "min": min(times), "max": max(times), "steps": len(times)}
                for load, times in by_load.items()
            }
            for variant, by_load in seconds.items()
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
    if sys.argv[1:2] == [WORKER]:
        run_worker(sys.argv[2:])
    else:
        main()
