"""Products with frozen weights that save as little as possible for the backward and form no weight gradient.

A frozen linear may store its weight in any form (float, FP8, INT8, NF4). Training needs two products of it, with W
(out, in):

    product(linear, x)          = x W^T     the forward
    input_gradient(linear, dy)  = dy W      the backward

A module that stores its weight in another form has methods of these names; a plain `nn.Linear` needs none.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from flux2.layers.recompute_context import current_replay


def flatten_rows(x: Tensor) -> Tensor:
    """(..., width) -> (product of the others, width)."""
    return x.reshape(-1, x.shape[-1])


def product(linear: nn.Linear, x: Tensor) -> Tensor:
    """Return x W^T plus the bias, if any: (..., in) -> (..., out) in newly allocated memory and the dtype of x."""
    if hasattr(linear, "product"):
        return linear.product(x)  # type: ignore[operator]
    # as a matrix: PyTorch sometimes turns more dimensions into a batch, but not where a gradient is needed
    return F.linear(flatten_rows(x), linear.weight, linear.bias).view(*x.shape[:-1], -1)


def input_gradient(linear: nn.Linear, dy: Tensor) -> Tensor:
    """Return dy W, the input gradient of `product`: (..., out) -> (..., in) in newly allocated memory."""
    if hasattr(linear, "input_gradient"):
        return linear.input_gradient(dy)  # type: ignore[operator]
    return dy @ linear.weight.to(dy.dtype)


def cast_for_autocast(x: Tensor) -> Tensor:
    """Return x in the dtype in which a linear layer computes: the dtype of autocast where that is enabled."""
    kind = x.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))


class FrozenProduct(torch.autograd.Function):
    """`product` without saved tensors: its backward reads the weight from the module and gives it no gradient.

    The weight can therefore be moved, streamed or stored in another form between forward and backward.
    """

    @staticmethod
    def forward(ctx: Any, linear: nn.Linear, x: Tensor) -> Tensor:
        ctx.linear = linear
        replay = current_replay()
        return replay.output(linear, x, lambda: product(linear, x)) if replay else product(linear, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor]:
        return None, input_gradient(ctx.linear, dy)


class TailLinear(nn.Linear):
    """An `nn.Linear` whose output a recomputation can skip or recall (recompute_context.py)."""

    def forward(self, x: Tensor) -> Tensor:
        if current_replay() is None or any(parameter.requires_grad for parameter in self.parameters()):
            return product(self, x)
        return FrozenProduct.apply(self, cast_for_autocast(x))
