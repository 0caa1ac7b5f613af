"""Size of an optimizer's state, measured on small tensors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from train.optim.optimizers import MakeOptimizer, build_optimizer

PRIMES = (3, 5, 7, 11, 13)


def optimizer_bytes(make: MakeOptimizer, parameters: Iterable[nn.Parameter]) -> int:
    """Return the bytes of an optimizer's state: from one step on small parameters, or the layout of an 8-bit state."""
    counted = Counter(tuple(parameter.shape) for parameter in parameters)
    target: Any = getattr(make, "func", make)
    if getattr(target, "__module__", "").startswith("bitsandbytes") and "8bit" in getattr(target, "__name__", ""):
        # one byte per moment and a float32 scale per block of 256; tensors below 4096 elements stay in float32
        moments = 1 if any(base.__name__ == "Optimizer1State" for base in target.__mro__) else 2
        sizes = {shape: math.prod(shape) for shape in counted}
        each = {shape: moments * (n + 4 * math.ceil(n / 256) if n >= 4096 else 4 * n) for shape, n in sizes.items()}
    else:
        each = {shape: state_bytes(make, shape) for shape in counted}
    return sum(count * each[shape] for shape, count in counted.items())


def update_bytes(parameters: Iterable[nn.Parameter]) -> int:
    """Return the bytes that an update needs in addition to parameters, gradients and state: a result for each number.

    bfloat16 parameters get float32 copies, and float32 gradients in place of theirs
    (train/optim/stochastic_rounding.py).
    """
    return sum(p.numel() * (4 if p.itemsize == 4 else 3 * 4 - p.itemsize) for p in parameters)


def state_bytes(make: MakeOptimizer, shape: tuple[int, ...]) -> int:
    """Return the bytes of the state of one parameter of `shape`, which has at least one dimension.

    Measured on a parameter whose sides are different primes, so that the sides of a state tensor can be identified
    (Adafactor keeps rows and columns).
    """
    sides = PRIMES[: len(shape)]
    parameter = nn.Parameter(torch.ones(sides))
    parameter.grad = torch.ones_like(parameter)
    optimizer = build_optimizer(make, [parameter])
    optimizer.step()
    real, total = dict(zip(sides, shape, strict=True)), 0
    for value in optimizer.state[parameter].values():
        if not isinstance(value, torch.Tensor) or value.numel() == 1:
            continue
        whole = value.numel() == parameter.numel()
        count = math.prod(shape) if whole else math.prod(real.get(side, side) for side in value.shape)
        total += count * value.element_size()
    return total
