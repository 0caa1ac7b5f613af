"""flux2.memory.compile_blocks: which adapters are compiled with the blocks, and which are refused."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from adapter_helpers import PRECISIONS, TYPES, attached, base, stirred
from compiler_helpers import Graphs, blocks_of
from helpers import relative_error, transformer_inputs, transformer_of

from flux2 import adapters
from flux2.adapters.loading import scaled
from flux2.memory.activation_checkpointing import set_policy
from flux2.memory.compile_blocks import check_compiles, compiler_error
from flux2.models.transformer import Transformer
from flux2.quantization.precision import convert

REFUSED = {(kind, precision) for kind in ("dora", "tlora") for precision in PRECISIONS} | {
    (kind, precision) for kind in ("loha", "lokr") for precision in ("fp8", "int8", "nf4")
}


def step(model: Transformer) -> tuple[float, list[torch.Tensor]]:
    """The loss, and the gradients of the adapter."""
    model.zero_grad()
    loss = model(**transformer_inputs(model.config)).float().square().mean()
    loss.backward()
    gradients = [parameter.grad for parameter in adapters.adapter_parameters(model) if parameter.grad is not None]
    assert len(gradients) == len(adapters.adapter_parameters(model))
    return loss.item(), gradients


@pytest.mark.parametrize("doubles", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["pissa", "loha", "lokr", "oft"])
def test_each_type_is_compiled_whole_and_gives_the_same(kind: str, doubles: int) -> None:
    """A plain LoRA, whose layers an rsLoRA has too, is in tests/flux2/memory/test_activation_checkpointing.py."""
    model = transformer_of(doubles, 1)
    stirred(attached(kind, model, targets=blocks_of(doubles)))
    check_compiles(model)
    set_policy(model, "full")
    loss, gradients = step(model)
    graphs = Graphs()
    set_policy(model, "full", compile=True, compiler=graphs.backend)
    compiled, theirs = step(model)
    assert compiled == pytest.approx(loss, rel=1e-6)
    assert max(map(relative_error, theirs, gradients)) < 1e-5
    # a block is one graph
    assert (len(graphs.forward), len(graphs.backward)) == (doubles + 1, doubles + 1)
    assert min(graph["aten.mm.default"] + graph["aten.bmm.default"] for graph in graphs.forward) >= 2


@pytest.mark.parametrize("policy", ["none", "full", "selective"])
def test_a_compiled_block_sees_the_scale_of_the_adapter_with_a_graph_for_each(policy: str) -> None:
    """As target=slider changes it: the sign at every step, with the base's prediction, which has no scale, before."""
    model = transformer_of(1, 2)
    stirred(attached("lora", model, targets=blocks_of(1)))

    def steps() -> list[list[torch.Tensor]]:
        found = []
        for scale in (1.0, -1.0, 1.0, -1.0, 1.0):
            with adapters.adapters_disabled(model), torch.no_grad():
                base = model(**transformer_inputs(model.config))
            with scaled(model, scale):
                found.append([base, *step(model)[1]])
        return found

    set_policy(model, policy)
    expected = steps()
    graphs = Graphs()
    set_policy(model, policy, compile=True, compiler=graphs.backend)
    for number, (ours, theirs) in enumerate(zip(steps(), expected, strict=True)):
        assert max(map(relative_error, ours, theirs)) < 1e-5, number
    assert max(map(relative_error, expected[0], expected[1])) > 0.1  # a stale scale would be seen
    # with gradients a graph of each kind of block, and of one whose input has none, for each sign
    assert len(graphs.backward) == 2 * 2
    assert len(graphs.forward) == len(graphs.backward) + 2


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8", "int8", "nf4"])
@pytest.mark.parametrize("kind", TYPES)
def test_what_would_not_be_compiled_is_refused(kind: str, precision: str) -> None:
    model = base(precision)
    attached(kind, model)
    if (kind, precision) not in REFUSED:
        return check_compiles(model)
    with pytest.raises(ValueError, match=rf"memory\.compile=true.*adapter={kind}\b.*memory\.compile=false"):
        check_compiles(model)
    return None


def test_a_refused_type_is_one_that_pytorch_does_not_compile() -> None:
    """When it does, `check_compiles` has to go."""
    for kind, precision in (("dora", "fp32"), ("loha", "nf4"), ("lokr", "nf4")):
        model = transformer_of(0, 1)
        convert(model, replace(PRECISIONS[precision], layers=("single_blocks",)))
        stirred(attached(kind, model, targets=blocks_of(0)))
        graphs = Graphs()
        set_policy(model, "full", compile=True, compiler=graphs.backend)
        step(model)
        assert not graphs.forward, kind


def test_where_the_compiler_fails_blocks_run_uncompiled_after_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    def broken(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        raise RuntimeError("no compiler here\nand a second line")

    model = transformer_of(0, 2)
    stirred(attached("lora", model, targets=blocks_of(0)))
    for policy in ("none", "full", "selective"):
        torch._dynamo.reset()
        set_policy(model, policy)
        loss, gradients = step(model)
        caplog.clear()
        set_policy(model, policy, compile=True, compiler=broken)
        for _ in range(2):
            found = step(model)
            assert found[0] == loss
            assert all(map(torch.equal, found[1], gradients))
        (said,) = (record.message for record in caplog.records if record.name.startswith("flux2."))
        assert "memory.compile: blocks run uncompiled" in said
        assert "no compiler here" in said
        assert "second line" not in said


def test_an_error_of_a_block_is_none_of_the_compiler() -> None:
    assert compiler_error(RuntimeError("out of memory")) == ""
    assert "why" in compiler_error(torch._dynamo.exc.Unsupported("why"))
