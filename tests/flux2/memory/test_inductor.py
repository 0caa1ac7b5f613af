"""Blocks compiled by Inductor, with the machine's C++ compiler: the numbers of uncompiled blocks, and few graphs."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from adapter_helpers import PRECISIONS, attached, stirred
from compiler_helpers import blocks_of
from helpers import relative_error, transformer_inputs, transformer_of
from torch._dynamo.utils import counters

from flux2 import adapters
from flux2.memory.activation_checkpointing import set_policy
from flux2.models.transformer import Transformer
from flux2.quantization.precision import convert

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    """The number of graphs so far, each compiled without a break."""
    assert not counters["graph_break"]
    return counters["stats"]["unique_graphs"]


def step(model: Transformer, autocast: bool = False, **inputs: Any) -> list[torch.Tensor]:
    """The gradients of the adapter."""
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model(**transformer_inputs(model.config, **inputs)).float().square().mean()
    loss.backward()
    return [parameter.grad.clone() for parameter in adapters.adapter_parameters(model)]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("precision", "policy", "doubles"),
    [(precision, policy, 0) for precision in ("fp32", "fp8", "int8", "nf4") for policy in ("none", "full", "selective")]
    + [("fp32", "full", 2), ("nf4", "selective", 2)],
)
def test_the_gradients_are_those_of_uncompiled_blocks(precision: str, policy: str, doubles: int) -> None:
    model = transformer_of(doubles, 3)
    if precision != "fp32":  # products in float32, so that only the order of additions differs
        layers = ("single_blocks", *(["double_blocks"] if doubles else []))
        convert(model, replace(PRECISIONS[precision], layers=layers))
    stirred(attached("lora", model, targets=["single_blocks", *(["double_blocks"] if doubles else [])]))
    set_policy(model, policy)
    expected = step(model)
    set_policy(model, policy, compile=True)
    assert max(map(relative_error, step(model), expected)) < 1e-5
    kinds = 1 + bool(doubles)
    assert graphs() == kinds + 1  # of each kind of block, and of the first, whose input has no gradient
    assert max(map(relative_error, step(model), expected)) < 1e-5
    assert graphs() == kinds + 1


@pytest.mark.parametrize("policy", ["none", "full", "selective"])
def test_under_autocast_they_are_as_near_to_float32(policy: str) -> None:
    model = transformer_of(0, 2)
    stirred(attached("lora", model, targets=blocks_of(0)))
    set_policy(model, policy)
    exact, rounded = step(model), step(model, autocast=True)
    set_policy(model, policy, compile=True)
    for reference, eager, compiled in zip(exact, rounded, step(model, autocast=True), strict=True):
        assert relative_error(compiled, reference) < 1.5 * relative_error(eager, reference) + 1e-3


def test_each_shape_has_a_graph_with_and_without_gradients_and_no_more() -> None:
    """Buckets, validation of the same shapes, and sampling: references only make a sequence longer."""
    model = transformer_of(0, 2)
    stirred(attached("lora", model, targets=blocks_of(0)))
    sizes = [(2, 2), (2, 3), (3, 3)]
    with torch._dynamo.config.patch(recompile_limit=1, accumulated_recompile_limit=1):
        set_policy(model, "full", compile=True, shapes=len(sizes))
        for _ in range(2):
            for size in sizes:
                step(model, size=size)
        assert graphs() == 2 * len(sizes)  # the first block and the others
        for _ in range(2):
            for size in sizes:
                with torch.no_grad():
                    model(**transformer_inputs(model.config, size=size))
        assert graphs() == 3 * len(sizes)
        with adapters.adapters_disabled(model), torch.no_grad():  # the base's prediction, for prior preservation
            model(**transformer_inputs(model.config, size=sizes[0]))
        assert graphs() == 3 * len(sizes) + 1
