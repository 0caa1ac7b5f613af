"""LoRA computed in one step with its frozen base layer.

PEFT computes y = W x + s B A dropout(x) as five operations with five results, and autograd keeps what each of them
needs. Fused, with h = A x (`rank` numbers per token),

    y = x W^T,  y += s h B^T        dX = dy W + (s dy B) A        dA = (s dy B)^T x        dB = s dy^T h

only x and h are kept. PEFT remains the library: names, files, merging and every special kind of layer are its own, and
any adapter that is not a plain LoRA runs PEFT's forward (`FusedLora.plain_adapter` decides at every call).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from flux2.layers.frozen_linear import TailLinear, cast_for_autocast, flatten_rows, input_gradient, product
from flux2.layers.rank_schedule import RankSchedule
from flux2.layers.recompute_context import current_replay

INITIAL = "_initial"  # suffix of the adapter that subtracts the initial PiSSA update (flux2/adapters/tuners.py)
FROZEN = "_frozen"  # name of a saved LoRA that is active next to the trained one (flux2/adapters/warm_start.py)
Update = tuple[Tensor, Tensor, float]  # A (rank, in), B (out, rank), and the scale of B A


class LoraProduct(torch.autograd.Function):
    """`product` plus a low-rank update: (..., in) -> (..., out).

    `apply` takes the frozen linear, x (..., in), A (rank, in), B (out, rank), the scale of the update, None or a mask
    of the active directions of each sample, (B, rank) for x (B, ..., in), and further updates that are not trained, of
    which nothing is kept. A and B are used in the dtype of x; their gradients have their own dtypes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        linear: nn.Linear,
        x: Tensor,
        a: Tensor,
        b: Tensor,
        scale: float,
        mask: Tensor | None,
        frozen: Sequence[Update],
    ) -> Tensor:
        ctx.linear, ctx.scale, ctx.mask, ctx.frozen = linear, scale, mask, frozen
        h = mask_rows(F.linear(flatten_rows(x), a.to(x.dtype)), mask)  # (tokens, rank)

        def compute() -> Tensor:
            y = product(linear, x)
            rows = y.view(-1, y.shape[-1])
            rows.addmm_(h, b.to(y.dtype).t(), alpha=scale)
            for a0, b0, scale0 in frozen:
                rows.addmm_(F.linear(flatten_rows(x), a0.to(x.dtype)), b0.to(y.dtype).t(), alpha=scale0)
            return y

        replay = current_replay()
        y = replay.output(linear, x, compute) if replay else compute()
        _, _, needs_a, needs_b, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_a else None, h if needs_b else None, a, b)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, h, a, b = ctx.saved_tensors
        _, needs_x, needs_a, needs_b, *_ = ctx.needs_input_grad
        dy_rows = flatten_rows(dy)
        dx = da = db = None
        if needs_x or needs_a:
            dh = dy_rows @ b.to(dy.dtype)
            if ctx.scale != 1:
                dh *= ctx.scale
            dh = mask_rows(dh, ctx.mask)
        if needs_a:
            da = (dh.t() @ flatten_rows(x)).to(a.dtype)
        if needs_b:
            # on a CPU, products with few rows are faster than those with few columns
            db = (h.t() @ dy_rows).t().contiguous() if dy.device.type == "cpu" else dy_rows.t() @ h
            db = db.to(b.dtype)
            if ctx.scale != 1:
                db *= ctx.scale
        if needs_x:
            dx = input_gradient(ctx.linear, dy)
            dx_rows = dx.view(-1, dx.shape[-1]).addmm_(dh, a.to(dx.dtype))
            for a0, b0, scale0 in ctx.frozen:
                dx_rows.addmm_(dy_rows @ b0.to(dy.dtype), a0.to(dx.dtype), alpha=scale0)
        return None, dx, da, db, None, None, None


def mask_rows(h: Tensor, mask: Tensor | None) -> Tensor:
    """Return `h` (tokens, rank), in place, with the rows of each sample multiplied by its row of `mask` (B, rank)."""
    if mask is not None:
        h.view(len(mask), -1, h.shape[1]).mul_(mask[:, None].to(h.dtype))
    return h


def subtract_initial(a: Tensor, b: Tensor, a0: Tensor, b0: Tensor) -> tuple[Tensor, Tensor]:
    """Return B A - B0 A0 as one pair of twice the rank: (B - B0) A + B0 (A - A0), without large canceling terms."""
    return torch.cat([a, a - a0]), torch.cat([b - b0, b0], dim=1)


class FusedLora(lora.Linear):
    """PEFT's LoRA layer, computed by `LoraProduct` where the adapter is plain. `fuse_lora` converts PEFT's layers."""

    rank_schedule: RankSchedule | None = None  # of a T-LoRA

    def plain_adapter(self) -> str | None:
        """Return the active adapter if PEFT's forward for it is just base + scale * B A x, else None.

        None if: no or several adapters are active (except a PiSSA with its initial update, and a LoRA next to a frozen
        one), dropout is applied, the adapter is a variant (DoRA and others) or has a bias, or the base is trained or
        has a forward of its own.
        """
        if self.disable_adapters or self.merged or self.fan_in_fan_out:
            return None
        active = [name for name in self.active_adapters if name in self.lora_A]
        if not active or active[1:] not in ([], [active[0] + INITIAL], [FROZEN]):
            return None
        name, dropout = active[0], self.lora_dropout[active[0]]
        drops = not isinstance(dropout, nn.Identity) and dropout.training
        if drops or name in self.lora_variant or self.lora_bias[name]:
            return None
        base = self.base_layer
        known = hasattr(base, "product") or type(base).forward in (nn.Linear.forward, TailLinear.forward)
        return name if known and not any(parameter.requires_grad for parameter in base.parameters()) else None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = None if args or kwargs else self.plain_adapter()
        if name is None:
            return super().forward(x, *args, **kwargs)
        a, b, scale = self.update_of(name)
        frozen = [self.update_of(FROZEN)] if name != FROZEN and FROZEN in self.active_adapters else []
        if name + INITIAL in self.active_adapters:
            a, b = subtract_initial(a, b, self.lora_A[name + INITIAL].weight, self.lora_B[name + INITIAL].weight)
        x = cast_for_autocast(x)
        if torch.compiler.is_compiling():  # the compiler fuses these operations and chooses what is kept
            y = self.base_layer(x)
            for down, up, factor in [(a, b, scale), *frozen]:
                y = y + F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype)) * factor
            return y
        mask = None if self.rank_schedule is None else self.rank_schedule.mask(len(a), x)
        return LoraProduct.apply(self.base_layer, x, a, b, scale, mask, frozen)

    def update_of(self, name: str) -> Update:
        """Return the weights of the adapter `name`, and their scale."""
        return self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name]


def fuse_lora(model: nn.Module) -> None:
    """Turn PEFT's LoRA layers in `model` into `FusedLora`, in place; names, parameters and files do not change."""
    for module in model.modules():
        if type(module) is lora.Linear:
            module.__class__ = FusedLora
