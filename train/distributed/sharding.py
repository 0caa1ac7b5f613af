"""The frozen base spread over several processes: each holds a share, and a block is whole only while it runs.

PyTorch's `fully_shard` (FSDP2) does it, the same over NCCL and over gloo: a block's parameters are gathered before its
forward and before its backward, and dropped after. Only the base is sharded, and before the adapter is attached. So the
adapter, its gradients and the optimizer's state are plain tensors, the same in all processes, and checkpoints and what
else is made of them know nothing of it; their gradients are averaged once a step (`Processes`,
train/distributed/processes.py).

Each block is sharded as soon as it is loaded, so that a device never holds more than its share, a block, and what is in
no block.

Every forward is one of all processes together. Who runs the model alone waits forever.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from flux2.layers.fused_lora import INITIAL
from flux2.models.transformer import Transformer

if TYPE_CHECKING:
    import peft

T = TypeVar("T", bound=nn.Module)

# What of Accelerate's FSDP settings can be asked for: what is done here. The others do nothing to a frozen base.
SETTINGS = {
    "FSDP_VERSION": ("fsdp_version", ("2",)),
    "FSDP_RESHARD_AFTER_FORWARD": ("fsdp_reshard_after_forward", ("true", "full_shard")),
    "FSDP_OFFLOAD_PARAMS": ("fsdp_offload_params", ("false",)),
    "FSDP_ACTIVATION_CHECKPOINTING": ("fsdp_activation_checkpointing", ("false",)),
}
WRAPPED = {"DoubleBlock", "SingleBlock"}


def launched_to_shard(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether `accelerate launch` was configured for FSDP.

    Raises ValueError for settings of it that ask for something else than is done here.
    """
    if environment.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return False
    for name, (key, able) in SETTINGS.items():
        value = environment.get(name, able[0]).lower()
        if value not in able:
            raise ValueError(
                f"accelerate launch was configured with {key}={value}; this shards with {key}={able[0]} alone, as in "
                "conf/accelerate/fsdp2.yaml. What is recomputed is memory.checkpointing here"
            )
    given = environment.get("FSDP_TRANSFORMER_CLS_TO_WRAP", "")
    classes = {name.strip() for name in given.split(",") if name.strip()}
    if classes and classes != WRAPPED:
        raise ValueError(
            f"accelerate launch was configured with fsdp_transformer_layer_cls_to_wrap={given}; this shards "
            f"{' and '.join(sorted(WRAPPED))}: name those, or leave it out"
        )
    return True


def check_processes(count: int) -> None:
    """Raises ValueError unless there are several processes."""
    if count < 2:
        raise ValueError(
            "shard=true spreads the base over several processes, and this is one: start it with accelerate launch "
            "--multi_gpu --num_processes 2 ..., or set shard=false (and do not configure accelerate for FSDP)"
        )


def check_adapter(wrapped: peft.PeftModel) -> None:
    """Raises ValueError for an adapter that is computed from the base's weights, which are nowhere whole."""
    for name, config in wrapped.peft_config.items():
        if name.endswith(INITIAL):
            kind, why = "PiSSA (adapter=pissa)", "begins as the largest directions of the base's weights"
        elif getattr(config, "use_dora", False):
            kind, why = "DoRA (adapter=dora)", "measures the rows of the base's weights"
        else:
            continue
        raise ValueError(
            f"shard=true cannot be together with a {kind}, which {why}: they are nowhere whole when the base is "
            "sharded. Take adapter=lora, rslora, loha, lokr or oft, or set shard=false"
        )


def sharder(device: torch.device) -> Callable[[nn.Module], None]:
    """A function that keeps this process's share of a block, or of a model whose blocks are sharded, in place.

    Called by all processes.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))

    def shard(module: nn.Module) -> None:
        if isinstance(module, Transformer):  # layers that run once are not held until the model is done
            for child in module.children():
                # a linear itself, `txt_in`, may come to lie in an adapter that reads its weight and does not call it
                if not isinstance(child, nn.ModuleList | nn.Linear):
                    fully_shard(child, mesh=mesh, reshard_after_forward=True)
        fully_shard(module, mesh=mesh, reshard_after_forward=True)

    return shard


def shares(model: nn.Module) -> int:
    """Bytes of the base that this process holds between steps."""
    return sum(
        parameter.to_local().nbytes if isinstance(parameter, DTensor) else parameter.nbytes
        for parameter in model.parameters()
        if not parameter.requires_grad
    )


def whole_size(model: nn.Module) -> int:
    """Bytes of the base, of which each process holds a share."""
    return sum(
        parameter.numel() * parameter.element_size() for parameter in model.parameters() if not parameter.requires_grad
    )


def attached(attach: Callable[..., T], *arguments: Any, **settings: Any) -> T:
    """`attach(...)` of an adapter to a sharded model.

    Raises ValueError for one whose beginning is computed from the base's weights, which are nowhere whole.
    """
    reads = ValueError(
        "shard=true: this adapter begins with what it computes from the base's weights (DoRA and PiSSA do), which are "
        "nowhere whole when the base is sharded: take adapter=lora, or another of docs/adapters.md, or set shard=false"
    )
    try:
        wrapped = attach(*arguments, **settings)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        if "DTensor" in str(error):
            raise reads from error
        raise
    if any(isinstance(parameter, DTensor) for parameter in wrapped.parameters() if parameter.requires_grad):
        raise reads
    return wrapped
