"""The recipe of the embedded model, described in `__main__`, and what its training stages share."""

from __future__ import annotations

import copy
import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from data.files import atomic_write
from train.tiny_model.world import TINY

M = TypeVar("M", bound=nn.Module)
SOME_SIZES = {"color": 0.15, "background": 0.15, "shape": 0.25, "size": 0.45}  # shares of the kinds of edits
MOSTLY_SIZES = {"color": 0.1, "background": 0.1, "shape": 0.2, "size": 0.6}


@dataclass(frozen=True)
class Phase:
    """One part of the autoencoder's training.

    With 8 groups a norm sees 2 channels at a time in the widest layers: colors are learned quickly, but the colors of
    areas are normalized away and guessed, so other pictures are decoded in the drawings' colors. One group preserves
    them, but learns them poorly from scratch. So the first phase has 8 groups, and the second continues with one.
    """

    steps: int
    groups: int
    scenes: float  # share of scenes among the images
    crops: float  # share of the steps, at the start, that see 48-pixel crops
    lr: float
    areas: float  # weight of area colors in the loss


@dataclass(frozen=True)
class Lesson:
    """One part of the transformer's training.

    Size edits are the hardest, as the subject must be drawn again in another place, and the first lesson has few of
    them. The others have more edits, and a larger share of size edits.
    """

    steps: int
    lr: float
    flat: float  # share of the steps before the learning rate decays
    guide_from: float  # share of the steps before guided flows are learned
    edits_every: int  # interval, in batches, of those that edit
    kinds: dict[str, float] | None  # shares of the kinds of edits; None: their shares in the catalog
    stream: int  # number of the random stream; the autoencoder's phases have 1 and 2


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the result: counts of images, steps, batch sizes, learning rates."""

    seed: int = 0
    drawings: int = 24_000
    edits: int = 10_000
    scenes: int = 12_000
    autoencoder: tuple[Phase, ...] = (
        Phase(steps=8_000, groups=8, scenes=0.15, crops=0.6, lr=2e-3, areas=0.0),
        Phase(steps=6_000, groups=TINY.autoencoder.groups, scenes=0.5, crops=0.67, lr=1.5e-3, areas=1.0),
    )
    transformer: tuple[Lesson, ...] = (
        Lesson(steps=11_000, lr=1.2e-3, flat=0.6, guide_from=0.6, edits_every=4, kinds=None, stream=0),
        Lesson(steps=5_000, lr=6e-4, flat=0.3, guide_from=0.0, edits_every=2, kinds=SOME_SIZES, stream=3),
        Lesson(steps=5_000, lr=1e-3, flat=0.4, guide_from=0.0, edits_every=2, kinds=MOSTLY_SIZES, stream=4),
    )
    transformer_batch: int = 32
    average: float = 0.999  # decay of the averaged weights
    judged: int = 192  # number of held-out prompts, and of edits, for the final scores

    def scaled(self, scale: float) -> Recipe:
        """Return the recipe with all counts and steps multiplied by `scale`, each at least 8."""

        def part(count: int) -> int:
            return max(8, round(count * scale))

        counts = {key: part(getattr(self, key)) for key in ("drawings", "edits", "scenes", "judged")}
        phases = tuple(replace(phase, steps=part(phase.steps)) for phase in self.autoencoder)
        lessons = tuple(replace(lesson, steps=part(lesson.steps)) for lesson in self.transformer)
        return replace(self, autoencoder=phases, transformer=lessons, **counts)


class PhaseTrainer(Generic[M]):
    """Optimizer, averaged weights, checkpoints and log of one module."""

    def __init__(self, name: str, module: M, lr: float, betas: tuple[float, float], average: float, home: Path):
        self.name, self.module, self.average, self.home = name, module, average, home
        self.file = home / f"{name}.pt"
        decayed = [p for p in module.parameters() if p.ndim >= 2]
        other = [p for p in module.parameters() if p.ndim < 2]
        groups = [{"params": decayed, "weight_decay": 0.01}, {"params": other, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)
        self.averaged = copy.deepcopy(module).requires_grad_(False).eval()
        self.parts: dict[str, Any] = {"module": self.module, "averaged": self.averaged, "optimizer": self.optimizer}
        self.step, self.seconds, self.started = 0, 0.0, time.monotonic()

    def update(self, loss: Tensor, lr: float) -> None:
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        if not torch.isfinite(norm):
            raise RuntimeError(f"{self.name}: the gradient is not finite at step {self.step}")
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        decay = min(self.average, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(list(self.averaged.parameters()), list(self.module.parameters()), 1 - decay)

    def save(self) -> None:
        now = time.monotonic()
        self.seconds += now - self.started
        self.started = now
        state = {"step": self.step, "seconds": self.seconds}
        state |= {name: part.state_dict() for name, part in self.parts.items()}
        with atomic_write(self.file) as temporary:
            torch.save(state, temporary)

    def resume(self) -> None:
        if self.file.exists():
            state = torch.load(self.file, weights_only=True)
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            self.step, self.seconds = state["step"], state["seconds"]
            print(f"{self.name}: resuming from step {self.step}")

    def log(self, total: int, **values: float) -> None:
        seconds = self.seconds + time.monotonic() - self.started
        record = {"stage": self.name, "step": self.step, "seconds": round(seconds, 1)}
        record |= {key: round(value, 5) for key, value in values.items()}
        with (self.home / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        print(f"{self.name} {self.step}/{total} " + " ".join(f"{k} {v:.4g}" for k, v in values.items()), flush=True)


def rate(step: int, total: int, flat: float, warmup: int = 100) -> float:
    """Return the factor of the learning rate: warm-up, constant, then a cosine to zero."""
    if step < warmup:
        return (step + 1) / warmup
    rest = (step / total - flat) / (1 - flat)
    return 1.0 if rest <= 0 else 0.5 * (1 + math.cos(math.pi * rest))


def step_generator(recipe: Recipe, stage: int, step: int) -> np.random.Generator:
    """Return the generator of one step, which depends on the step alone, so that resuming is exact."""
    return np.random.default_rng((recipe.seed, stage, step))
