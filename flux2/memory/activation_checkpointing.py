"""Activation checkpointing: what is kept of a block between forward and backward, and what is recomputed.

    none        keeps everything: fastest, most memory
    full        keeps the block's input and runs its forward again in the backward
    selective   also keeps the attention's output, which is then not recomputed
    budget      like `full`, but runs as many of the last blocks as fit into `budget_gb` like `none`

A policy is a function that runs a block, set as `Transformer.run_block`; the model itself knows no policy. Blocks can
be compiled together with their policy (compile_blocks.py); this module describes the way without compilation.

The second run only has to give autograd what it needs, which is less than the block computes. The block's last linears
(`linear2` of a single block, `img_mlp.2` and `txt_mlp.2` of a double block) end in

    out = x + gate * y          dL/dx += dL/dout        dL/dy = gate * dL/dout        dL/dgate = sum(y * dL/dout)

so only the gate's gradient reads y, and it is not needed unless modulation is trained: y is not recomputed. The
attention projections of a double block (`img_attn.proj`, `txt_attn.proj`) do feed later layers, but their outputs are
small and are kept. 9 D^2 of a block's 13 D^2 multiplications per token remain. y is computed if an adapter on a last
linear reads its output (DoRA) or modulation is trained.

This is an autograd Function around a block instead of `torch.utils.checkpoint`, because its first run needs no graph,
which saves two hooks per saved tensor. Trained parameters are inputs of the Function, so that their gradients leave it
like any others and can be averaged between processes.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from flux2.layers.recompute_context import Replay, use_replay
from flux2.memory import compile_blocks
from flux2.models.transformer import DoubleBlock, SingleBlock, Transformer
from flux2.models.variants import TransformerConfig

Run = Callable[..., Any]  # runs a block: (block, *its arguments) -> its outputs
SLOT = object()  # placeholder of a tensor


def tensors_in(args: Any) -> list[Tensor]:
    """Return the tensors in nested tuples and lists, in order."""
    return [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]


def frozen_linears(*layers: nn.Module) -> list[nn.Module]:
    """Return the linears within those of `layers` whose output no required gradient reads."""
    # PEFT's plain LoRA adds an update to the output of its base; a variant such as DoRA scales the sum
    bases = (x.base_layer if isinstance(x, lora.Linear) and not x.lora_variant else x for x in layers)
    return [base for base in bases if isinstance(base, nn.Linear)]


def make_replay(block: nn.Module, args: Sequence[Any], keeps_attention: bool) -> Replay:
    """Return the replay for a run of `block`, which says what its second run can skip or recall."""
    kept: list[nn.Module] = []
    last: list[nn.Module] = []
    if isinstance(block, DoubleBlock):
        kept = frozen_linears(block.img_attn.proj, block.txt_attn.proj)
        last = frozen_linears(block.img_mlp[2], block.txt_mlp[2])
    elif isinstance(block, SingleBlock):
        last = frozen_linears(block.linear2)
    modulation = tensors_in([arg for arg in args if not isinstance(arg, Tensor)])
    if any(tensor.requires_grad for tensor in modulation):  # the gradient of the gate reads the outputs
        last = []
    return Replay(last, dict.fromkeys(kept), keeps_attention)


def capture_autocast(device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """Return a function that returns contexts with the current autocast state.

    They disable the autocast cache, in which a first run would leave casts without a graph.
    """
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext
    enabled, dtype = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)
    return lambda: torch.autocast(device.type, dtype, enabled, cache_enabled=False)


def capture_rng(device: torch.device) -> Callable[[], AbstractContextManager[None]]:
    """Return a function that returns contexts in which random numbers repeat from the current state."""
    gpus = [device] if device.type == "cuda" else []
    state, gpu_states = torch.get_rng_state(), [torch.cuda.get_rng_state(gpu) for gpu in gpus]

    @contextmanager
    def restored() -> Iterator[None]:
        with torch.random.fork_rng(gpus):
            torch.set_rng_state(state)
            for gpu, gpu_state in zip(gpus, gpu_states, strict=True):
                torch.cuda.set_rng_state(gpu_state, gpu)
            yield

    return restored


class RecomputedBlock(torch.autograd.Function):
    """A block of which only the arguments and the tensors saved in `replay` are kept.

    `apply` takes a function that runs a block, the block, its arguments, the replay and the block's trained parameters.
    Every tensor among the arguments and these parameters follows once more: the inputs that autograd knows. It returns
    the outputs of the block.
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
        ctx.run, ctx.block, ctx.replay, ctx.trained = run, block, replay, trained
        leaves, ctx.spec = tree_flatten(args)
        ctx.leaves = [SLOT if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        ctx.autocast = capture_autocast(device)
        dropouts = [module for module in block.modules() if isinstance(module, nn.Dropout)]
        drops = any(module.training and module.p > 0 for module in dropouts)
        ctx.rng = capture_rng(device) if drops else nullcontext
        with use_replay(replay), ctx.autocast():
            outputs = run(block, *args)
        saved, replay.saved = replay.saved, []
        ctx.argument_count = len(tensors) - len(trained)
        ctx.save_for_backward(*tensors[: ctx.argument_count], *saved)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        tensors, replay, count = ctx.saved_tensors, ctx.replay, ctx.argument_count
        needs_grad = ctx.needs_input_grad[5:]
        # 1. the arguments as leaves of a new graph
        arguments = [
            tensor.detach().requires_grad_(needs)
            for tensor, needs in zip(tensors[:count], needs_grad[:count], strict=True)
        ]
        replay.saved, replay.is_second_run = tensors[count:], True
        try:
            # 2. the block again, with a graph
            remaining = iter(arguments)
            leaves = [next(remaining) if leaf is SLOT else leaf for leaf in ctx.leaves]
            with torch.enable_grad(), use_replay(replay), ctx.autocast(), ctx.rng():
                outputs = ctx.run(ctx.block, *tree_unflatten(leaves, ctx.spec))
            # 3. the gradients of arguments and trained parameters
            outputs = [outputs] if isinstance(outputs, Tensor) else outputs
            pairs = [(out, grad) for out, grad in zip(outputs, gradients, strict=True) if out.requires_grad]
            inputs = [tensor for tensor, needs in zip([*arguments, *ctx.trained], needs_grad, strict=True) if needs]
            results = iter(
                torch.autograd.grad([out for out, _ in pairs], inputs, [grad for _, grad in pairs], allow_unused=True)
            )
        finally:
            replay.saved = []
        return None, None, None, None, None, *(next(results) if needs else None for needs in needs_grad)


def run_recomputed(run: Run, keeps_attention: bool, block: nn.Module, *args: Any) -> Any:
    """Run a block with `run` and keep only its arguments; keep nothing where gradients are disabled."""
    if not torch.is_grad_enabled():
        return run(block, *args)
    trained = [parameter for parameter in block.parameters() if parameter.requires_grad]
    replay = make_replay(block, args, keeps_attention)
    return RecomputedBlock.apply(run, block, args, replay, trained, *tensors_in(args), *trained)


def kept_bytes(config: TransformerConfig, kind: str, policy: str, tokens: int, itemsize: int) -> int:
    """Return the bytes that one block keeps for its backward, from its shapes, with an adapter on each linear.

    Tensors with one number per head, or `rank` numbers, per token are not counted; they are 3 % at most.

    Args:
        kind: "double" or "single".
        policy: "none", "full" or "selective".
        tokens: Number of text and image tokens in the whole batch.
        itemsize: Bytes per number in the dtype of the products, 2 or 4. The norms of q and k are in float32.
    """
    hidden, mlp, double = config.hidden, config.mlp_width, kind == "double"
    if policy != "none":  # the input; the outputs of the attention projections; the attention
        return tokens * itemsize * hidden * (1 + double + (policy == "selective"))
    in_float32 = 2 * hidden if itemsize < 4 else 0  # q and k before their norms
    # input, modulated input, rotated q and k, attention; input, SiLU and output of SwiGLU
    numbers = (1 + 1 + 2 + 1) * hidden + (2 + 1 + 1) * mlp
    if double:  # copies of v and attention (joined, split), input of the mlp, modulated input of the mlp
        numbers += (1 + 1 + 1 + 1) * hidden + (0 if in_float32 else 3 * hidden)
        numbers += hidden * config.isolated_references  # their attention and that of other tokens, also joined
    else:  # q, k, v share memory with the input of SwiGLU; attention concatenated with the mlp
        numbers += (3 + 1) * hidden
    return tokens * (itemsize * numbers + 4 * in_float32)


def blocks_within(config: TransformerConfig, budget_gb: float, tokens: int, itemsize: int) -> int:
    """Return how many of the last blocks can keep everything with at most `budget_gb` (1e9 bytes) more than `full`.

    The last ones, because their memory is free again before the first block is recomputed. See `kept_bytes` for the
    other arguments.
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
    """Policy that keeps everything of as many last blocks as `budget_gb` allows, and recomputes the others.

    The number follows from the tokens of each call. Several forwards of one loss need the budget once each.
    """

    def __init__(self, model: Transformer, budget_gb: float, keep: Run, recompute: Run) -> None:
        self.config, self.budget_gb, self.keep, self.recompute = model.config, budget_gb, keep, recompute
        blocks = reversed([*model.double_blocks, *model.single_blocks])
        self.from_end = {block: i for i, block in enumerate(blocks, start=1)}  # 1 for the last

    def __call__(self, block: nn.Module, *args: Any) -> Any:
        streams = [arg for arg in args if isinstance(arg, Tensor)]
        tokens = sum(stream.shape[0] * stream.shape[1] for stream in streams)
        within = blocks_within(self.config, self.budget_gb, tokens, streams[0].element_size())
        return (self.keep if self.from_end[block] <= within else self.recompute)(block, *args)


POLICIES = ("none", "full", "selective", "budget")


def check_policy(policy: Any, budget_gb: Any = None) -> None:
    """Raise ValueError unless `policy` is in `POLICIES` and `budget_gb` a number for "budget" and None otherwise."""
    if policy not in POLICIES:
        raise ValueError(f"memory.checkpointing={policy!r} is not a policy; choose one of {', '.join(POLICIES)}")
    if policy != "budget":
        if budget_gb is not None:
            raise ValueError(
                f"memory.budget_gb={budget_gb!r} is used only with memory.checkpointing=budget, not with {policy}; "
                "choose budget, or give null"
            )
        return
    if isinstance(budget_gb, bool) or not isinstance(budget_gb, int | float) or not 0 <= budget_gb < math.inf:
        raise ValueError(
            f"memory.budget_gb={budget_gb!r} must be a number >= 0 with memory.checkpointing=budget: the GB that "
            "activations may take in addition to memory.checkpointing=full"
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
    """Set how the blocks of `model` are run.

    Args:
        policy: One of `POLICIES`.
        budget_gb: For "budget": GB (1e9 bytes) that activations may take in addition to "full".
        attention: Attention backends to try, best first (flux2/layers/attention.py); None is PyTorch's choice.
        compile: Whether `torch.compile` compiles the blocks and their recomputation (compile_blocks.py).
        shapes: Expected number of different token shapes; used only with `compile`.
        compiler: Backend of `torch.compile`.
    """
    check_policy(policy, budget_gb)
    plain = partial(compile_blocks.run_kept, attention)
    runs: tuple[Run, Run, Run] = plain, partial(run_recomputed, plain, False), partial(run_recomputed, plain, True)
    if compile:
        runs = compile_blocks.compile_runners(attention, shapes, runs, compiler)
    keep, recompute, selective = runs
    if budget_gb is None:
        model.run_block = {"none": keep, "full": recompute, "selective": selective}[policy]
    else:
        model.run_block = Budgeted(model, budget_gb, keep, recompute)
