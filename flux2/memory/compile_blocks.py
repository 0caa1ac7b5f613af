"""Blocks through `torch.compile`, each with its recompute policy inside.

A compiler that sees a block together with its recomputation decides what of it the backward needs: the last linears are
not among it, as nothing reads their output, and elementwise work is fused with what surrounds it. Blocks of a kind
share a graph, whatever their weights; a graph is made for each kind of block and each shape of tokens (bucket, number
of references), with or without gradients, since fixed sizes give the faster code. PyTorch stops compiling after a
number of graphs, `recompile_limit`, which is raised to what a run needs.

The adapter is compiled as plain operations (`FusedLora.forward`), and so is what a quantized layer computes, with the
backward of `FrozenProduct`. LoRA dropout draws other random numbers than without compilation.

Of a layer that the compiler cannot follow PyTorch runs the whole block as it is, and says so in warnings alone; so such
layers are refused (`check_compiles`).
"""

from __future__ import annotations

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

KINDS = 2  # of blocks
MODES = 10  # with gradients (of the input too, or not) and without, with the adapter or not, streaming or not


def check_compiles(model: nn.Module) -> None:
    """Raises ValueError if `model` carries an adapter with which blocks would not be compiled."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and len(layer.lora_magnitude_vector):
            what, instead = "a DoRA (adapter=dora)", "take another type of adapter"
        elif isinstance(layer, LoHaLayer | LoKrLayer) and isinstance(layer.get_base_layer(), QuantizedLinear):
            kind = "LoHa (adapter=loha)" if isinstance(layer, LoHaLayer) else "LoKr (adapter=lokr)"
            what, instead = f"a {kind} on a quantized base", "take precision=bf16 or another type of adapter"
        else:
            continue
        raise ValueError(
            f"memory.compile=true cannot be together with {what}, whose layers PyTorch cannot compile: set "
            f"memory.compile=false, or {instead}"
        )


def attention_operations() -> list[Any]:
    """The attention kernels that are one operation; that of the backend `math` is several, and recomputed."""
    names = ("flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu")
    return [getattr(torch.ops.aten, f"_scaled_dot_product_{name}").default for name in names]


def run_once(backends: Sequence[str] | None, block: nn.Module, *args: Any) -> Any:
    with use_backends(backends):
        return block(*args)


def run_again(backends: Sequence[str] | None, block: nn.Module, *args: Any) -> Any:
    with use_backends(backends):
        if not torch.is_grad_enabled():
            return block(*args)
        return checkpoint(block, *args, use_reentrant=False)


def run_again_but_attention(backends: Sequence[str] | None, block: nn.Module, *args: Any) -> Any:
    with use_backends(backends):
        if not torch.is_grad_enabled():
            return block(*args)
        kept = partial(create_selective_checkpoint_contexts, attention_operations())
        return checkpoint(block, *args, use_reentrant=False, context_fn=kept)


def compiled(
    run: Callable[..., Any], backends: Sequence[str] | None, shapes: int, backend: str | Callable[..., Any] = "inductor"
) -> Callable[..., Any]:
    """What runs blocks with `run`, one of the three above, compiled.

    Args:
        backends: of attention.
        shapes: how many different shapes of tokens are expected.
        backend: of `torch.compile`.
    """
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, KINDS * MODES * shapes)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 4 * limits.recompile_limit)
    return partial(torch.compile(run, dynamic=False, backend=backend), backends)
