"""Training steps at the true widths of the published models: every tensor in its place, no byte kept too long."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from simulated_gpu.simulated import ATTACH, RepeatedCopier, empty_transformer, refusing_after
from torch import nn

from benchmarks.models import Inputs, make_precision
from flux2 import adapters
from flux2.adapters.loading import scaled
from flux2.memory.activation_checkpointing import POLICIES, set_policy
from flux2.memory.block_offload import offload, offloaded_blocks
from flux2.models.transformer import Transformer
from flux2.models.variants import VARIANTS, TransformerConfig
from flux2.quantization.base import QuantizedLinear
from flux2.quantization.precision import Storage
from train.utils.memory import OutOfMemory, explain_oom

CUDA = torch.device("cuda")
SHALLOW = {
    name: replace(VARIANTS[name].transformer, double_blocks=2, single_blocks=3)
    for name in ("dev", "klein_base_9b", "klein_base_4b")
}


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """Every test gives back what it took, but for the workspaces of cuBLAS and constants of some kilobytes."""
    gc.collect()
    before = torch.cuda.memory_allocated()
    yield
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    assert torch.cuda.memory_allocated() <= before + 10_000


def make(
    config: TransformerConfig,
    storage: Storage | None,
    policy: str,
    attach: Callable[..., None],
    blocks: float,
    inputs: bool,
) -> Transformer:
    model = empty_transformer(config, make_precision(storage, in_fp8=True), CUDA, offloaded_blocks(config, blocks))
    set_policy(model, policy, budget_gb=1.0 if policy == "budget" else None)
    attach(model)
    for parameter in adapters.adapter_parameters(model):
        parameter.data = parameter.data.to(CUDA)
    offload(model, blocks, activations=inputs, device=CUDA, copier=RepeatedCopier)
    return model


def steps(model: nn.Module, config: TransformerConfig, count: int = 2, side: int = 64) -> list[int]:
    """Run steps with an update each; return the bytes that are allocated after each."""
    optimizer = torch.optim.AdamW(adapters.adapter_parameters(model), lr=1e-4, fused=True)
    given, after = Inputs(config, side, 512, CUDA), []
    for _ in range(count):
        given.backward(model)
        assert all(parameter.grad is not None for parameter in adapters.adapter_parameters(model))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        after.append(torch.cuda.memory_allocated())
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        given.predict(model, is_peer=False)
    return after


@pytest.mark.parametrize("blocks", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("inputs", [False, True])
@pytest.mark.parametrize("storage", [None, "fp8", "int8", "nf4"])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_step_of_every_kind_has_its_tensors_in_their_places(
    policy: str, storage: Storage | None, inputs: bool, blocks: float
) -> None:
    config = SHALLOW["dev"]
    model = make(config, storage, policy, ATTACH["lora"], blocks, inputs)
    first, second = steps(model, config)
    assert second == first, "a step keeps nothing"
    streamed = offloaded_blocks(config, blocks)
    for name, parameter in model.named_parameters():
        waits = any(name.startswith(f"{block}.") for block in streamed) and not parameter.requires_grad
        assert parameter.is_cuda != waits, name


@pytest.mark.parametrize("storage", [None, "fp8", "int8", "nf4"])
@pytest.mark.parametrize("kind", ["dora", "lokr", "loha", "oft"])
@pytest.mark.parametrize("name", ["klein_base_4b", "klein_base_9b"])
def test_adapters_of_every_type_train_on_every_storage(name: str, kind: str, storage: Storage | None) -> None:
    config = SHALLOW[name]
    model = make(config, storage, "full", ATTACH[kind], 0.5, False)
    steps(model, config, 1, side=32)


@pytest.mark.parametrize("storage", [None, "fp8", "int8", "nf4"])
@pytest.mark.parametrize("policy", ["full", "selective", "none"])
def test_compiled_blocks_take_no_more_memory(policy: str, storage: Storage | None) -> None:
    """Most of what they would: weights that are dequantized or transposed in the forward and kept for the backward."""
    config, peaks = SHALLOW["klein_base_4b"], []
    for compiled in (False, True):
        torch._dynamo.reset()
        torch._C._cuda_clearCublasWorkspaces()
        model = make(config, storage, policy, ATTACH["lora"], 0.0, False)
        set_policy(model, policy, compile=compiled)
        gc.collect()
        before = torch.cuda.memory_allocated()
        steps(model, config, 1)
        torch.cuda.reset_peak_memory_stats()
        steps(model, config, 1)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del model
    # 1.14 was seen in int8, and at most 1.022 in the others
    assert peaks[1] < (1.2 if storage == "int8" else 1.05) * peaks[0]


def test_compiled_blocks_have_graphs_for_each_scale_of_the_adapter_and_compile_none_again() -> None:
    """As target=slider changes the sign at every step: kernels are compiled in the first step of each."""
    config, stats = SHALLOW["klein_base_4b"], torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()
    stats.clear()
    model = make(config, "nf4", "full", ATTACH["lora"], 0.0, False)
    set_policy(model, "full", compile=True)
    given, graphs = Inputs(config, 16, 32, CUDA), []
    for scale in (1.0, -1.0, 1.0, -1.0):
        with scaled(model, scale):
            given.backward(model)
        graphs.append(stats["unique_graphs"])
    # double blocks, single blocks, and the first, whose input has no gradient
    assert graphs == [3, 6, 6, 6]
    assert not torch._dynamo.utils.counters["graph_break"]


def test_layers_are_stored_as_asked() -> None:
    for storage in ("fp8", "int8", "nf4"):
        model = make(SHALLOW["klein_base_4b"], storage, "full", ATTACH["lora"], 0.0, False)
        kinds = {module.kind for module in model.modules() if isinstance(module, QuantizedLinear)}
        assert kinds == {storage}


@pytest.mark.parametrize("policy", ["full", "none"])
def test_memory_that_runs_out_at_any_allocation_is_one_error_and_leaves_nothing(policy: str) -> None:
    """The first step of a model takes memory of the device bit by bit; each of these requests fails in turn."""
    config = SHALLOW["klein_base_4b"]
    model = make(config, "nf4", policy, ATTACH["lora"], 0.5, True)
    given = Inputs(config, 64, 512, CUDA)
    given.backward(model)  # the buffers that stay
    model.zero_grad(set_to_none=True)
    gc.collect()
    before, failed = torch.cuda.memory_allocated(), 0
    while True:
        torch.cuda.empty_cache()
        with refusing_after(failed):
            try:
                with explain_oom("in a step", "step", CUDA):
                    given.backward(model)
                break
            except OutOfMemory:
                failed += 1
        model.zero_grad(set_to_none=True)
    assert failed > 5
    model.zero_grad(set_to_none=True)
    given.backward(model)  # the model goes on, and what failed was freed by then
    model.zero_grad(set_to_none=True)
    gc.collect()
    assert torch.cuda.memory_allocated() == before


def test_a_byte_too_many_that_is_kept_is_seen() -> None:
    """The check of the test above, on a model that keeps a tensor of each step."""
    config = SHALLOW["klein_base_4b"]
    model = make(config, None, "full", ATTACH["lora"], 0.0, False)
    kept: list[torch.Tensor] = []
    model.final_layer.register_forward_hook(lambda module, args, out: kept.append(out.detach()))
    first, second = steps(model, config)
    assert second > first
