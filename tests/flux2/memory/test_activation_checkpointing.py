"""flux2.memory.activation_checkpointing: policies change no number, with any order of attention backends."""

import weakref
from collections.abc import Sequence
from typing import Any

import helpers
import peft
import pytest
import torch
from checkpointing_helpers import assert_equal, assert_gradients_near, gradients, small_model, train_once
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flux2 import adapters
from flux2.layers import recompute_context
from flux2.layers.attention import check_backends, chosen_backend
from flux2.layers.selection import BLOCK_LINEARS
from flux2.memory.activation_checkpointing import POLICIES, set_policy
from flux2.models.transformer import Transformer


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("policy", list(POLICIES))
def test_loss_and_gradients_are_bit_for_bit_those_without_a_policy(policy: str, dropout: float) -> None:
    loss, gradients, _ = train_once("none", dropout)
    again, with_policy, _ = train_once(policy, dropout)
    assert torch.equal(loss, again)
    assert all(torch.equal(a, b) for a, b in zip(gradients, with_policy, strict=True))
    assert all(gradient.abs().sum() > 0 for gradient in gradients)


def test_an_unknown_policy_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"memory\.checkpointing='half'.*none, full, selective, budget"):
        set_policy(Transformer(helpers.TRANSFORMERS["klein"]), "half")


# ------------------------------------------------------------------ what a second run leaves out


@pytest.mark.parametrize("policy", ["full", "selective"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("targets", [BLOCK_LINEARS, [r"single_blocks\.\d+\.linear1"]], ids=["all", "one"])
def test_no_gradient_reads_what_is_not_computed_again(
    policy: str, dropout: float, targets: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model(dropout=dropout, targets=targets)
    torch.manual_seed(0)
    expected = gradients(model, "none")
    shapes = []

    def poison(shape: tuple[int, ...], like: Tensor) -> Tensor:
        shapes.append(shape)
        return torch.full(shape, torch.nan, dtype=like.dtype)

    monkeypatch.setattr(recompute_context, "placeholder", poison)
    torch.manual_seed(0)
    assert_equal(gradients(model, policy), expected)
    hidden, config = model.config.hidden, model.config
    reached = config.single_blocks if len(targets) == 1 else 2 * config.double_blocks + config.single_blocks
    assert len(shapes) == reached  # what lies before the first adapter has no backward
    assert {shape[-1] for shape in shapes} == {hidden}


@pytest.mark.parametrize("policy", ["full", "selective"])
def test_gates_that_are_trained_get_the_gradient_of_without_a_policy(policy: str) -> None:
    targets = [*BLOCK_LINEARS, r".*_modulation(_img|_txt)?\.lin", r"time_in\.out_layer"]
    model = small_model(targets=targets)
    expected = gradients(model, "none")
    assert_equal(gradients(model, policy), expected)


def test_an_adapter_that_reads_the_output_of_its_base_gets_it() -> None:
    model = helpers.transformer("klein")
    config = peft.LoraConfig(r=2, target_modules=r".*(linear2|mlp\.2|proj)", use_dora=True, init_lora_weights=False)
    peft.get_peft_model(model, config)
    expected = gradients(model, "none")
    assert_equal(gradients(model, "full"), expected)


def test_under_autocast_the_second_run_computes_as_the_first() -> None:
    model = small_model(dropout=0.3).bfloat16()
    for parameter in adapters.adapter_parameters(model):
        parameter.data = parameter.data.float()
    outcomes = []
    for policy in ("none", "full", "selective"):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            first = model(**helpers.transformer_inputs(model.config))
            set_policy(model, policy)
            outcomes.append(gradients(model, policy))  # the backward within autocast
        assert first.dtype == torch.bfloat16
    assert_equal(outcomes[1], outcomes[0])
    assert_equal(outcomes[2], outcomes[0])


def test_a_first_run_leaves_nothing_in_autocasts_cache_that_has_no_gradient() -> None:
    model = small_model(dropout=0.3)
    inputs = helpers.transformer_inputs(model.config)

    def twice(policies: tuple[str, str]) -> list[Tensor]:
        model.zero_grad()
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16):
            losses = []
            for policy in policies:
                set_policy(model, policy)
                losses.append(model(**inputs).square().mean())
        sum(losses).backward()  # type: ignore[attr-defined]
        return [parameter.grad.clone() for parameter in adapters.adapter_parameters(model)]  # type: ignore[union-attr]

    for ours, theirs in zip(twice(("full", "none")), twice(("none", "none")), strict=True):
        assert helpers.relative_error(ours, theirs) < 1e-2


@pytest.mark.parametrize("policy", ["full", "selective"])
def test_a_graph_can_be_run_backwards_twice(policy: str) -> None:
    model = small_model(dropout=0.3)
    set_policy(model, policy)
    loss = model(**helpers.transformer_inputs(model.config)).square().mean()
    parameters = adapters.adapter_parameters(model)
    assert_equal(
        list(torch.autograd.grad(loss, parameters, retain_graph=True)), list(torch.autograd.grad(loss, parameters))
    )


@pytest.mark.parametrize("policy", ["full", "selective"])
def test_inputs_get_their_gradients(policy: str) -> None:
    model = small_model()
    found = []
    for name in ("none", policy):
        text = helpers.transformer_inputs(model.config)["text"].requires_grad_()
        gradients(model, name, text=text)
        found.append(text.grad)
    assert torch.equal(*found)


def test_all_that_is_kept_is_given_back_when_the_backward_is_over() -> None:
    model = small_model()
    set_policy(model, "selective")
    made: list[Any] = []

    def note(*given: Any) -> None:
        run = recompute_context.current_replay()
        if run is not None and not run.is_second_run:
            made.append(weakref.ref(run))

    model.single_blocks[0].register_forward_pre_hook(note)
    loss = model(**helpers.transformer_inputs(model.config)).square().mean()
    assert made[0]() is not None
    attended = weakref.ref(made[0]().attention)
    loss.backward()
    assert not made[0]().saved, "the loss may be looked at for longer"
    del loss
    assert made[0]() is None, "without the garbage collector: no circle holds the memory"
    assert attended() is None


# ------------------------------------------------------------------ attention


class Backends(TorchDispatchMode):
    """The attention kernels that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.__name__.startswith(("_scaled_dot_product", "_softmax", "_safe_softmax")):
            self.seen.append(function.__name__.partition(".")[0])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("policy", ["none", "full", "selective"])
@pytest.mark.parametrize(("order", "first"), [(["cudnn", "math"], "math"), (["cudnn", "flash", "math"], "flash")])
def test_attention_is_computed_by_the_first_backend_of_the_list_that_can(
    policy: str, order: list[str], first: str
) -> None:
    model = small_model()
    expected = gradients(model, "none")
    set_policy(model, policy, attention=order)
    with Backends() as kernels:
        assert_gradients_near(model, expected)
    assert ("_scaled_dot_product_flash_attention_for_cpu" in kernels.seen) == (first == "flash")
    assert ("_safe_softmax" in kernels.seen) == (first == "math")
    assert chosen_backend(order, 2, 16, 8, torch.device("cpu"), torch.float32) == first


def test_a_list_of_backends_of_which_none_can_is_an_error_that_says_so() -> None:
    with pytest.raises(ValueError, match=r"memory\.attention=\['cudnn'\].*cpu"):
        chosen_backend(["cudnn"], 2, 16, 8, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("given", ["flash", [], ["flash", "flash"], ["fast"], 3])
def test_backends_are_a_list_of_known_names(given: Any) -> None:
    with pytest.raises(ValueError, match=r"attention=.*cudnn, flash, efficient, math"):
        check_backends(given)
