"""Offload of transformer blocks to host memory, from where they stream to the device, in training and inference.

A chosen number of blocks, spread evenly over the depth, keep their frozen weights in host memory in any precision, as
one contiguous array of bytes per block. A block is copied into one of a few buffers on the device
(flux2/memory/ring_buffer.py) before it runs, and again before its backward:

    run_block   Signal    the block, under any recompute policy   Signal
    backward    release   its recompute and its gradients         begin_backward

`Signal` is the identity. Its backward at the block's output marks the start of the block's backward, and the one at its
input marks the end, whatever policy of activation_checkpointing.py is in between. While a block is in use, its
parameters are views of the buffer; otherwise they are views of the host memory. Trained weights and adapters stay on
the device.

A view of a weight that autograd keeps (a plain linear keeps one for its input gradient) would be a view of the buffer,
which holds another block by then. Autograd therefore keeps a function that returns the view when it is needed; it is an
error if the block is not on the device then.

The same hooks can send the blocks' inputs, all that full recompute keeps, to host memory until the backward.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from flux2.adapters.tuners import adapter_layers, layer_adapter_tensors
from flux2.memory.activation_offload import ActivationPool, OffloadedActivation
from flux2.memory.ring_buffer import ALIGNMENT, RING, Copier, Order, Ring, copier_for
from flux2.models.transformer import Transformer
from flux2.models.variants import TransformerConfig


def check_offload_blocks(blocks: Any, key: str = "offload_blocks") -> None:
    """Raise ValueError unless `blocks` is an integer >= 0 or a share from 0.0 to 1.0; `key` is the setting's name."""
    is_count = isinstance(blocks, int) and not isinstance(blocks, bool) and blocks >= 0
    if not is_count and not (isinstance(blocks, float) and 0 <= blocks <= 1):
        raise ValueError(f"{key}={blocks!r} must be a number of blocks (an integer >= 0) or a share from 0.0 to 1.0")


def offloaded_blocks(config: TransformerConfig, blocks: int | float, key: str = "offload_blocks") -> list[str]:
    """Return the names of the blocks that stream, spread evenly, in the order of the forward.

    Args:
        blocks: Number of blocks, or a share of all from 0.0 to 1.0, rounded up. Anything else raises ValueError.
        key: Name of the setting, for errors.
    """
    check_offload_blocks(blocks, key)
    names, total = config.block_names, len(config.block_names)
    count = math.ceil(blocks * total - 1e-9) if isinstance(blocks, float) else blocks
    if count > total:
        raise ValueError(f"{key}={blocks} is more than the model's {total} blocks: give 0 to {total}, or 0.0 to 1.0")
    # the first of two stays on the device, so that its compute hides the copy of the second
    return [names[(2 * i + 1) * total // (2 * count)] for i in range(count)]


def streamed_tensors(block: nn.Module) -> list[Tensor]:
    """Return the tensors of a block that stream: every buffer and frozen parameter, except those of adapters."""
    adapters = {id(tensor) for layer in adapter_layers(block).values() for tensor in layer_adapter_tensors(layer)}
    tensors = chain(block.parameters(), block.buffers())
    return [tensor for tensor in tensors if not tensor.requires_grad and id(tensor) not in adapters]


class StreamedBlock:
    """A block that streams.

    Attributes:
        index: Its position among the blocks that stream.
        places: Its tensors that stream, each with its offset in the bytes of the block and its strides there.
        host: Its bytes in host memory.
        in_use: Whether its parameters are views of a buffer on the device.
    """

    def __init__(self, name: str, index: int, block: nn.Module, copier: Copier) -> None:
        self.name, self.index, self.in_use = name, index, False
        self.places: list[tuple[Tensor, int, tuple[int, ...]]] = []
        size = 0
        for tensor in streamed_tensors(block):
            stride = torch.empty_like(tensor, device="meta").stride()  # the same memory layout, but without gaps
            self.places.append((tensor, size, stride))
            size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        self.host = copier.host(size)
        for tensor, view in self.views(self.host):
            view.copy_(tensor.detach())
        self.point_to(self.host)
        block.register_forward_pre_hook(self.check)

    def views(self, memory: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each tensor and its values in `memory`, (size,) uint8 that starts with the block's bytes."""
        for tensor, offset, stride in self.places:
            part = memory[offset : offset + tensor.nbytes].view(tensor.dtype)
            yield tensor, part.as_strided(tensor.shape, stride)

    @torch.no_grad()
    def point_to(self, memory: Tensor) -> None:
        for tensor, view in self.views(memory):
            tensor.data = view

    def check(self, *_: Any) -> None:
        """Raise RuntimeError if the block is not on the device; a hook before its forward."""
        if not self.in_use:
            raise RuntimeError(
                f"{self.name} was run while its weights are in host memory: only the model's run_block loads them. "
                "Run the whole model, and call set_policy before offload, not after it."
            )


@dataclass
class BlockRun:
    """One run of a block that has a backward: the run before it, and its inputs in host memory."""

    before: BlockRun | None
    inputs: list[OffloadedActivation] = field(default_factory=list)


class Signal(torch.autograd.Function):
    """The identity on `tensors`, which calls `callback` once all their gradients are known."""

    @staticmethod
    def forward(ctx: Any, callback: Callable[[], None], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.callback = callback
        ctx.set_materialize_grads(False)
        return tensors

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.callback()
        return None, *gradients


class Offloader:
    """Streams blocks of `model` and offloads its activations from now on; created by `offload`.

    The base's weights must not be changed meanwhile, because copies on the device would keep the old values.
    `adapters.merge` therefore refuses such a model.

    Attributes:
        blocks: The blocks that stream, in the order of the forward.
        ring: The buffers on the device; counts copies and bytes.
        activation_pool: The activations in host memory, or None.
    """

    def __init__(
        self,
        model: Transformer,
        names: Sequence[str],
        device: torch.device,
        copier: Copier,
        pool: ActivationPool | None,
        ring: int,
    ) -> None:
        self.device, self.activation_pool = device, pool
        self.first_block = model.double_blocks[0]
        self.last_run: Callable[[], BlockRun | None] = lambda: None
        self.block_in_use: StreamedBlock | None = None
        modules = [model.get_submodule(name) for name in names]
        self.blocks = [StreamedBlock(name, i, modules[i], copier) for i, name in enumerate(names)]
        self.streamed_blocks = dict(zip(modules, self.blocks, strict=True))
        self.ring = Ring([streamed.host for streamed in self.blocks], copier, ring)
        self.buffers = {slot.buffer.untyped_storage().data_ptr() for slot in self.ring.slots}
        self.reattach(model)
        model.has_offloaded_blocks = bool(self.blocks)

    def reattach(self, model: Transformer) -> None:
        """Stream `model` again after a recompute policy was set or another adapter was attached."""
        self.run_inside = model.run_block
        streaming = {id(tensor) for streamed in self.blocks for tensor, _, _ in streamed.places}
        for tensor in chain(model.parameters(), model.buffers()):
            if id(tensor) not in streaming:
                tensor.data = tensor.data.to(self.device)
        model.run_block = self.run_block

    @property
    def host_bytes(self) -> int:
        """Return the bytes of weights in host memory."""
        return sum(streamed.host.nbytes for streamed in self.blocks)

    @property
    def ring_bytes(self) -> int:
        """Return the bytes of the buffers on the device."""
        return sum(slot.buffer.nbytes for slot in self.ring.slots)

    def __str__(self) -> str:
        """Return one line about what is offloaded."""
        blocks = (
            f"{len(self.blocks)} blocks stream: {self.host_bytes / 1e9:.3g} GB in host memory, "
            f"{self.ring_bytes / 1e9:.3g} GB of buffers on {self.device}"
        )
        parts = [blocks] if self.blocks else []
        if self.activation_pool is not None:
            parts.append("the blocks' inputs wait in host memory for the backward")
        return "; ".join(parts)

    def run_block(self, block: nn.Module, *args: Any) -> Any:
        """Run a block under the policy that was set, with its weights on the device: the model's `run_block`."""
        streamed = self.streamed_blocks.get(block)
        if not torch.is_grad_enabled():
            with self.on_device(streamed, "sample"):
                return self.run_inside(block, *args)
        if streamed is None and self.activation_pool is None:
            return self.run_inside(block, *args)

        run = BlockRun(None if block is self.first_block else self.last_run())
        self.last_run = weakref.ref(run)  # only the graph keeps the run alive
        indices = [i for i, arg in enumerate(args) if isinstance(arg, Tensor)]
        inputs = Signal.apply(lambda: self.release(streamed), *(args[i] for i in indices))
        replaced = dict(zip(indices, inputs, strict=True))
        with self.on_device(streamed, "forward"), saved_tensors_hooks(self.packer(streamed, run, inputs), unpack):
            outputs = self.run_inside(block, *(replaced.get(i, arg) for i, arg in enumerate(args)))
        several = isinstance(outputs, tuple)
        outputs = Signal.apply(lambda: self.begin_backward(streamed, run), *(outputs if several else (outputs,)))
        return outputs if several else outputs[0]

    @contextmanager
    def on_device(self, streamed: StreamedBlock | None, order: Order) -> Iterator[None]:
        """Context manager in which the weights of a block are on the device."""
        self.load(streamed, order)
        try:
            yield
        finally:
            self.release(streamed)

    def load(self, streamed: StreamedBlock | None, order: Order) -> None:
        if streamed is not None:
            self.release(self.block_in_use)  # the first block's backward may have no end, nor has one that failed
            streamed.point_to(self.ring.use(streamed.index, order))
            streamed.in_use, self.block_in_use = True, streamed

    def release(self, streamed: StreamedBlock | None) -> None:
        if streamed is not None and streamed is self.block_in_use:
            streamed.point_to(streamed.host)
            streamed.in_use, self.block_in_use = False, None
            self.ring.release()

    def begin_backward(self, streamed: StreamedBlock | None, run: BlockRun) -> None:
        """Load a block whose output gradients are known, and fetch its inputs and those of the block before it."""
        self.load(streamed, "backward")
        for activation in run.inputs + (run.before.inputs if run.before else []):
            activation.fetch()
        run.inputs.clear()

    def packer(
        self, streamed: StreamedBlock | None, run: BlockRun, inputs: Sequence[Tensor]
    ) -> Callable[[Tensor], Any]:
        """Return the function that maps a tensor to what autograd keeps in one run of a block: see `unpack`."""
        pool = self.activation_pool
        # autograd keeps `pack` as long as what it packed, so it refers to no tensor on the device
        addresses = set() if pool is None else {memory_address(tensor) for tensor in inputs}
        offloaded: WeakValueDictionary[Any, OffloadedActivation] = WeakValueDictionary()

        def pack(tensor: Tensor) -> Any:
            if streamed is not None and tensor.untyped_storage().data_ptr() in self.buffers:
                dtype, layout = tensor.dtype, (tensor.shape, tensor.stride(), int(tensor.storage_offset()))
                return lambda: self.buffer_of(streamed).view(dtype).as_strided(*layout)
            address = memory_address(tensor)
            if pool is None or address not in addresses:
                return tensor.detach()  # an output with its history would keep its own graph until the backward
            activation = offloaded.get(address)
            if activation is None:
                activation = offloaded[address] = OffloadedActivation(tensor, pool)
                run.inputs.append(activation)
            return activation.get

        return pack

    def buffer_of(self, streamed: StreamedBlock) -> Tensor:
        """Return the buffer that holds a block. Raise RuntimeError if the block is not in use."""
        slot = self.ring.slot(streamed.index) if streamed is self.block_in_use else None
        if slot is None:
            raise RuntimeError(
                f"the backward of {streamed.name} reads a weight that is in host memory. Blocks stream one at a "
                "time: differentiate through the whole model, with one backward."
            )
        return slot.buffer


def memory_address(tensor: Tensor) -> tuple[int, torch.Size, torch.dtype]:
    """Return equal keys for tensors of one shape and dtype at the same address."""
    return tensor.data_ptr(), tensor.shape, tensor.dtype


def unpack(packed: Tensor | Callable[[], Tensor]) -> Tensor:
    """Return the tensor for which a function of `Offloader.packer` returned `packed`."""
    return packed if isinstance(packed, Tensor) else packed()


def offload(
    model: Transformer,
    blocks: int | float = 0,
    *,
    activations: bool = False,
    device: torch.device | str | None = None,
    ring: int = RING,
    copier: Callable[[torch.device], Copier] | None = None,
) -> Offloader | None:
    """Stream blocks of `model` from host memory from now on, in place. Return None if nothing is to be offloaded.

    Set the recompute policy (`activation_checkpointing.set_policy`) and attach a trained adapter before.

    Args:
        blocks: Number or share of blocks, as in `offloaded_blocks`. They may be on the device or in host memory.
        activations: Whether the blocks' inputs are in host memory between forward and backward.
        device: Device on which the model computes, by default that of its first layer. All other weights move there.
        ring: Number of buffers on the device.
        copier: Returns a copier for the device, one for weights and one for activations. By default `copier_for`.
    """
    names = offloaded_blocks(model.config, blocks)
    if not names and not activations:
        return None
    target = model.img_in.weight.device if device is None else torch.device(device)
    make = copier or copier_for
    return Offloader(model, names, target, make(target), ActivationPool(make(target)) if activations else None, ring)
