"""Products with frozen weights: what is kept for the backward is as little as can be, and no weight gradient is formed.

A frozen linear may hold its weight in any form (a plain float matrix, FP8, NF4), so what training needs of it is two
products, with W (out, in):

    product(linear, x)          = x W^T     the forward
    input_gradient(linear, dy)  = dy W      the backward

A module that stores its weight in a form of its own has methods of these names; a plain `nn.Linear` needs none.

`fuse_lora` makes the adapter a part of the same step. PEFT computes y = W x + s B A dropout(x) as five operations with
five results, and autograd keeps what each of them needs. Fused, with h = A x of `rank` numbers a token,

    y = x W^T,  y += s h B^T        dX = dy W + (s dy B) A        dA = (s dy B)^T x        dB = s dy^T h

only x and h are kept. PEFT stays the library: names, files, merging and every unusual kind of layer are its own, and
what is not a plain LoRA runs its forward (`FusedLora.plain_adapter` says what is plain, at every call).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from flux2.layers.frozen_linear import TailLinear, autocasted, input_gradient, product, rows
from flux2.layers.recompute_context import current

INITIAL = "_initial"  # ends the name of the adapter that takes a PiSSA's beginning off again (flux2/adapters/tuners.py)


class LoraProduct(torch.autograd.Function):
    """`product` plus a low-rank update: (..., in) -> (..., out).

    `apply` takes the frozen linear, x (..., in), A (rank, in), B (out, rank) and the scale of the update. A and B are
    used in the dtype of x, and their gradients come back in their own.
    """

    @staticmethod
    def forward(ctx: Any, linear: nn.Linear, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        ctx.linear, ctx.scale = linear, scale
        h = F.linear(rows(x), a.to(x.dtype))
        replay = current()
        y = replay.recall(linear, x) if replay else None
        if y is None:
            y = product(linear, x)
            y.view(-1, y.shape[-1]).addmm_(h, b.to(y.dtype).t(), alpha=scale)
            if replay:
                replay.remember(linear, y)
        kept = ctx.needs_input_grad
        ctx.save_for_backward(x if kept[2] else None, h if kept[3] else None, a, b)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, h, a, b = ctx.saved_tensors
        _, needs_x, needs_a, needs_b, _ = ctx.needs_input_grad
        dy_rows = rows(dy)
        dx = da = db = None
        if needs_x or needs_a:
            dh = dy_rows @ b.to(dy.dtype)
            if ctx.scale != 1:
                dh *= ctx.scale
        if needs_a:
            da = (dh.t() @ rows(x)).to(a.dtype)
        if needs_b:
            db = (dy_rows.t() @ h).to(b.dtype)
            if ctx.scale != 1:
                db *= ctx.scale
        if needs_x:
            dx = input_gradient(ctx.linear, dy)
            dx.view(-1, dx.shape[-1]).addmm_(dh, a.to(dx.dtype))
        return None, dx, da, db, None


def subtract_initial(a: Tensor, b: Tensor, a0: Tensor, b0: Tensor) -> tuple[Tensor, Tensor]:
    """B A - B0 A0 as one pair of twice the rank, (B - B0) A + B0 (A - A0), in which nothing large cancels."""
    return torch.cat([a, a - a0]), torch.cat([b - b0, b0], dim=1)


class FusedLora(lora.Linear):
    """PEFT's LoRA layer, computed by `LoraProduct` where it is plain. Made by `fuse_lora` from PEFT's own."""

    def plain_adapter(self) -> str | None:
        """The active adapter, if PEFT's forward for it is no more than base + scale * B A x; else None.

        It is not if adapters are disabled or merged, none or several are active (but for a PiSSA and its beginning),
        dropout acts, the adapter is a variant (DoRA and others) or has a bias, or the base is trained or computes in a
        way of its own.
        """
        if self.disable_adapters or self.merged or self.fan_in_fan_out:
            return None
        active = [name for name in self.active_adapters if name in self.lora_A]
        if not active or active[1:] not in ([], [active[0] + INITIAL]):
            return None
        name = active[0]
        dropout = self.lora_dropout[name]
        acts = not isinstance(dropout, nn.Identity) and dropout.training
        if acts or name in self.lora_variant or self.lora_bias[name]:
            return None
        base = self.base_layer
        known = hasattr(base, "product") or type(base).forward in (nn.Linear.forward, TailLinear.forward)
        return name if known and not any(parameter.requires_grad for parameter in base.parameters()) else None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = None if args or kwargs else self.plain_adapter()
        if name is None:
            return super().forward(x, *args, **kwargs)
        a, b, scale = self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]
        if name + INITIAL in self.active_adapters:
            a, b = subtract_initial(a, b, self.lora_A[name + INITIAL].weight, self.lora_B[name + INITIAL].weight)
        x = autocasted(x)
        if torch.compiler.is_compiling():  # which fuses by itself, and chooses what is kept
            return self.base_layer(x) + F.linear(F.linear(x, a.to(x.dtype)), b.to(x.dtype)) * scale
        return LoraProduct.apply(self.base_layer, x, a, b, scale)


def fuse_lora(model: nn.Module) -> None:
    """Let PEFT's LoRA layers in `model` compute base and update in one step, in place.

    Their names, parameters and files stay as they are. Where an adapter is not a plain LoRA, PEFT's own forward runs.
    """
    for module in model.modules():
        if type(module) is lora.Linear:
            module.__class__ = FusedLora
