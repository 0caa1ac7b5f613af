"""Measure the share of a training step that is spent outside forward, backward and optimizer.

    python benchmarks/loop_overhead.py

Trains the demo and measures from its second step on. A step lasts from one request for a batch to the next. Its parts
are forward and backward (`Objective.losses`, `Accelerator.backward`), the optimizer (its update, and freeing the
gradients), and the rest: waiting for data, adding noise, clipping, and what has no name. A thread reads the next batch
and draws its noise during the step before, so that work counts as forward and backward. Validation, sample grids and
checkpoints are off, because they do not occur in every step; logging is as in the demo.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    import flux2  # noqa: F401  before torch: it sets how long threads spin

import argparse
import functools
import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from accelerate import Accelerator
from torch.optim import optimizer

import train.loop
import train.objective.objective
from benchmarks.common import RESULTS, environment, hardware, integer_type, read_clock, write_result
from benchmarks.demo_training import train_demo
from flux2.utils.device import pick_device
from train.objective.objective import Objective
from train.utils.prefetch import Prefetcher

WORK = ("forward and backward", "optimizer")


class StepTimer:
    """The seconds of each part of each step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.steps: list[dict[str, float]] = []
        self.current: dict[str, float] = defaultdict(float)
        self.start: float | None = None

    def next_step(self) -> None:
        """End the current step, if there is one, and begin the next."""
        now = read_clock(self.device)
        if self.start is not None:
            self.steps.append({**self.current, "whole": now - self.start})
        self.current, self.start = defaultdict(float), now

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function`, whose time then counts to the part `name`."""

        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            start = read_clock(self.device)
            try:
                return function(*arguments, **options)
            finally:
                self.current[name] += read_clock(self.device) - start

        return call


@contextmanager
def record(timer: StepTimer) -> Iterator[None]:
    """Context manager that makes `timer` record the functions that training calls."""
    wait = timer.wrap("waiting for data", Prefetcher.get)

    def get(prefetcher: Prefetcher[Any], step: int) -> Any:
        timer.next_step()
        return wait(prefetcher, step)

    starts: list[float] = []
    with ExitStack() as stack:
        before = optimizer.register_optimizer_step_pre_hook(lambda *_: starts.append(read_clock(timer.device)))

        def after(*_: Any) -> None:
            timer.current["optimizer"] += read_clock(timer.device) - starts.pop()

        hooks = [before, optimizer.register_optimizer_step_post_hook(after)]
        for hook in hooks:
            stack.callback(hook.remove)
        for owner, part, function in (
            (Objective, "forward and backward", "losses"),
            (Accelerator, "forward and backward", "backward"),
            (torch.optim.AdamW, "optimizer", "zero_grad"),
            (train.objective.objective, "adding noise", "add_noise"),
            (train.loop, "clipping", "clip"),
        ):
            stack.enter_context(mock.patch.object(owner, function, timer.wrap(part, getattr(owner, function))))
        stack.enter_context(mock.patch.object(Prefetcher, "get", get))
        yield


def measure(folder: Path, steps: int) -> StepTimer:
    """Train the demo in `folder` and return the times of its steps."""
    timer = StepTimer(pick_device(None))
    with record(timer):
        train_demo(f"steps={steps + 2}", f"cache_dir={folder}/cache", f"output_dir={folder}/run")
    timer.steps = timer.steps[1:]  # the first step warms up
    return timer


def summarize(timer: StepTimer) -> dict[str, Any]:
    """Return the share of each part in the time of all steps, and the median over the steps of the share outside."""
    whole = sum(step["whole"] for step in timer.steps)
    parts: dict[str, float] = defaultdict(float)
    for step in timer.steps:
        for name, seconds in step.items():
            parts[name] += seconds / whole
    named = {name: share for name, share in parts.items() if name not in ("whole", *WORK)}
    outside = 1 - sum(parts[name] for name in WORK)
    single = [1 - sum(step[name] for name in WORK) / step["whole"] for step in timer.steps]
    return {
        "steps": len(timer.steps),
        "seconds_per_step": whole / len(timer.steps),
        "work": {name: parts[name] for name in WORK},
        "outside": {"all": outside, **named, "the rest": outside - sum(named.values())},
        "outside_median_of_steps": statistics.median(single),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=integer_type(2), default=200)
    parser.add_argument("--out", type=Path, default=RESULTS / "loop_overhead_cpu.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        timer = measure(Path(name), options.steps)
    result = {"what": "share of a training step outside forward, backward and optimizer, in the demo"}
    result |= {"hardware": hardware(timer.device), **summarize(timer), **environment()}
    print(json.dumps(result, indent=2))
    write_result(options.out, result)


if __name__ == "__main__":
    main()
