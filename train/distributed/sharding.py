"""Sharding of the frozen base over several processes: each holds a shard, and a block is complete only while it runs.

PyTorch's `fully_shard` (FSDP2), over NCCL or gloo, gathers a block's parameters before its forward and backward, and
frees them afterwards. Only the base is sharded, before the adapter is attached. So the adapter, its gradients and the
optimizer's state are plain tensors, the same in all processes, and checkpoints do not depend on sharding; gradients are
averaged once per step (`Processes`, train/distributed/processes.py).

Each block is sharded as soon as it is loaded, so that a device never holds more than its shard, one block, and the
layers outside of blocks. Every forward is a collective operation; calling the model on one rank only deadlocks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from flux2.layers.fused_lora import INITIAL
from flux2.models.transformer import Transformer
from train.distributed.processes import Processes

T = TypeVar("T", bound=nn.Module)

# Accelerate's FSDP settings with the values that this code implements; the others have no effect on a frozen base
SETTINGS = {
    "FSDP_VERSION": ("fsdp_version", ("2",)),
    "FSDP_RESHARD_AFTER_FORWARD": ("fsdp_reshard_after_forward", ("true", "full_shard")),
    "FSDP_OFFLOAD_PARAMS": ("fsdp_offload_params", ("false",)),
    "FSDP_ACTIVATION_CHECKPOINTING": ("fsdp_activation_checkpointing", ("false",)),
}
WRAPPED = {"DoubleBlock", "SingleBlock"}


def launched_to_shard(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether `accelerate launch` was configured for FSDP. Raise ValueError for unsupported settings."""
    if environment.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    for name, (key, accepted) in SETTINGS.items():
        value = environment.get(name, accepted[0]).lower()
        if value not in accepted:
            raise ValueError(
                f"accelerate launch was configured with {key}={value}: only {key}={accepted[0]} is supported. Use "
                "conf/accelerate/fsdp2.yaml, and memory.checkpointing for activation checkpointing"
            )
    given = environment.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "")
    classes = {name.strip() for name in given.split(",") if name.strip()}
    if classes and classes != WRAPPED:
        raise ValueError(
            f"accelerate launch was configured with fsdp_transformer_layer_cls_to_wrap={given}. Name "
            f"{' and '.join(sorted(WRAPPED))}, or remove it"
        )
    return True


def check_processes(processes: Processes) -> None:
    """Raise ValueError if the base is to be sharded by one process, or on GPUs without NCCL."""
    if processes.sharded and processes.accelerator.num_processes < 2:
        raise ValueError(
            "shard=true needs several processes, and this is one. Start with accelerate launch --multi_gpu "
            "--num_processes 2 ..., or set shard=false (and do not configure accelerate for FSDP)"
        )
    on_gpus = processes.accelerator.device.type == "cuda"
    if processes.sharded and on_gpus and not torch.distributed.is_nccl_available():
        raise ValueError("shard=true needs NCCL, which PyTorch does not have on Windows. Train in WSL 2 or on Linux")


def check_adapter(model: nn.Module) -> None:
    """Raise ValueError for an adapter that is computed from the base's weights, which are complete nowhere."""
    configs: Any = model.peft_config
    for name, config in configs.items():
        if name.endswith(INITIAL):
            kind, why = "PiSSA (adapter=pissa)", "is initialized from the largest directions of the base's weights"
        elif getattr(config, "use_dora", False):
            kind, why = "DoRA (adapter=dora)", "normalizes the rows of the base's weights"
        else:
            continue
        raise ValueError(
            f"shard=true cannot be combined with {kind}, which {why}: no process has all weights of a sharded base. "
            "Use adapter=lora, rslora, loha, lokr or oft, or set shard=false"
        )


def sharder(device: torch.device) -> Callable[[nn.Module], None]:
    """Return a function that shards a block, or a model with sharded blocks, in place. All processes must call it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))

    def shard(module: nn.Module) -> None:
        if isinstance(module, Transformer):  # free layers outside of blocks after they ran
            for child in module.children():
                # not a linear such as `txt_in`: an adapter around it may read its weight without calling it
                if not isinstance(child, nn.ModuleList | nn.Linear):
                    fully_shard(child, mesh=mesh, reshard_after_forward=True)
        fully_shard(module, mesh=mesh, reshard_after_forward=True)

    return shard


def is_sharded(tensor: Any) -> bool:
    """Return whether `tensor` is a DTensor, without the import of its module, which takes half a second."""
    return hasattr(tensor, "to_local")


def local_bytes(model: nn.Module) -> int:
    """Return the bytes of the base that this process holds between steps."""
    frozen: Any = (parameter for parameter in model.parameters() if not parameter.requires_grad)
    return sum((tensor.to_local() if is_sharded(tensor) else tensor).nbytes for tensor in frozen)


def total_bytes(model: nn.Module) -> int:
    """Return the bytes of the complete base."""
    return sum(one.numel() * one.itemsize for one in model.parameters() if not one.requires_grad)


def attach_sharded(attach: Callable[..., T], *arguments: Any, **settings: Any) -> T:
    """Attach an adapter to a sharded model. Raise ValueError for one that is initialized from the base's weights."""
    reads = ValueError(
        "shard=true: this adapter is initialized from the base's weights (as DoRA and PiSSA), and no process has all "
        "weights of a sharded base. Use adapter=lora, or another one in docs/adapters.md, or set shard=false"
    )
    try:
        wrapped = attach(*arguments, **settings)
    except (RuntimeError, TypeError) as error:
        if "DTensor" in str(error):
            raise reads from error
        raise
    if any(is_sharded(parameter) for parameter in wrapped.parameters() if parameter.requires_grad):
        raise reads
    return wrapped
