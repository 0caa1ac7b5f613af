"""Scaled dot-product attention: by which kernel, and how its result is kept for a block that is run again.

PyTorch has several kernels (backends), and takes the first of a list that can do the shapes, dtype and device at hand.
On Hopper and later the one of cuDNN is the fastest, but it is not first in PyTorch's own list.

Selective recomputation keeps the attention and computes the rest of a block again. What the attention's backward reads
is q, k, v, the output and a number a row and head. q, k and v are three times the output and come cheaply out of the
projection, so they are left out of what is kept: the attention is differentiated by a graph of its own, whose nodes get
q, k and v as they come in the second run. That works with every backend, as it is autograd that says what is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel

from flux2.layers.recompute_context import Replay, current

ENOUGH = 4608  # tokens for which a backend is looked up: those of a picture of 1024 px
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full attention of (B, H, L, head_dim) each; the same shape. In a second run, what the first one kept."""
    replay = None if torch.compiler.is_compiling() else current()
    if replay is None or not replay.keeps_attention:
        return F.scaled_dot_product_attention(q, k, v)
    if replay.again:
        return Recalled.apply(replay.attended, replay.stored, q, k, v)
    assert replay.attended is None, "a block has one attention"
    replay.attended = Attended(replay, q, k, v)
    return replay.stored[replay.attended.output]


# ------------------------------------------------------------------ keeping


class Shelf:
    """Where the graph of an attention leaves, and finds, what its backward reads: inputs and what was put aside."""

    put: Callable[[Tensor], int]
    inputs: Sequence[Tensor] = ()
    stored: Sequence[Tensor] = ()


class Source(torch.autograd.Function):
    """Tensors without a past, for which gradients are wanted. Unlike leaves, they are not held by their graph.

    The first argument requires a gradient, so that the others come to.
    """

    @staticmethod
    def forward(ctx: Any, switch: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.detach() for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise AssertionError("gradients are taken at the outputs of this node, not behind it")


def where(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for tensors that are the same part of the same memory, also for those without any
    (train/planner/step_memory.py).
    """
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride()


class Attended:
    """Computes an attention, and keeps in `replay.stored` what its backward reads, but for q, k and v.

    Attributes:
        output: place of the result in `stored`.
        start, ends: of the graph: where the gradient of the result goes in, and where those of q, k, v come out.
    """

    def __init__(self, replay: Replay, *inputs: Tensor) -> None:
        self.shelf = shelf = Shelf()  # the graph knows only this, or it would hold itself
        known = {where(tensor): i for i, tensor in enumerate(inputs)}

        shelf.put = replay.put

        def pack(tensor: Tensor) -> tuple[bool, int]:
            place = known.get(where(tensor))
            return (True, place) if place is not None else (False, shelf.put(tensor.detach()))

        def unpack(found: tuple[bool, int]) -> Tensor:
            is_input, place = found
            return (shelf.inputs if is_input else shelf.stored)[place]

        with torch.enable_grad(), saved_tensors_hooks(pack, unpack):
            sources = Source.apply(torch.ones((), requires_grad=True), *inputs)
            output = F.scaled_dot_product_attention(*sources)
        self.start, self.ends = get_gradient_edge(output), [get_gradient_edge(source) for source in sources]
        self.output = replay.put(output.detach())
        del shelf.put

    def gradients(self, inputs: Sequence[Tensor], stored: Sequence[Tensor], dy: Tensor) -> tuple[Tensor, ...]:
        """Those of q, k and v, which are given again, for the gradient of the result."""
        self.shelf.inputs, self.shelf.stored = inputs, stored
        try:
            return torch.autograd.grad([self.start], self.ends, [dy], retain_graph=True)
        finally:
            self.shelf.inputs = self.shelf.stored = ()


class Recalled(torch.autograd.Function):
    """The result of an attention as it was kept, with the backward of the attention for these q, k and v."""

    @staticmethod
    def forward(ctx: Any, attended: Attended, stored: Sequence[Tensor], *inputs: Tensor) -> Tensor:
        ctx.attended, ctx.stored = attended, stored
        ctx.save_for_backward(*inputs)
        return stored[attended.output].detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.attended.gradients(ctx.saved_tensors, ctx.stored, dy)


# ------------------------------------------------------------------ backends


def check_backends(given: Any, key: str = "attention") -> None:
    """Raises ValueError unless `given` is None or a list of names in `BACKENDS`; `key` is the setting's name."""
    if given is None:
        return
    known = isinstance(given, list | tuple) and given and all(name in BACKENDS for name in given)
    if not known or len(set(given)) < len(given):
        raise ValueError(
            f"{key}={given!r} must be a list of attention backends, best first, out of {', '.join(BACKENDS)}; "
            "or null, which leaves the choice to this program"
        )


def preferred_backends(given: Sequence[str] | None, device: torch.device) -> tuple[str, ...] | None:
    """The backends to try on `device`, best first; None is PyTorch's own order.

    Without a wish that of cuDNN comes first where it is the fastest, on Hopper and later (compute capability 9).
    """
    if given is not None:
        return tuple(given)
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return tuple(BACKENDS) if hopper else None


def use_backends(backends: Sequence[str] | None) -> AbstractContextManager[Any]:
    """Within this context attention is computed by the first of `backends` that can; by PyTorch's choice for None.

    On a CPU PyTorch has flash and math, and takes flash, wherever in the list, if it can.
    """
    if backends is None:
        return nullcontext()
    return sdpa_kernel([BACKENDS[name] for name in backends], set_priority=True)


def chosen_backend(
    backends: Sequence[str] | None, heads: int, head_dim: int, tokens: int, device: torch.device, dtype: torch.dtype
) -> str:
    """The name of the backend that computes attention of these shapes.

    Raises:
        ValueError: none of `backends` can.
    """
    tokens = min(tokens, ENOUGH)  # more are computed by the same, and would be memory for nothing
    q = torch.zeros(1, heads, tokens, head_dim, device=device, dtype=dtype, requires_grad=True)
    with use_backends(backends):
        try:
            choice = torch._fused_sdp_choice(q, q, q)
        except RuntimeError:  # there is none
            choice = SDPBackend.ERROR.value
    for name, backend in BACKENDS.items():
        if choice == backend.value:
            return name
    raise ValueError(
        f"memory.attention={list(backends or [])} names no backend that can compute attention on {device} in {dtype}; "
        "add math, which always can, or give null"
    )
