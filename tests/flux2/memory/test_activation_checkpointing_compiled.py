"""flux2.memory.activation_checkpointing: compiled blocks compute the same, and nothing twice that need not be."""

from collections.abc import Sequence
from typing import Any

import helpers
import pytest
import torch
from checkpointing_helpers import assert_gradients_near, gradients, with_adapter
from compiler_helpers import Graphs, blocks_of
from torch import Tensor

from flux2.memory.activation_checkpointing import set_policy
from flux2.quantization.float8 import Float8Linear
from flux2.quantization.int8 import Int8Linear
from flux2.quantization.nf4 import Nf4Linear


@pytest.mark.parametrize(
    ("policy", "mm_of_a_single_block", "attention_again"),
    # backward: five products a LoRA layer; again: all three of linear1, and of linear2 only the adapter's A
    [("full", 10 + 4, 1)]
    + [pytest.param(*case, marks=pytest.mark.slow) for case in (("none", 10, 0), ("selective", 10 + 4, 0))],
)
def test_compiled_blocks_give_the_same_and_do_not_compute_their_last_linear_again(
    policy: str, mm_of_a_single_block: int, attention_again: int
) -> None:
    """With `full` blocks of both kinds, else single ones alone: a graph of a double block takes seconds to make."""
    doubles = int(policy == "full")
    model = with_adapter(helpers.transformer_of(doubles, 3), targets=blocks_of(doubles))
    expected = gradients(model, "none")
    graphs = Graphs()
    order = ["flash", "math"]
    set_policy(model, policy, compile=True, compiler=graphs.backend, attention=order if policy == "selective" else None)
    assert_gradients_near(model, expected)
    # blocks of a kind share a graph, but for the very first, whose input needs no gradient
    first = 8 * 3 if doubles else 2 * 3
    assert sorted(graph["aten.mm.default"] for graph in graphs.forward) == [2 * 3, first]
    assert mm_of_a_single_block in [graph["aten.mm.default"] for graph in graphs.backward]
    attention = (
        "aten._scaled_dot_product_flash_attention_for_cpu.default",
        "run_with_rng_state",
    )  # which runs the other
    assert {sum(graph[name] for name in attention) for graph in graphs.backward} == {attention_again}


def test_compilation_goes_on_for_as_many_shapes_as_are_expected() -> None:
    model = with_adapter(helpers.transformer_of(0, 1), targets=blocks_of(0))
    graphs = Graphs()
    with torch._dynamo.config.patch(recompile_limit=1, accumulated_recompile_limit=1):
        set_policy(model, "full", compile=True, compiler=graphs.backend, shapes=3)
        limit = torch._dynamo.config.recompile_limit
        for count, width in ((1, 2), (2, 3)):
            model(**helpers.transformer_inputs(model.config, size=(2, width)))
            assert len(graphs.forward) == count
        with torch.no_grad():
            model(**helpers.transformer_inputs(model.config, size=(2, 2)))
        assert len(graphs.forward) == 3
    assert limit >= 3 * 2 * 2, "for each shape: two kinds of blocks, with gradients and without"


@pytest.mark.parametrize("policy", ["full", "none"])
@pytest.mark.parametrize(
    ("kind", "operations"),
    [
        (Float8Linear, ("aten._scaled_mm.default", "flux2.weight_copy.default")),
        (Int8Linear, ("aten._int_mm.default", "flux2.weight_copy.default")),
        (Nf4Linear, ("flux2.nf4_unpack.default",)),
    ],
)
def test_a_block_with_a_quantized_layer_compiles_and_keeps_no_copy_of_its_weight(
    kind: Any, operations: Sequence[str], policy: str
) -> None:
    model = with_adapter(helpers.transformer_of(0, 1), targets=blocks_of(0))
    model.txt_in.requires_grad_(True)  # so that the block's input has a gradient, as that of all blocks but the first
    base = model.single_blocks[0].linear1.base_layer
    layer = kind(base.in_features, base.out_features)
    layer.store(base.weight)
    model.single_blocks[0].linear1.base_layer = layer
    expected, graphs = gradients(model, policy), Graphs()
    set_policy(model, policy, compile=True, compiler=graphs.backend)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):  # type: ignore[func-returns-value]
        assert_gradients_near(model, expected)
    assert not [x for x in kept if x.numel() == layer.in_features * layer.out_features and x.dtype != torch.uint8]
    product, *of_weight = operations
    again = int(policy == "full")
    assert [graph[product] for graph in graphs.forward] == [1]
    assert [graph[product] for graph in graphs.backward] == [1 + again]  # for the gradient of its input, and again
    for name in of_weight:
        assert [graph[name] for graph in (*graphs.forward, *graphs.backward)] == [0, 1]
