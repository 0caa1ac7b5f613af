"""What is kept of a block between its forward and its backward, and what is computed again.

    none        everything is kept: fastest, most memory
    full        the block's input is kept, its forward is run again in the backward
    selective   and the attention's output, which is then not computed again
    budget      as `full`, but as many of the last blocks as fit into `budget_gb` are run as in `none`

A policy is a function that runs a block, set as `Transformer.run_block`; the model itself knows of none. Blocks can be
compiled together with their policy (compile_blocks.py); what follows is how it is done without.

A second run gives autograd what it needs, and that is less than the block computes. The block's last linears (`linear2`
of a single block, `img_mlp.2` and `txt_mlp.2` of a double one) end in

    out = x + gate * y          dL/dx += dL/dout        dL/dy = gate * dL/dout        dL/dgate = sum(y * dL/dout)

so y itself is read by the gate's gradient alone, which nobody wants while modulation is not trained: then y is not
computed again. The attention projections of a double block (`img_attn.proj`, `txt_attn.proj`) do feed what follows, but
their outputs are small and are kept. Of a block's 13 D^2 multiplications a token 9 D^2 so remain. Where an adapter on a
last linear reads its output (DoRA), or modulation is trained, y is computed.

This is an autograd Function around a block and not `torch.utils.checkpoint`, since its first run then needs no graph: a
hook less for each saved tensor, twice. Trained parameters are inputs of the Function, so that their gradients come out
of it as any others do, to be averaged between processes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from flux2.layers.attention import use_backends
from flux2.layers.recompute_context import Replay, running
from flux2.memory import compile_blocks
from flux2.models.transformer import DoubleBlock, SingleBlock, Transformer, call
from flux2.models.variants import TransformerConfig

Run = Callable[..., Any]  # runs a block: (block, *its arguments) -> its outputs


def call_with(backends: Sequence[str], block: nn.Module, *args: Any) -> Any:
    """Run a block with its attention by the first of `backends` that can."""
    with use_backends(backends):
        return block(*args)


# ------------------------------------------------------------------ one block


def tensors_in(args: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples and lists, in order."""
    if isinstance(args, Tensor):
        yield args
    elif isinstance(args, tuple | list):
        for arg in args:
            yield from tensors_in(arg)


SLOT = object()  # stands for a tensor


def emptied(args: Any) -> Any:
    """`args` without its tensors, to be `filled` again."""
    if isinstance(args, tuple | list):
        return type(args)(emptied(arg) for arg in args)
    return SLOT if isinstance(args, Tensor) else args


def filled(args: Any, tensors: Iterator[Tensor]) -> Any:
    if isinstance(args, tuple | list):
        return type(args)(filled(arg, tensors) for arg in args)
    return next(tensors) if args is SLOT else args


def frozen_base(layer: nn.Module) -> nn.Module | None:
    """The linear within `layer`, if no gradient that is wanted reads its output; None if one may."""
    if isinstance(layer, nn.Linear):
        return layer
    if isinstance(layer, lora.Linear) and not layer.lora_variant:  # base + update; DoRA scales the sum
        return layer.base_layer
    return None


def replay_of(block: nn.Module, args: Sequence[Any], keeps_attention: bool) -> Replay:
    """What a second run of `block` can leave out."""
    kept: list[nn.Module | None] = []
    last: list[nn.Module | None] = []
    if isinstance(block, DoubleBlock):
        kept = [frozen_base(block.img_attn.proj), frozen_base(block.txt_attn.proj)]
        last = [frozen_base(block.img_mlp[2]), frozen_base(block.txt_mlp[2])]
    elif isinstance(block, SingleBlock):
        last = [frozen_base(block.linear2)]
    else:
        keeps_attention = False
    modulation = tensors_in([arg for arg in args if not isinstance(arg, Tensor)])
    if any(tensor.requires_grad for tensor in modulation):
        last = []
    return Replay([m for m in last if m is not None], [m for m in kept if m is not None], keeps_attention)


def as_now(device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """Makes contexts with the autocast of now, but without its cache: a first run would leave casts without a graph."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext
    enabled, dtype = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
    return lambda: torch.autocast(device.type, dtype, enabled, cache_enabled=False)


def same_random_numbers(device: torch.device) -> Callable[[], AbstractContextManager[None]]:
    """Makes contexts in which random numbers are those that come now."""
    on_gpu = device.type == "cuda"
    state = torch.get_rng_state()
    gpu_state = torch.cuda.get_rng_state(device) if on_gpu else None

    @contextmanager
    def again() -> Iterator[None]:
        with torch.random.fork_rng(devices=[device] if on_gpu else []):
            torch.set_rng_state(state)
            if gpu_state is not None:
                torch.cuda.set_rng_state(gpu_state, device)
            yield

    return again


def drops_out(block: nn.Module) -> bool:
    return any(isinstance(module, nn.Dropout) and module.training and module.p > 0 for module in block.modules())


class Recomputed(torch.autograd.Function):
    """A block of which only the arguments, and what `replay` puts aside, are kept.

    `apply` takes what runs a block, the block, its arguments, the replay, the block's trained parameters, and then once
    more every tensor among the arguments and those parameters: the inputs that autograd knows. It returns what the
    block does.
    """

    @staticmethod
    def forward(
        ctx: Any,
        run: Run,
        block: nn.Module,
        args: Sequence[Any],
        replay: Replay,
        trained: Sequence[nn.Parameter],
        *tensors: Tensor,
    ) -> Any:
        device = tensors[0].device
        ctx.run, ctx.block, ctx.layout, ctx.replay, ctx.trained = run, block, emptied(args), replay, trained
        ctx.autocast = as_now(device)
        ctx.randomness = same_random_numbers(device) if drops_out(block) else nullcontext
        with running(replay), ctx.autocast():
            outputs = run(block, *args)
        stored, replay.stored = replay.stored, []
        ctx.given = len(tensors) - len(trained)
        ctx.save_for_backward(*tensors[: ctx.given], *stored)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        saved, replay = ctx.saved_tensors, ctx.replay
        wanted = ctx.needs_input_grad[5:]
        given = [
            tensor.detach().requires_grad_(needs)
            for tensor, needs in zip(saved[: ctx.given], wanted[: ctx.given], strict=True)
        ]
        replay.stored, replay.again = saved[ctx.given :], True
        try:
            with torch.enable_grad(), running(replay), ctx.autocast(), ctx.randomness():
                outputs = ctx.run(ctx.block, *filled(ctx.layout, iter(given)))
            ends = [outputs] if isinstance(outputs, Tensor) else outputs
            reached = [(end, gradient) for end, gradient in zip(ends, gradients, strict=True) if end.requires_grad]
            inputs = [tensor for tensor, needs in zip([*given, *ctx.trained], wanted, strict=True) if needs]
            found = iter(
                torch.autograd.grad(
                    [end for end, _ in reached], inputs, [gradient for _, gradient in reached], allow_unused=True
                )
            )
        finally:
            replay.stored = []
        return None, None, None, None, None, *(next(found) if needs else None for needs in wanted)


@dataclass(frozen=True)
class Recompute:
    """Runs blocks and keeps only their arguments; directly where no gradient is wanted, as in sampling."""

    run: Run
    keeps_attention: bool = False

    def __call__(self, block: nn.Module, *args: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.run(block, *args)
        trained = [parameter for parameter in block.parameters() if parameter.requires_grad]
        replay = replay_of(block, args, self.keeps_attention)
        return Recomputed.apply(self.run, block, args, replay, trained, *tensors_in(args), *trained)


# ------------------------------------------------------------------ bytes


def kept_bytes(config: TransformerConfig, kind: str, policy: str, tokens: int, itemsize: int) -> int:
    """What one block keeps for its backward, counted from the shapes, if each of its linears carries an adapter.

    What is as small as a number a head or a rank is left out; that is 3 % at most.

    Args:
        kind: "double" or "single".
        policy: "none", "full" or "selective".
        tokens: of text and images together, in the whole batch.
        itemsize: bytes of a number in the dtype of the products, 2 or 4. The norms of q and k are in float32.
    """
    hidden, mlp = config.hidden, config.mlp_width
    double = kind == "double"
    if policy != "none":  # the input; what the attention projections gave; the attention
        return tokens * itemsize * hidden * (1 + double + (policy == "selective"))
    in_float32 = 2 * hidden if itemsize < 4 else 0  # q and k before their norms
    # input, the same modulated, rotated q and k, attention; before SwiGLU, its SiLU, after it
    numbers = (1 + 1 + 2 + 1) * hidden + (2 + 1 + 1) * mlp
    if double:  # v and attention once more as they are joined and cut, between attention and mlp, the same modulated
        numbers += (1 + 1 + 1 + 1) * hidden + (0 if in_float32 else 3 * hidden)
    else:  # q, k, v lie in one memory with what goes into SwiGLU; attention beside the mlp
        numbers += (3 + 1) * hidden
    return tokens * (itemsize * numbers + 4 * in_float32)


def blocks_within(config: TransformerConfig, budget_gb: float, tokens: int, itemsize: int) -> int:
    """How many of the last blocks can keep everything, so that they keep at most `budget_gb` (1e9 bytes) more than with
    `full`. Other arguments as in `kept_bytes`.

    The last, as their memory is free again before the first block is recomputed.
    """
    left, count = budget_gb * 1e9, 0
    for kind, blocks in (("single", config.single_blocks), ("double", config.double_blocks)):
        more = kept_bytes(config, kind, "none", tokens, itemsize) - kept_bytes(config, kind, "full", tokens, itemsize)
        fit = min(blocks, int(left // more))
        count, left = count + fit, left - fit * more
        if fit < blocks:
            break
    return count


class Budgeted:
    """Keeps everything of the last blocks, as many as `budget_gb` allow for the tokens at hand, and recomputes others.

    Forwards without a backward between them, of one loss, need the budget each.
    """

    def __init__(self, model: Transformer, budget_gb: float, keep: Run, recompute: Run) -> None:
        self.config, self.budget_gb, self.keep, self.recompute = model.config, budget_gb, keep, recompute
        blocks = [*model.double_blocks, *model.single_blocks]
        self.from_end = {block: len(blocks) - i for i, block in enumerate(blocks)}  # 1 for the last

    def __call__(self, block: nn.Module, *args: Any) -> Any:
        streams = [arg for arg in args if isinstance(arg, Tensor)]
        tokens = sum(stream.shape[0] * stream.shape[1] for stream in streams)
        within = blocks_within(self.config, self.budget_gb, tokens, streams[0].element_size())
        return (self.keep if self.from_end[block] <= within else self.recompute)(block, *args)


# ------------------------------------------------------------------ policies

POLICIES = ("none", "full", "selective", "budget")


def check_policy(policy: Any, budget_gb: Any = None) -> None:
    """Raises ValueError unless `policy` is one of `POLICIES`, and `budget_gb` a number for "budget" and None else."""
    if policy not in POLICIES:
        raise ValueError(f"memory.checkpointing={policy!r} is not a policy; choose one of {', '.join(POLICIES)}")
    if policy != "budget":
        if budget_gb is not None:
            raise ValueError(
                f"memory.budget_gb={budget_gb!r} is read with memory.checkpointing=budget alone, not with {policy}; "
                "choose that, or give null"
            )
        return
    if isinstance(budget_gb, bool) or not isinstance(budget_gb, int | float) or not 0 <= budget_gb < math.inf:
        raise ValueError(
            f"memory.budget_gb={budget_gb!r} must be a number from 0 with memory.checkpointing=budget: the GB that "
            "activations may take beyond memory.checkpointing=full"
        )


def set_policy(
    model: Transformer,
    policy: str,
    *,
    budget_gb: float | None = None,
    attention: Sequence[str] | None = None,
    compile: bool = False,
    shapes: int = 16,
    compiler: str | Callable[..., Any] = "inductor",
) -> None:
    """Choose how the blocks of `model` are run.

    Args:
        policy: one of `POLICIES`.
        budget_gb: for "budget": 1e9 bytes that activations may take beyond "full".
        attention: backends to try, best first (flux2/layers/attention.py); None is PyTorch's choice.
        compile: whether blocks go through `torch.compile`, their recomputation with them (compile_blocks.py).
        shapes: how many different shapes of tokens are expected; with `compile` alone.
        compiler: the backend of `torch.compile`.

    Raises:
        ValueError: a policy that there is not, or a budget that is missing or not read.
    """
    check_policy(policy, budget_gb)
    backends = None if attention is None else tuple(attention)
    if compile:
        keep, recompute, selective = (
            compile_blocks.compiled(run, backends, shapes, compiler)
            for run in (compile_blocks.run_once, compile_blocks.run_again, compile_blocks.run_again_but_attention)
        )
    else:
        keep = call if backends is None else partial(call_with, backends)
        recompute, selective = Recompute(keep), Recompute(keep, keeps_attention=True)
    if policy == "budget":
        assert budget_gb is not None
        model.run_block = Budgeted(model, budget_gb, keep, recompute)
    else:
        model.run_block = {"none": keep, "full": recompute, "selective": selective}[policy]
