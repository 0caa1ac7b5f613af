"""An adapter in bfloat16, updated in float32 and rounded stochastically: half the memory of its weights and gradients.

bfloat16 has 8 bits: an update below a 512th of a weight is lost when the sum is rounded to the nearest number. Rounded
up or down at random, with the probability of the remainder, the sum is right on average, so small updates add up
(Gupta et al. 2015, arxiv.org/abs/1502.02551; for Adam in bfloat16: Zamirai et al. 2020, arxiv.org/abs/2010.06192).

The optimizer never sees bfloat16. It has float32 copies of the parameters, which take memory only during its step, and
its state is in float32 too. So any optimizer works, its update is the usual one, and a checkpoint restores it exactly.
The random numbers depend on the seed and the number of updates alone, so all processes round alike and a resumed run
rounds as an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from data.sampler import derived_generator
from flux2.adapters import AdapterError, adapter_parameters
from flux2.adapters.tuners import adapter_layers, kind_of
from flux2.layers.fused_lora import INITIAL
from train.optim.optimizers import MakeOptimizer, averages_weights, build_optimizer

UPDATES = "rounded_updates"  # key of the first parameter group: number of updates so far
LOW_BITS = 16  # of a float32 that bfloat16 does not have


def to_bfloat16(model: nn.Module) -> None:
    """Convert the trained weights of a LoRA to bfloat16, in place. Raises AdapterError for another type."""
    kinds = {kind_of(layer) for layer in adapter_layers(model).values()}
    is_pissa = any(name.endswith(INITIAL) for name in getattr(model, "peft_config", {}))
    if not kinds <= {"LoRA", "T-LoRA"} or is_pissa:
        kind = "PiSSA" if is_pissa else " and ".join(sorted(kinds))
        raise AdapterError(
            f"adapter.dtype=bf16: a {kind} computes with its weights before they meet the activations, and would round "
            "more than its updates. Use adapter=lora, rslora or tlora, or adapter.dtype=fp32"
        )
    for parameter in adapter_parameters(model):
        parameter.data = parameter.data.to(torch.bfloat16)


def check_averages(optimizer: object) -> None:
    """Raise ValueError for an optimizer that recovers an average from the trained weights."""
    if averages_weights(optimizer):
        raise ValueError(
            f"adapter.dtype=bf16 does not work with {type(optimizer).__name__}, which computes its average from the "
            "trained weights and would magnify their rounding. Set adapter.dtype=fp32, or choose another optimizer"
        )


def round_stochastically(value: Tensor, generator: torch.Generator) -> Tensor:
    """Return float32 numbers as bfloat16, each rounded to one of its two neighbors, and right on average.

    The bits that are cut off are added to as many random ones before: the sum carries with their share as probability.
    """
    noise = torch.randint(1 << LOW_BITS, value.shape, generator=generator, dtype=torch.int32, device=value.device)
    bits = noise.add_(value.contiguous().view(torch.int32)).bitwise_and_(-(1 << LOW_BITS))
    return bits.view(torch.float32).to(torch.bfloat16)


def build_rounded_optimizer(
    make: MakeOptimizer, parameters: Sequence[nn.Parameter], factors: Sequence[float], seed: int
) -> torch.optim.Optimizer:
    """Build the optimizer of bfloat16 `parameters`, as `build_optimizer` does.

    Each step moves their gradients into float32 copies, and rounds the updated copies back.
    """
    copies = [nn.Parameter(placeholder(parameter)) for parameter in parameters]
    optimizer = build_optimizer(make, copies, factors)
    check_averages(optimizer)
    optimizer.param_groups[0][UPDATES] = 0

    def before(*_: Any) -> None:
        for parameter, copied in zip(parameters, copies, strict=True):
            if parameter.grad is not None:
                copied.data, copied.grad = parameter.detach().float(), parameter.grad.float()
                parameter.grad = None

    @torch.no_grad()
    def after(*_: Any) -> None:
        number = optimizer.param_groups[0][UPDATES]
        generators: dict[torch.device, torch.Generator] = {}
        for parameter, copied in zip(parameters, copies, strict=True):
            if copied.grad is not None:
                device = parameter.device
                if device not in generators:
                    host = derived_generator(seed, "rounding", number)
                    drawn = int(torch.randint(2**31, (), generator=host))
                    generators[device] = torch.Generator(device).manual_seed(drawn)
                parameter.copy_(round_stochastically(copied.detach(), generators[device]))
                copied.data, copied.grad = placeholder(parameter), None
        optimizer.param_groups[0][UPDATES] = number + 1

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
    return optimizer


def placeholder(parameter: Tensor) -> Tensor:
    """Return float32 zeros of the shape of `parameter` that take no memory."""
    return torch.zeros((), device=parameter.device).expand(parameter.shape)
