"""Compare our recomputation and block offload with PyTorch's own: torch.utils.checkpoint and FSDP2's CPU offload.

    .venv/bin/python benchmarks/recompute.py                     times on this machine's processor: the block is narrow
    .venv-cuda/bin/python benchmarks/recompute.py --simulated    memory on a simulated GPU: blocks of dev

Runs alternate and the results are ratios of medians. The simulated GPU (tests/simulated_gpu/README.md) has PyTorch's
own allocator and computes nothing: it shows what a step keeps and its peak in addition to model and batch, and no time.
For the offload it shows the peak with model and batch.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)
sys.path.insert(1, str(ROOT / "tests"))

import flux2  # noqa: F401, I001  before torch: it sets how long threads spin

import argparse
import json
import statistics
import subprocess
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from benchmarks.common import RESULTS, free_memory, hardware, integer_type, write_result
from benchmarks.models import Inputs, make_precision
from benchmarks.step import SMALL, measure, ours
from flux2 import adapters
from flux2.layers.attention import preferred_backends
from flux2.memory.activation_checkpointing import set_policy
from flux2.memory.block_offload import offload, offloaded_blocks
from flux2.memory.compile_blocks import ATTENTION_OPERATIONS, run_kept
from flux2.models.transformer import Transformer
from flux2.models.variants import DEV, TransformerConfig

STORAGES = (None, "nf4")
POLICIES = ("full", "selective")
CUDA = torch.device("cuda")


def set_torch_policy(model: Transformer, policy: str) -> None:
    """Recompute the blocks by torch.utils.checkpoint, with the attention backends that `set_policy` takes."""
    run = partial(run_kept, preferred_backends(None, next(model.parameters()).device))
    options: dict[str, Any] = {"use_reentrant": False}
    if policy == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, ATTENTION_OPERATIONS)
    model.run_block = lambda block, *args: checkpoint(run, block, *args, **options)


def times(repeats: int) -> dict[str, Any]:
    """Return the seconds of a step by policy, ours and PyTorch's, on a CPU."""
    cpu, found = torch.device("cpu"), {}
    model = ours(SMALL, cpu, torch.float32, 16)
    inputs = Inputs(SMALL, 32, 512, cpu, torch.float32)

    def step(choose: Callable[[], None]) -> None:
        choose()
        inputs.backward(model)
        model.zero_grad(set_to_none=True)

    for policy in POLICIES:
        each = {
            "ours": partial(step, partial(set_policy, model, policy)),
            "torch": partial(step, partial(set_torch_policy, model, policy)),
        }
        medians = {name: statistics.median(values) for name, values in measure(each, repeats, cpu).items()}
        found[policy] = {"seconds": medians, "ours / torch": medians["ours"] / medians["torch"]}
    return found


def make(config: TransformerConfig, storage: Any, host: Any = ()) -> Transformer:
    from simulated_gpu.simulated import empty_transformer

    model = empty_transformer(config, make_precision(storage, in_fp8=False), CUDA, host)
    adapters.attach(model, rank=16)
    for parameter in adapters.adapter_parameters(model):
        parameter.data = parameter.data.to(CUDA)
    return model


def kept_and_peak(storage: Any, choose: Callable[[Transformer, str], None], policy: str) -> dict[str, float]:
    """Return the GB that a step keeps for its backward, and its peak, in addition to model and batch."""
    config = replace(DEV, double_blocks=4, single_blocks=8)
    model, inputs = make(config, storage), Inputs(config, 64, 512, CUDA)
    choose(model, policy)
    before = torch.cuda.memory_allocated()
    inputs.backward(model)  # the first has the workspaces
    torch.cuda.reset_peak_memory_stats()
    with torch.autocast("cuda", torch.bfloat16):
        loss = inputs.predict(model, is_peer=False).float().square().mean()
    kept = torch.cuda.memory_allocated() - before
    loss.backward()
    found = {"kept": kept / 1e9, "peak": (torch.cuda.max_memory_allocated() - before) / 1e9}
    free_memory(CUDA)
    return found


def fsdp(config: TransformerConfig, storage: Any) -> Transformer:
    """Return a model whose blocks FSDP2 keeps in pinned host memory, on one GPU, with the adapter on the GPU."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    if not torch.distributed.is_initialized():
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29511"}
        torch.distributed.init_process_group("cpu:gloo,cuda:nccl", rank=0, world_size=1)
    model, mesh = make(config, storage, offloaded_blocks(config, 1.0)), init_device_mesh("cuda", (1,))
    for block in (*model.double_blocks, *model.single_blocks):
        trained = {parameter for parameter in block.parameters() if parameter.requires_grad}
        options = {"reshard_after_forward": True, "offload_policy": CPUOffloadPolicy(), "ignored_params": trained}
        fully_shard(block, mesh=mesh, **options)
    set_policy(model, "full", attention=preferred_backends(None, CUDA))
    return model


def streamed(config: TransformerConfig, storage: Any) -> Transformer:
    """Return a model all of whose blocks we stream from pinned host memory."""
    from simulated_gpu.simulated import RepeatedCopier

    model = make(config, storage, offloaded_blocks(config, 1.0))
    set_policy(model, "full", attention=preferred_backends(None, CUDA))
    offload(model, 1.0, device=CUDA, copier=RepeatedCopier)
    return model


def peak_of_offload(build: Callable[[TransformerConfig, Any], Transformer], storage: Any) -> float:
    """Return the peak of a step with all blocks in host memory, in GB, with model and batch."""
    config = replace(DEV, double_blocks=4, single_blocks=8)
    model, inputs = build(config, storage), Inputs(config, 64, 512, CUDA)
    inputs.backward(model)
    torch.cuda.reset_peak_memory_stats()
    inputs.backward(model)
    peak: int = torch.cuda.max_memory_allocated()
    nn.Module.zero_grad(model, set_to_none=True)
    return peak / 1e9


def simulated() -> dict[str, Any]:
    """Return kept bytes and peaks; called in a process that sees a simulated GPU."""
    from simulated_gpu.simulated import device

    device().simulated_gpu_answer_ones(1)

    def ours_set(model: Transformer, policy: str) -> None:
        set_policy(model, policy, attention=preferred_backends(None, CUDA))

    found: dict[str, Any] = {"checkpointing, GB": {}, "offload of all blocks, peak in GB": {}}
    for storage in STORAGES:
        name = storage or "bf16"
        for policy in POLICIES:
            found["checkpointing, GB"][f"{name} {policy}"] = {
                "ours": kept_and_peak(storage, ours_set, policy),
                "torch": kept_and_peak(storage, set_torch_policy, policy),
            }
        peaks: dict[str, Any] = {"ours": peak_of_offload(streamed, storage)}
        free_memory(CUDA)
        try:
            peaks["FSDP2"] = peak_of_offload(fsdp, storage)
        except (RuntimeError, ValueError, TypeError, AssertionError) as error:
            peaks["FSDP2"] = f"fails: {str(error).splitlines()[0]:.200}"
        free_memory(CUDA)
        found["offload of all blocks, peak in GB"][name] = peaks
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=integer_type(1), default=7, help="timed steps of each")
    parser.add_argument("--simulated", action="store_true", help="memory on a simulated GPU instead of times")
    parser.add_argument("--in-simulation", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/recompute_<cpu or simulated>.json")
    options = parser.parse_args()
    if options.in_simulation:
        print(json.dumps(simulated()), flush=True)
        os._exit(0)
    result: dict[str, Any] = {"versions": {"torch": torch.__version__}}
    if options.simulated:
        from simulated_gpu.build import environment

        command = [sys.executable, __file__, "--in-simulation"]
        given = environment(capability=90, gb=150)
        done = subprocess.run(command, env=given, stdout=subprocess.PIPE, text=True, check=True)
        result |= {
            "what": "a step of four double and eight single blocks of dev, 1024 px, rank 16: simulated memory",
            "hardware": "simulated GPU (tests/simulated_gpu)",
        } | json.loads(done.stdout.splitlines()[-1])
    else:
        result |= {
            "what": f"forward and backward, batch 1, 1024 + 512 tokens, rank 16, hidden {SMALL.hidden}, "
            f"{SMALL.double_blocks} + {SMALL.single_blocks} blocks, float32",
            "hardware": hardware(torch.device("cpu")),
            "policies": times(options.repeats),
        }
    out = options.out or RESULTS / f"recompute_{'simulated' if options.simulated else 'cpu'}.json"
    write_result(out, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
