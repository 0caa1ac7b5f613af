"""The loop: what share of a step is spent outside forward, backward and optimizer.

    python benchmarks/loop_overhead.py

The demo's training, from its second step on. A step is from one request for a batch to the next. Measured are forward
and backward (`Training.differentiate`: until what the forward kept is freed), the optimizer (its update, and freeing
the gradients), and of the rest the parts with a name: waiting for data (a thread reads it and draws its noise beside
the step before, where its work counts to forward and backward), adding noise, clipping. What happens every so often and
not in each step (validation, sample grids, checkpoints) is switched off; logging is as in the demo.
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
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import hydra
import torch
from accelerate import Accelerator
from torch.optim import optimizer

import train.loop
import train.objective.objective
import train.run
from benchmarks.common import at_least, environment, hardware, write_result
from flux2.utils.device import pick_device
from train.config.paths import CONFIG
from train.objective.objective import Objective
from train.stages.memory import load_config
from train.stages.run_folder import claim_run_folder
from train.utils.prefetch import Prefetcher

RESULT = Path(__file__).parent / "results" / "loop_overhead_cpu.json"
WORK = ("forward and backward", "optimizer")


class Clock:
    """Seconds of each part of each step."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.steps: list[dict[str, float]] = []
        self.current: dict[str, float] = defaultdict(float)
        self.began: float | None = None

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def step(self) -> None:
        """A step ends, and the next begins."""
        now = self.now()
        if self.began is not None:
            self.steps.append({**self.current, "whole": now - self.began})
        self.current, self.began = defaultdict(float), now

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            began = self.now()
            try:
                return function(*arguments, **options)
            finally:
                self.current[name] += self.now() - began

        return call


@contextmanager
def watching(clock: Clock) -> Iterator[None]:
    """Within this context `clock` sees what training calls."""
    wait = clock.timed("waiting for data", Prefetcher.get)

    def get(ahead: Prefetcher[Any], step: int) -> Any:
        clock.step()
        return wait(ahead, step)

    began: list[float] = []
    with ExitStack() as stack:
        before = optimizer.register_optimizer_step_pre_hook(lambda *_: began.append(clock.now()))

        def after(*_: Any) -> None:
            clock.current["optimizer"] += clock.now() - began.pop()

        hooks = [before, optimizer.register_optimizer_step_post_hook(after)]
        for hook in hooks:
            stack.callback(hook.remove)
        for place, name, called in (
            (Objective, "forward and backward", "losses"),
            (Accelerator, "forward and backward", "backward"),
            (torch.optim.AdamW, "optimizer", "zero_grad"),
            (train.objective.objective, "adding noise", "add_noise"),
            (train.loop, "clipping", "clip"),
        ):
            stack.enter_context(mock.patch.object(place, called, clock.timed(name, getattr(place, called))))
        stack.enter_context(mock.patch.object(Prefetcher, "get", get))
        yield


def measured(place: Path, steps: int) -> Clock:
    with hydra.initialize_config_dir(str(CONFIG), version_base="1.3"):
        config = hydra.compose(
            "train",
            [
                *("+experiment=demo", f"steps={steps + 2}", f"cache_dir={place}/cache", f"output_dir={place}/run"),
                *("sample_every=0", "validate_every=0", "checkpoint_every=0"),
            ],
        )
    clock = Clock(pick_device(None))
    with watching(clock):
        run = load_config(config)
        with claim_run_folder(run) as location:
            train.run.train(run, location)
    clock.steps = clock.steps[1:]  # the first step warms up
    return clock


def shares(clock: Clock) -> dict[str, Any]:
    """Of the sum of all steps; and of the single steps the median share outside."""
    whole = sum(step["whole"] for step in clock.steps)
    parts: dict[str, float] = defaultdict(float)
    for step in clock.steps:
        for name, seconds in step.items():
            parts[name] += seconds / whole
    named = {name: share for name, share in parts.items() if name not in ("whole", *WORK)}
    outside = 1 - sum(parts[name] for name in WORK)
    single = [1 - sum(step[name] for name in WORK) / step["whole"] for step in clock.steps]
    return {
        "steps": len(clock.steps),
        "seconds_a_step": whole / len(clock.steps),
        "work": {name: parts[name] for name in WORK},
        "outside": {"all": outside, **named, "the rest": outside - sum(named.values())},
        "outside_median_of_steps": statistics.median(single),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=at_least(2), default=200)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        clock = measured(Path(name), options.steps)
    result = {"what": "share of a training step outside forward, backward and optimizer, in the demo"}
    result |= {"hardware": hardware(clock.device), **shares(clock), **environment()}
    print(json.dumps(result, indent=2))
    write_result(options.out, result)


if __name__ == "__main__":
    main()
