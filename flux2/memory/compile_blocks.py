"""Blocks compiled by `torch.compile`, each together with its recompute policy.

A compiler that sees a block with its recomputation decides what the backward needs: it leaves out the last linears,
whose output nothing reads, and fuses elementwise operations with their neighbors. Blocks of a kind share a graph,
whatever their weights. Each kind of block and each shape of tokens (bucket, number of references) gets a graph, with
and without gradients, because fixed sizes give faster code. The adapter's scale is a constant of a graph too, and a
slider trains two. PyTorch stops compiling after `recompile_limit` graphs, which is raised to the number that a run
needs.

Adapters are compiled as plain operations (`FusedLora.forward`), and so are quantized layers, with the backward of
`FrozenProduct`. LoRA dropout draws other random numbers than without compilation.

If the compiler cannot trace a layer, PyTorch runs the whole block uncompiled and only warns about it; `check_compiles`
therefore rejects such layers. If it fails, for example because there is no C++ compiler or no Triton, blocks run
uncompiled from then on, after one warning.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from peft.tuners.loha import LoHaLayer
from peft.tuners.lokr import LoKrLayer
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from flux2.layers.attention import use_backends
from flux2.quantization.base import QuantizedLinear

log = logging.getLogger(__name__)
BLOCK_KINDS = 2
MODES = 20  # with or without gradients, input gradients, the adapter at each of its scales, streaming
# the attention kernels that are one operation; the backend `math` has several, which are recomputed
ATTENTION_OPERATIONS = [
    getattr(torch.ops.aten, f"_scaled_dot_product_{name}").default
    for name in ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
]


def check_compiles(model: nn.Module) -> None:
    """Raise ValueError if `model` has an adapter with which PyTorch would not compile its blocks."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and len(layer.lora_magnitude_vector):
            what, instead = "a DoRA (adapter=dora)", "choose another type of adapter"
        elif isinstance(layer, LoHaLayer | LoKrLayer) and isinstance(layer.get_base_layer(), QuantizedLinear):
            kind = "LoHa (adapter=loha)" if isinstance(layer, LoHaLayer) else "LoKr (adapter=lokr)"
            what, instead = f"a {kind} on a quantized base", "choose precision=bf16 or another type of adapter"
        elif getattr(layer, "rank_schedule", None) is not None:
            what, instead = "a T-LoRA (adapter=tlora), which masks by timestep", "choose another type of adapter"
        else:
            continue
        raise ValueError(
            f"memory.compile=true does not work with {what}, whose layers PyTorch cannot compile: set "
            f"memory.compile=false, or {instead}"
        )


def run_kept(backends: Sequence[str] | None, block: nn.Module, *args: Any) -> Any:
    with use_backends(backends):
        return block(*args)


def run_recomputed(backends: Sequence[str] | None, keeps_attention: bool, block: nn.Module, *args: Any) -> Any:
    with use_backends(backends):
        if not torch.is_grad_enabled():
            return block(*args)
        # Without a context, PyTorch 2.11 keeps what an autograd Function computes, such as every frozen product.
        contexts = partial(create_selective_checkpoint_contexts, ATTENTION_OPERATIONS if keeps_attention else [])
        return checkpoint(block, *args, use_reentrant=False, context_fn=contexts)


class Compiled:
    """Functions that are compiled until the compiler fails at any of them, and then run as they are."""

    def __init__(self, backend: str | Callable[..., Any]) -> None:
        self.backend, self.works = backend, True

    def __call__(self, run: Callable[..., Any], uncompiled: Callable[..., Any], *bound: Any) -> Callable[..., Any]:
        """Return `run` compiled, with its first arguments bound; from the first failure on it is `uncompiled`."""
        compiled = torch.compile(run, dynamic=False, backend=self.backend)

        def either(*args: Any) -> Any:
            if self.works:
                try:
                    return compiled(*bound, *args)
                except torch._dynamo.exc.TorchDynamoException as error:
                    self.works = False
                    log.warning("memory.compile: blocks run uncompiled, because that failed: %s", compiler_error(error))
            return uncompiled(*args)

        return either


def compiler_error(error: BaseException) -> str:
    """Return the first line of an error of PyTorch's compiler; empty for any other error."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is None or not isinstance(error, dynamo.exc.TorchDynamoException):
        return ""
    cause = getattr(error, "inner_exception", error)
    return f"{type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]:.300}"


def compile_runners(
    backends: Sequence[str] | None,
    shapes: int,
    uncompiled: Sequence[Callable[..., Any]],
    backend: str | Callable[..., Any] = "inductor",
) -> tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]:
    """Return compiled functions that run a block: one keeps everything, one recomputes, one keeps the attention.

    `shapes` is the expected number of different token shapes, `uncompiled` are three such functions for a machine on
    which the compiler fails; the other arguments are those of `set_policy`.
    """
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, BLOCK_KINDS * MODES * shapes)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 4 * limits.recompile_limit)
    compiled, (keep, recompute, selective) = Compiled(backend), uncompiled
    return (
        compiled(run_kept, keep, backends),
        compiled(run_recomputed, recompute, backends, False),
        compiled(run_recomputed, selective, backends, True),
    )
