"""One model on several devices: each holds consecutive blocks, and the tokens move from one device to the next.

    first device    img_in, txt_in, the time embedding, modulation, the first blocks
    ...             the next blocks
    last device     the last blocks and the final layer, whose prediction returns to the first device

The devices compute one after the other, so a split adds memory and no speed. It is the model's `run_block` that moves
the tokens, outside of any recompute policy: a policy keeps the inputs of a block on the device of that block.
`Tensor.to` is differentiable, and its backward moves the gradient back. Modulation and rotary angles, which all blocks
read, are copied once per forward and device.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from flux2.models.transformer import Transformer
from flux2.models.variants import TransformerConfig


def check_split(config: TransformerConfig, split: Sequence[int], key: str = "split") -> None:
    """Raise ValueError unless the numbers of blocks in `split` add up to those of the model; `key` is the setting."""
    if sum(split) != config.double_blocks + config.single_blocks:
        raise ValueError(
            f"{key}={list(split)} has {sum(split)} blocks, and the model has {config.double_blocks} double and "
            f"{config.single_blocks} single blocks. Give numbers that add up to "
            f"{config.double_blocks + config.single_blocks}."
        )


def split_devices(first: torch.device, count: int | None = None, setting: str = "split=auto") -> list[torch.device]:
    """Return `count` GPUs, by default all that are visible: `first`, then the others in order.

    Raises ValueError, naming the `setting`, if `first` is no GPU, or if fewer than `count`, or two, are visible.
    """
    key = setting.partition("=")[0]
    if first.type != "cuda":
        raise ValueError(f"{setting} divides a model over GPUs, and this is device={first}. Set {key}=null.")
    visible, needed = torch.cuda.device_count(), count or 2
    if visible < needed:
        raise ValueError(
            f"{setting} needs {needed} GPUs, and PyTorch sees {visible}. Set {key}=null, or make more visible."
        )
    index = first.index or 0
    order = [index, *(other for other in range(visible) if other != index)]
    return [torch.device("cuda", other) for other in order[:count]]


def module_devices(
    config: TransformerConfig, split: Sequence[int], devices: Sequence[torch.device]
) -> dict[str, torch.device]:
    """Return the device of each module that is not on the first of `devices`; see `Transformer.devices`.

    Args:
        split: Number of blocks on each device, in the order of the forward.
    """
    stops = list(accumulate(split))
    owner = [device for device, count in zip(devices, split, strict=True) for _ in range(count)]
    blocks = dict(zip(config.block_names, owner, strict=True))
    later = {name: blocks[name] for name in config.block_names[stops[0] :]}
    return {**later, "final_layer": devices[-1]}


class SplitRunner:
    """Runs each block of a model on its device: the model's `run_block`, around the one that it had."""

    def __init__(self, model: Transformer) -> None:
        self.run_inside = model.run_block
        names = model.config.block_names
        self.devices = {model.get_submodule(name): model.device_of(name) for name in names}
        self.first, self.last = model.get_submodule(names[0]), model.get_submodule(names[-1])
        self.copies: dict[tuple[int, torch.device], tuple[Any, Any]] = {}  # what blocks share, and its copy

    def __call__(self, block: nn.Module, *args: Any) -> Any:
        """Run a block with its tokens, and what all blocks share, on its device."""
        device = self.devices[block]
        if block is self.first:
            self.copies.clear()  # of a forward that failed
        moved = [arg.to(device) if isinstance(arg, Tensor) else self.copy(arg, device) for arg in args]
        if block is self.last:
            self.copies.clear()
        # kernels that are not PyTorch's, such as Triton's, run on the current device
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            return self.run_inside(block, *moved)

    def copy(self, shared: Any, device: torch.device) -> Any:
        """Return modulation or rotary angles, tensors in lists and tuples, on `device`: one copy in a forward."""
        key = id(shared), device  # the object is stored too, so that no other one has its id
        if key not in self.copies:
            self.copies[key] = shared, tree_map_only(Tensor, lambda tensor: tensor.to(device), shared)
        return self.copies[key][1]


def split_model(model: Transformer, devices: Mapping[str, torch.device]) -> None:
    """Compute the modules `devices` of `model` on their devices, in place; all others stay on that of `img_in`.

    Set the recompute policy (`activation_checkpointing.set_policy`) and attach a trained adapter before, and call this
    again after either. Loading (`load_transformer`) takes the same `devices`, so that only adapters move here.
    """
    if not devices:
        return
    model.devices = dict(devices)
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        tensor.data = tensor.data.to(model.device_of(name))
    model.run_block = SplitRunner(model)
