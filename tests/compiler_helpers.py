"""A compiler that notes what it is given."""

import collections
from typing import Any

import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition


class Graphs:
    """A compiler that changes nothing, and notes the graphs it is given."""

    def __init__(self) -> None:
        torch._dynamo.reset()
        self.forward: list[collections.Counter[str]] = []
        self.backward: list[collections.Counter[str]] = []
        self.backend = aot_autograd(
            fw_compiler=self.noting(self.forward),
            bw_compiler=self.noting(self.backward),
            partition_fn=min_cut_rematerialization_partition,
        )

    def noting(self, to: list[collections.Counter[str]]) -> Any:
        def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
            to.append(collections.Counter(str(node.target) for node in graph.graph.nodes if node.op == "call_function"))
            return make_boxed_func(graph.forward)

        return compiler


def blocks_of(double_blocks: int) -> list[str]:
    """The targets that a model with so many double blocks, or none, has."""
    return ["blocks" if double_blocks else "single_blocks"]
