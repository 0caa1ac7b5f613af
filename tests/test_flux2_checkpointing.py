"""flux2.checkpointing: policies save memory and change no number."""

from typing import Any

import helpers
import pytest
import torch
from torch import Tensor

from flux2 import adapters
from flux2.checkpointing import POLICIES, set_policy
from flux2.model import DoubleBlock, SingleBlock, Transformer


def train_once(policy: str, dropout: float = 0.0) -> tuple[Tensor, list[Tensor], dict[str, int]]:
    """Loss, gradients of a LoRA, and counts: forwards of blocks, numbers of floats saved for the backward."""
    model, _ = helpers.transformers("dev")
    adapters.attach(model, rank=2, dropout=dropout)
    generator = torch.Generator().manual_seed(0)
    for parameter in adapters.adapter_parameters(model):
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    set_policy(model, policy)
    model.train()
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


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("policy", list(POLICIES))
def test_loss_and_gradients_are_bit_for_bit_those_without_a_policy(policy: str, dropout: float) -> None:
    loss, gradients, _ = train_once("none", dropout)
    again, with_policy, _ = train_once(policy, dropout)
    assert torch.equal(loss, again)
    assert all(torch.equal(a, b) for a, b in zip(gradients, with_policy, strict=True))
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_full_runs_every_block_again_in_the_backward() -> None:
    config = helpers.TRANSFORMERS["dev"]
    blocks = config.double_blocks + config.single_blocks
    assert train_once("none")[2]["forwards"] == blocks
    assert train_once("full")[2]["forwards"] == 2 * blocks


def test_full_keeps_a_fraction_of_what_none_keeps() -> None:
    assert train_once("full")[2]["saved"] < 0.3 * train_once("none")[2]["saved"]


def test_sampling_recomputes_nothing() -> None:
    model, _ = helpers.transformers("klein")
    set_policy(model, "full")
    inputs = helpers.transformer_inputs(model.config)
    with torch.no_grad():
        prediction = model(**inputs)
        set_policy(model, "none")
        assert torch.equal(prediction, model(**inputs))
    assert prediction.grad_fn is None


def test_an_unknown_policy_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"memory.checkpointing='half' is not a policy; choose one of none, full"):
        set_policy(Transformer(helpers.TRANSFORMERS["klein"]), "half")
