"""What lies between the matrix products, in one pass over memory each: launches of the kernels in triton_kernels.py.

PyTorch runs a norm, a modulation, a rotation or a quantization as several operations, and each of them reads and writes
all of its tensor. A `FusedModule` has the formula in PyTorch and, for a GPU, a function of this file next to it.

    modulated_norm(x, shift, scale)    (1 + scale) * norm(x) + shift            keeps x
    swiglu(x)                          silu(gate) * value                       keeps x
    project_heads(streams, ...)        q and k with norm and rotation, v        keeps the output of the projection
    quantize_rows(x, before, dtype)    values in 8 bits and one scale per row

Gradients are those of the activations: what modulates or weighs must be frozen (`FusedModule.fuses`).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 1024  # columns of a row that one program of `swiglu` computes
ROW_BLOCK = 4096  # columns that a program of `quantized_rows` reads at once
HEADS = 8  # heads that one program of `heads` computes


def runs_on_gpu(x: Tensor) -> bool:
    return x.is_cuda


class FusedModule:
    """Base of modules that have Triton kernels in addition to their PyTorch operations.

    Attributes:
        kernels: Whether a GPU uses them; flux2/memory/kernels.py sets it.
    """

    kernels = False

    def fuses(self, x: Tensor, *frozen: Tensor) -> bool:
        """Return whether x is computed by kernels: on a GPU, uncompiled, and with no gradient for `frozen`."""
        if not self.kernels or not runs_on_gpu(x) or torch.compiler.is_compiling():
            return False
        return not any(tensor.requires_grad for tensor in frozen)


def launch(name: str, grid: Sequence[int], *args: Any, num_warps: int = 4, **sizes: Any) -> None:
    """Run a kernel of triton_kernels.py on the device of the first argument."""
    from flux2.layers import triton_kernels  # Triton comes with PyTorch only for GPUs

    with torch.cuda.device_of(args[0]):
        getattr(triton_kernels, name)[tuple(grid)](*args, num_warps=num_warps, **sizes)


def power_of_two(size: int) -> int:
    """Return the smallest power of two that is at least `size`."""
    return 1 << (size - 1).bit_length()


def with_adjacent_columns(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def rows_of(x: Tensor) -> Tensor:
    """Return x (..., W) as (rows, W) with adjacent columns; a copy only where the strides of x require one."""
    return with_adjacent_columns(x).flatten(0, -2)


class FusedModulatedNorm(torch.autograd.Function):
    """`modulated_norm`; the backward computes the norm again from x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
        # PyTorch's norm is in float32 under autocast, and so is the modulation; the next product casts it
        autocasts = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocasts else x.dtype
        batch, tokens, width = x.shape
        x = with_adjacent_columns(x)
        shift, scale = (with_adjacent_columns(one).expand(batch, 1, width) for one in (shift, scale))
        out = torch.empty(x.shape, dtype=dtype, device=x.device)
        strides = x.stride(0), x.stride(1), shift.stride(0), scale.stride(0)
        ctx.sizes = {"ROUNDS": not autocasts, "WIDTH": power_of_two(width), "num_warps": 8}
        launch("modulated_norm", (batch * tokens,), x, shift, scale, out, tokens, *strides, width, eps, **ctx.sizes)
        ctx.eps = eps
        ctx.save_for_backward(x, scale)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        x, scale = ctx.saved_tensors
        batch, tokens, width = x.shape
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        rest = tokens, x.stride(0), x.stride(1), scale.stride(0), width, ctx.eps
        launch("modulated_norm_gradient", (batch * tokens,), x, scale, dy.contiguous(), dx, *rest, **ctx.sizes)
        return dx, None, None, None


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """Return (1 + scale) * norm(x) + shift, with a layer norm without weights over the width.

    Args:
        x: (B, L, D).
        shift, scale: (B, 1, D) or (1, 1, D), without gradient.
        eps: What the norm adds to the variance.

    Returns:
        (B, L, D) in the dtype of x, or of autocast.
    """
    return FusedModulatedNorm.apply(x, shift, scale, eps)


def compute_swiglu(x: Tensor) -> Tensor:
    rows, width = rows_of(x), x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], width)
    launch("swiglu", (len(rows), -(-width // BLOCK)), rows, out, rows.stride(0), width, BLOCK=BLOCK)
    return out


def compute_swiglu_gradient(x: Tensor, dy: Tensor, dx: Tensor) -> None:
    """Write the gradient of x (..., 2 * M) into dx, whose rows may be part of longer ones."""
    rows, gradients, width = rows_of(x), rows_of(dy), x.shape[-1] // 2
    target = dx.view(-1, dx.shape[-1])
    strides = rows.stride(0), gradients.stride(0), target.stride(0)
    grid = len(rows), -(-width // BLOCK)
    launch("swiglu_gradient", grid, rows, gradients, target, *strides, width, BLOCK=BLOCK)


class FusedSwiglu(torch.autograd.Function):
    """`swiglu`; keeps its input and nothing else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return compute_swiglu(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        compute_swiglu_gradient(x, dy, dx)
        return dx


def swiglu(x: Tensor) -> Tensor:
    """Return silu of the first half of the columns times the second half: (..., 2 * M) -> (..., M)."""
    return FusedSwiglu.apply(x)


class FusedHeads(torch.autograd.Function):
    """`project_heads`; keeps the projections, from which the backward computes the norms again.

    `apply` takes `mlp`, eps, cos, sin, and of each stream its projection and the weights of q and k.
    """

    @staticmethod
    def forward(ctx: Any, mlp: int, eps: float, cos: Tensor, sin: Tensor, *streams: Tensor) -> tuple[Tensor, ...]:
        projections = [with_adjacent_columns(x) for x in streams[::3]]
        first, head_dim = projections[0], streams[1].numel()
        batch, total, hidden = len(first), sum(x.shape[1] for x in projections), (first.shape[-1] - mlp) // 3
        count = hidden // head_dim
        joins = len(projections) > 1  # v of a single stream need not be copied
        q, k, *rest = (first.new_empty(batch, total, count, head_dim) for _ in range(3 if joins else 2))
        v = rest[0] if joins else first[..., 2 * hidden : 3 * hidden].unflatten(-1, (count, head_dim))
        ctx.blocks = {"HEADS": HEADS, "PAIRS": power_of_two(head_dim // 2)}
        start = 0
        for x, *weights in zip(projections, streams[1::3], streams[2::3], strict=True):
            tokens = x.shape[1]
            parts = 3 if joins else 2
            grid = batch * tokens, -(-count // HEADS), parts
            sizes = tokens, start, count, x.stride(0), x.stride(1), q.stride(0), head_dim, eps
            launch("heads", grid, x[..., : parts * hidden], q, k, v, *weights, cos, sin, *sizes, **ctx.blocks)
            start += tokens
        ctx.hidden, ctx.eps = hidden, eps
        ctx.save_for_backward(cos, sin, *streams)
        outputs = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        return (*outputs, compute_swiglu(first[..., 3 * hidden :])) if mlp else outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin, *streams = ctx.saved_tensors
        gradients = tuple(with_adjacent_columns(gradient) for gradient in gradients)
        head_dim = streams[1].numel()
        count = ctx.hidden // head_dim
        strides = [stride for gradient in gradients[:3] for stride in gradient.stride()[:3]]
        results: list[Tensor | None] = []
        start = 0
        for x, *weights in zip(streams[::3], streams[1::3], streams[2::3], strict=True):
            x = with_adjacent_columns(x)
            dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
            batch, tokens, _ = x.shape
            sizes = tokens, start, count, x.stride(0), x.stride(1), dx.stride(0), dx.stride(1), *strides, head_dim
            grid = batch * tokens, -(-count // HEADS), 3
            arguments = x[..., : 2 * ctx.hidden], *weights, cos, sin, *gradients[:3], dx[..., : 3 * ctx.hidden], *sizes
            launch("heads_gradient", grid, *arguments, ctx.eps, **ctx.blocks)
            for dy in gradients[3:]:
                compute_swiglu_gradient(x[..., 3 * ctx.hidden :], dy, dx[..., 3 * ctx.hidden :])
            results += [dx, None, None]
            start += tokens
        return None, None, None, None, *results


def project_heads(
    eps: float, cos: Tensor, sin: Tensor, streams: Sequence[tuple[Tensor, Tensor, Tensor]], mlp: int = 0
) -> tuple[Tensor, ...]:
    """Return q and k, normalized and rotated, and v, of all streams one after the other: each (B, H, L, head_dim).

    Args:
        eps: What the norms add to the mean square.
        cos, sin: (1, 1, L, head_dim / 2) in float32, of the angles by which adjacent pairs are rotated.
        streams: For each stream the projection [q, k, v] (B, L_i, 3 * H * head_dim), and the weights of the norms of q
            and of k (head_dim,), without gradient.
        mlp: Number of further columns in the projection of a single stream; their `swiglu` (B, L, mlp / 2) is returned
            last.
    """
    return FusedHeads.apply(mlp, eps, cos, sin, *(tensor for stream in streams for tensor in stream))


def quantize_rows(x: Tensor, before: Tensor | None, dtype: torch.dtype, smallest: float) -> tuple[Tensor, Tensor]:
    """(M, K) -> values (M, K) in int8 or e4m3 and scales (M, 1) in float32: x * before = scales * values.

    Args:
        x: Float rows.
        before: float32 factors of the columns of x (K,). For int8, the product is rounded to the dtype of x.
        dtype: torch.int8 or torch.float8_e4m3fn.
        smallest: The smallest scale.
    """
    x = with_adjacent_columns(x)
    values, scales = torch.empty(x.shape, dtype=dtype, device=x.device), x.new_empty(len(x), 1, dtype=torch.float32)
    integers = dtype == torch.int8
    inverse = 1.0 / (127.0 if integers else 448.0)
    arguments = x, x if before is None else before, values, scales, x.stride(0), x.shape[1], inverse, smallest
    block = min(ROW_BLOCK, power_of_two(x.shape[1]))
    options = {"INTEGERS": integers, "HAS_BEFORE": before is not None, "BLOCK": block}
    options["BLOCKS"] = -(-x.shape[1] // block)
    launch("quantized_rows", (len(x),), *arguments, num_warps=8, **options)
    return values, scales
