"""Small models with an adapter and their gradients under a policy: what the tests of checkpointing share."""

from collections.abc import Sequence
from typing import Any

import helpers
import torch
from adapter_helpers import draw_adapter
from torch import Tensor

from flux2 import adapters
from flux2.layers.selection import BLOCK_LINEARS
from flux2.memory.activation_checkpointing import set_policy
from flux2.models.transformer import DoubleBlock, SingleBlock, Transformer


def train_once(policy: str, dropout: float = 0.0) -> tuple[Tensor, list[Tensor], dict[str, int]]:
    """Loss, gradients of a LoRA, and counts: forwards of blocks, numbers of floats saved for the backward."""
    model = small_model(dropout=dropout)
    set_policy(model, policy, budget_gb=0.0002 if policy == "budget" else None)
    counts = {"forwards": 0, "saved": 0}

    def count(*_: Any) -> None:
        counts["forwards"] += 1

    for module in model.modules():
        if isinstance(module, DoubleBlock | SingleBlock):
            module.register_forward_pre_hook(count)

    def save(tensor: Tensor) -> Tensor:
        counts["saved"] += tensor.numel()
        return tensor

    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        loss = model(**helpers.transformer_inputs(model.config)).square().mean()
    loss.backward()
    gradients = [parameter.grad for parameter in adapters.adapter_parameters(model)]
    assert all(gradient is not None for gradient in gradients)
    return loss.detach(), gradients, counts  # type: ignore[return-value]


def small_model(**options: Any) -> Transformer:
    """A model with an adapter whose weights are not zero."""
    return with_adapter(helpers.transformer("dev"), **options)


def with_adapter(
    model: Transformer, rank: int = 2, targets: Sequence[str] = BLOCK_LINEARS, **options: Any
) -> Transformer:
    adapters.attach(model, rank=rank, targets=targets, **options)
    draw_adapter(model)
    return model.train()


def gradients(model: Transformer, policy: str, budget_gb: float | None = None, **inputs: Any) -> list[Tensor]:
    set_policy(model, policy, budget_gb=budget_gb)
    model.zero_grad()
    model(**{**helpers.transformer_inputs(model.config), **inputs}).square().mean().backward()
    return [parameter.grad.clone() for parameter in adapters.adapter_parameters(model)]  # type: ignore[union-attr]


def assert_equal(ours: list[Tensor], theirs: list[Tensor]) -> None:
    assert len(ours) == len(theirs) > 0
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def assert_gradients_near(model: Transformer, expected: list[Tensor]) -> None:
    """Raise unless the gradients of a step with other kernels or a compiler are those expected, but for rounding."""
    model.zero_grad()
    model(**helpers.transformer_inputs(model.config)).square().mean().backward()
    for parameter, theirs in zip(adapters.adapter_parameters(model), expected, strict=True):
        assert parameter.grad is not None
        assert helpers.relative_error(parameter.grad, theirs) < 1e-5
