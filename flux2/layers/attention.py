"""Scaled dot-product attention: the choice of its kernel, and how a recomputed block gets its result back.

PyTorch has several kernels (backends) and takes the first of a list that supports the shapes, dtype and device.
cuDNN's kernel is the fastest on Hopper and later, but it is not the first in PyTorch's own list.

Selective recomputation keeps the attention and recomputes the rest of a block. The attention's backward reads q, k, v,
the output and one number per row and head. q, k and v take three times the memory of the output and are cheap to
recompute from the projection, so they are not kept: the attention has an autograd graph of its own, whose nodes receive
q, k and v from the second run. This works with every backend, because autograd itself says what the backward needs.
"""

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel

from flux2.layers.recompute_context import Replay, current_replay

PROBE_TOKENS = 4608  # sequence length at which a backend is looked up: that of a 1024 px image
TRIED_TOKENS, TRIED_HEAD_DIM = 512, 128  # of the attention with which cuDNN is tried
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return full attention of three (B, H, L, head_dim), in the same shape; a second run recalls a kept result."""
    replay = current_replay()
    if replay is None or not replay.keeps_attention:
        return attend(q, k, v)
    if replay.is_second_run:
        return RecalledAttention.apply(replay.attention, replay.saved, q, k, v)
    assert replay.attention is None, "a block has one attention"
    replay.attention = AttentionRecord(replay, q, k, v)
    return replay.saved[replay.attention.output]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return full attention of three (B, H, L, head_dim), in the same shape and dtype."""
    if not computes_in_float32(q.device):
        return F.scaled_dot_product_attention(q, k, v)
    with torch.autocast(q.device.type, enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(q.dtype)


def computes_in_float32(device: torch.device) -> bool:
    """Return whether attention is computed in float32: on GPUs below compute capability 8.0.

    Their flash and memory-efficient kernels take float16 and float32. PyTorch would compute bfloat16 with its math
    backend, whose memory grows with the square of the tokens; float16 would overflow without loss scaling.
    """
    return device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)


class DetachedInputs(torch.autograd.Function):
    """Inputs without history that receive gradients. Unlike leaves, their graph does not keep them alive.

    The first argument requires a gradient, which makes the outputs require one too.
    """

    @staticmethod
    def forward(ctx: Any, switch: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.detach() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise AssertionError("gradients are taken at the outputs of this node, not behind it")


def memory_key(tensor: Tensor) -> tuple[Any, ...]:
    """Return equal keys for tensors that are the same view of the same storage, also on the meta device."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride()


class AttentionRecord:
    """An attention whose backward can run later: computes it and saves in `replay` what that reads, except q, k, v.

    Attributes:
        output: Index of the result in `replay.saved`.
        start: Edge of the graph that takes the gradient of the result.
        ends: Edges of the graph that give the gradients of q, k and v.
    """

    def __init__(self, replay: Replay, *inputs: Tensor) -> None:
        # what the graph reads in its backward; the graph refers to this and not to `self`, or it would own itself
        self.values = values = SimpleNamespace(inputs=(), saved=(), save=replay.save)
        input_indices = {memory_key(tensor): i for i, tensor in enumerate(inputs)}

        def pack(tensor: Tensor) -> tuple[str, int]:
            index = input_indices.get(memory_key(tensor))
            return ("saved", values.save(tensor.detach())) if index is None else ("inputs", index)

        def unpack(packed: tuple[str, int]) -> Tensor:
            name, index = packed
            return getattr(values, name)[index]

        with torch.enable_grad(), saved_tensors_hooks(pack, unpack):
            detached = DetachedInputs.apply(torch.ones((), requires_grad=True), *inputs)
            output = attend(*detached)
        self.start, self.ends = get_gradient_edge(output), [get_gradient_edge(tensor) for tensor in detached]
        self.output = replay.save(output.detach())
        del values.save


class RecalledAttention(torch.autograd.Function):
    """The saved result of an attention, with the backward of that attention for the q, k and v of this run."""

    @staticmethod
    def forward(ctx: Any, record: AttentionRecord, saved: Sequence[Tensor], *inputs: Tensor) -> Tensor:
        ctx.record, ctx.saved = record, saved
        ctx.save_for_backward(*inputs)
        return saved[record.output].detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        record, values = ctx.record, ctx.record.values
        values.inputs, values.saved = ctx.saved_tensors, ctx.saved
        try:
            return None, None, *torch.autograd.grad([record.start], record.ends, [dy], retain_graph=True)
        finally:
            values.inputs = values.saved = ()


def check_backends(names: Any, key: str = "attention") -> None:
    """Raise ValueError unless `names` is None or a list of names in `BACKENDS`; `key` is the setting's name."""
    if names is None:
        return
    known = isinstance(names, list | tuple) and names and all(isinstance(n, str) and n in BACKENDS for n in names)
    if not known or len(set(names)) < len(names):
        raise ValueError(
            f"{key}={names!r} must be a list of attention backends, best first, out of {', '.join(BACKENDS)}; "
            "or null for the default choice"
        )


def preferred_backends(names: Sequence[str] | None, device: torch.device) -> tuple[str, ...] | None:
    """Return the backends to try on `device`, best first; None stands for PyTorch's own order.

    By default cuDNN comes first where it is the fastest: on Hopper and later (compute capability 9). It is left out,
    with a warning, where it cannot compute; ValueError is raised if `names` has no other.
    """
    if names is None:
        hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
        names = tuple(BACKENDS) if hopper else None
    if names is None or "cudnn" not in names or device.type != "cuda":
        return None if names is None else tuple(names)
    failure = cudnn_failure(device)
    others = tuple(name for name in names if name != "cudnn")
    if failure is None:
        return tuple(names)
    if not others:
        raise ValueError(f"memory.attention={list(names)}: cuDNN cannot compute attention here ({failure}). Give null")
    warnings.warn(f"cuDNN cannot compute attention here ({failure}); {', '.join(others)} are tried", stacklevel=2)
    return others


@cache
def cudnn_failure(device: torch.device) -> str | None:
    """Return why a small attention with backward fails with cuDNN, or None if its result is flash attention's.

    That PyTorch would choose cuDNN for some shapes does not mean that cuDNN has a kernel for them.
    """
    inputs = torch.randn(3, 1, 2, TRIED_TOKENS, TRIED_HEAD_DIM, device=device, dtype=torch.bfloat16)
    results: list[list[Tensor]] = []
    for backend in ("cudnn", "flash"):
        leaves = [part.detach().requires_grad_() for part in inputs]
        try:
            with sdpa_kernel(BACKENDS[backend]):
                out = F.scaled_dot_product_attention(*leaves)
                results.append([out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))])
        except RuntimeError as error:
            return str(error).strip().splitlines()[0] if backend == "cudnn" else None  # nothing to compare with
    difference = torch.stack([(ours - theirs).float().norm() for ours, theirs in zip(*results, strict=True)])
    size = torch.stack([theirs.float().norm() for theirs in results[1]])
    close = bool((difference <= 0.02 * size + 1e-3).all())
    return None if close else "its result differs from flash attention's"


def use_backends(names: Sequence[str] | None) -> AbstractContextManager[Any]:
    """Context manager in which the first supported backend of `names` computes attention; None changes nothing.

    A CPU has flash and math. PyTorch takes flash there if it supports the shapes, wherever it is in the list.
    """
    if names is None:
        return nullcontext()
    return sdpa_kernel([BACKENDS[name] for name in names], set_priority=True)


def chosen_backend(
    names: Sequence[str] | None, heads: int, head_dim: int, tokens: int, device: torch.device, dtype: torch.dtype
) -> str:
    """Return the name of the backend that computes attention of these shapes.

    Raise ValueError if none of the backends `names` supports them.
    """
    dtype = torch.float32 if computes_in_float32(device) else dtype
    tokens = min(tokens, PROBE_TOKENS)  # the choice does not change beyond that, and the probe stays small
    q = torch.zeros(1, heads, tokens, head_dim, device=device, dtype=dtype, requires_grad=True)
    with use_backends(names):
        try:
            choice = torch._fused_sdp_choice(q, q, q)
        except RuntimeError:  # no backend supports the shapes
            choice = SDPBackend.ERROR.value
    for name, backend in BACKENDS.items():
        if choice == backend.value:
            return name
    raise ValueError(
        f"memory.attention={list(names or [])} contains no backend that can compute attention on {device} in {dtype}; "
        "add math, which always can, or give null"
    )
