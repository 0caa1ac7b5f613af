"""Products with frozen weights: as little as can be is kept for the backward, and no weight gradient is formed."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from flux2.layers.recompute_context import current


def rows(x: Tensor) -> Tensor:
    """(..., width) -> (all others, width)."""
    return x.reshape(-1, x.shape[-1])


def product(linear: nn.Linear, x: Tensor) -> Tensor:
    """x W^T, and the bias if there is one: (..., in) -> (..., out), in memory of its own, in the dtype of x."""
    if hasattr(linear, "product"):
        return linear.product(x)  # type: ignore[operator]
    # as a matrix: of anything else PyTorch makes a batch at times, but not where a gradient is wanted
    return F.linear(rows(x), linear.weight, linear.bias).view(*x.shape[:-1], -1)


def input_gradient(linear: nn.Linear, dy: Tensor) -> Tensor:
    """dy W, the gradient of `product` for its input: (..., out) -> (..., in), in memory of its own."""
    if hasattr(linear, "input_gradient"):
        return linear.input_gradient(dy)  # type: ignore[operator]
    return dy @ linear.weight.to(dy.dtype)


def autocasted(x: Tensor) -> Tensor:
    """x as a linear layer takes it: under autocast in its dtype."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))


class FrozenProduct(torch.autograd.Function):
    """`product` with a backward that reads the weight where it then lies and saves no tensor.

    The weight may so be moved, streamed or stored in another form between forward and backward. It gets no gradient.
    """

    @staticmethod
    def forward(ctx: Any, linear: nn.Linear, x: Tensor) -> Tensor:
        ctx.linear = linear
        replay = None if torch.compiler.is_compiling() else current()
        y = replay.recall(linear, x) if replay else None
        if y is None:
            y = product(linear, x)
            if replay:
                replay.remember(linear, y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor]:
        return None, input_gradient(ctx.linear, dy)


class TailLinear(nn.Linear):
    """An `nn.Linear` whose output a block's second run may leave out or have kept (recompute_context.py)."""

    def forward(self, x: Tensor) -> Tensor:
        if (
            torch.compiler.is_compiling()
            or current() is None
            or any(parameter.requires_grad for parameter in self.parameters())
        ):
            return product(self, x)
        return FrozenProduct.apply(self, autocasted(x))
