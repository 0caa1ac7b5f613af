"""What is kept of a block between its forward and its backward.

    none   everything: fastest, most memory
    full   only the block's input; its forward is run again in the backward

A policy is a function that runs a block, set as `Transformer.run_block`; the model itself knows of none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from flux2.model import Transformer, call


def recompute(block: nn.Module, *args: Any) -> Any:
    """Run a block under `torch.utils.checkpoint`; directly where no gradient is wanted, as in sampling."""
    if not torch.is_grad_enabled():
        return block(*args)
    return checkpoint(block, *args, use_reentrant=False)


POLICIES: dict[str, Callable[..., Any]] = {"none": call, "full": recompute}


def set_policy(model: Transformer, policy: str) -> None:
    """Choose how the blocks of `model` are run. Raises ValueError listing the policies."""
    if policy not in POLICIES:
        raise ValueError(f"memory.checkpointing={policy!r} is not a policy; choose one of {', '.join(POLICIES)}")
    model.run_block = POLICIES[policy]
