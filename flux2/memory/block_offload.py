"""Transformer blocks that live in host memory and stream to the device, for training and for inference.

A chosen number of blocks, spread evenly over the depth, keep their frozen weights in host memory, one stretch of bytes
a block, in whatever precision. A block is brought into one of a few buffers on the device (flux2/memory/ring_buffer.py)
before it runs, and again before its backward:

    run_block   Signal   the block, under any recompute policy   Signal
    backward    done     its recompute and its gradients         begin

`Signal` is the identity. Its backward at the block's output is where the block's backward begins, and that at its input
is where it is over, whatever policy of activation_checkpointing.py lies between. While a block is in use its parameters
are views of the buffer; otherwise they are those of the host memory. Trained weights and those of adapters stay on the
device.

What autograd keeps of a weight (a plain linear keeps a view of it for its input gradient) would be bytes of the buffer,
where another block will be by then. So it keeps the place, and finds the bytes when it asks for them, or an error.

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

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from flux2.adapters.tuners import adapter_layers, layer_adapter_tensors
from flux2.memory.activation_offload import ActivationPool, OffloadedActivation
from flux2.memory.ring_buffer import ALIGNMENT, RING, Copier, Order, Ring, copier_for
from flux2.models.transformer import Transformer
from flux2.models.variants import TransformerConfig

# ------------------------------------------------------------------ which blocks


def check_offload_blocks(given: Any, key: str = "offload_blocks") -> None:
    """Raises ValueError unless `given` is a whole number from 0 or a share from 0.0 to 1.0; `key` is its name."""
    whole = isinstance(given, int) and not isinstance(given, bool) and given >= 0
    if not whole and not (isinstance(given, float) and 0 <= given <= 1):
        raise ValueError(
            f"{key}={given!r} must be a number of blocks (a whole number from 0) or a share of them (from 0.0 to 1.0)"
        )


def offloaded_blocks(config: TransformerConfig, given: int | float, key: str = "offload_blocks") -> list[str]:
    """Names of the blocks that stream, in the order of the forward, spread evenly.

    Args:
        given: how many: a whole number, or a share of all from 0.0 to 1.0, rounded up to whole blocks.
        key: what the setting is called, for errors.

    Raises:
        ValueError: `given` is of another type, out of range, or more than the model has.
    """
    check_offload_blocks(given, key)
    names = config.block_names
    total = len(names)
    count = math.ceil(given * total - 1e-9) if isinstance(given, float) else given
    if count > total:
        raise ValueError(f"{key}={given} is more than the model's {total} blocks: give 0 to {total}, or 0.0 to 1.0")
    # the first of two stays on the device, so that the copy of the second has its compute to hide behind
    return [names[(2 * i + 1) * total // (2 * count)] for i in range(count)]


def streamed_tensors(block: nn.Module) -> list[Tensor]:
    """What of a block streams: every buffer and frozen parameter, but for those of adapters."""
    adapters = {id(tensor) for layer in adapter_layers(block).values() for tensor in layer_adapter_tensors(layer)}
    tensors = chain(block.parameters(), block.buffers())
    return [tensor for tensor in tensors if not tensor.requires_grad and id(tensor) not in adapters]


# ------------------------------------------------------------------ one block's bytes


@dataclass
class Place:
    """Where a tensor's bytes are in a block's stretch of them."""

    tensor: Tensor
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]

    def view(self, memory: Tensor) -> Tensor:
        """The tensor's values in `memory`, (size,) uint8 that begins with the block's bytes."""
        part = memory[self.offset : self.offset + self.tensor.nbytes].view(self.tensor.dtype)
        return part.as_strided(self.shape, self.stride)


def lay_out(block: nn.Module) -> tuple[list[Place], int]:
    """Places for all that streams of a block, and how many bytes that is."""
    places, offset = [], 0
    for tensor in streamed_tensors(block):
        stride = torch.empty_like(tensor, device="meta").stride()  # as they are, but without gaps
        places.append(Place(tensor, offset, tensor.shape, stride))
        offset += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
    return places, offset


@dataclass
class Streamed:
    """A block that streams.

    Attributes:
        index: its position among those that do.
        in_use: its parameters are those of a buffer on the device.
    """

    name: str
    index: int
    places: list[Place]
    host: Tensor
    in_use: bool = False

    @torch.no_grad()
    def point_to(self, memory: Tensor) -> None:
        for place in self.places:
            place.tensor.data = place.view(memory)

    def check(self, *_: Any) -> None:
        """A hook before the block's forward."""
        if not self.in_use:
            raise RuntimeError(
                f"{self.name} was run while its weights are in host memory: only the model's run_block brings them. "
                "Run the whole model, and call set_policy before the blocks are made to stream, not after."
            )


@dataclass
class StreamedView:
    """Stands for a view of a streamed weight that autograd keeps."""

    block: Streamed
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int  # elements


@dataclass
class BlockRun:
    """One run of a block that has a backward: what is away of its inputs, and the run before it."""

    before: BlockRun | None
    boundaries: list[OffloadedActivation] = field(default_factory=list)


class Signal(torch.autograd.Function):
    """The identity on `tensors`, which calls `then` once all their gradients are known."""

    @staticmethod
    def forward(ctx: Any, then: Callable[[], None], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.then = then
        ctx.set_materialize_grads(False)
        return tensors

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.then()
        return None, *gradients


# ------------------------------------------------------------------ the model


class Offloader:
    """Streams blocks of `model`, and sends its activations away, from now on. Use `offload` to make one.

    The base's weights must not be changed meanwhile: what is on the device would not notice. `adapters.merge` refuses.

    Attributes:
        blocks: what streams, in the order of the forward.
        ring: the buffers on the device; counts copies and bytes.
        away: the activations in host memory, or None.
    """

    def __init__(
        self,
        model: Transformer,
        names: Sequence[str],
        device: torch.device,
        copier: Copier,
        away: ActivationPool | None,
        ring: int,
    ) -> None:
        self.device, self.away = device, away
        self.first = model.double_blocks[0]
        self.last: Callable[[], BlockRun | None] = lambda: None
        self.open: Streamed | None = None
        self.blocks: list[Streamed] = []
        self.of: dict[nn.Module, Streamed] = {}
        for index, name in enumerate(names):
            block = model.get_submodule(name)
            places, size = lay_out(block)
            streamed = Streamed(name, index, places, copier.host(size))
            for place in places:
                place.view(streamed.host).copy_(place.tensor.detach())
            streamed.point_to(streamed.host)
            block.register_forward_pre_hook(streamed.check)
            self.blocks.append(streamed)
            self.of[block] = streamed
        self.ring = Ring([streamed.host for streamed in self.blocks], copier, ring) if self.blocks else None
        self.buffers = {slot.buffer.untyped_storage().data_ptr() for slot in self.ring.slots} if self.ring else set()
        self.go_on(model)
        model.streams = bool(self.blocks)

    def go_on(self, model: Transformer) -> None:
        """Stream `model` as before, after a recompute policy was set or another adapter was attached to it."""
        self.run_inside = model.run_block
        held = {id(place.tensor) for streamed in self.blocks for place in streamed.places}
        for tensor in chain(model.parameters(), model.buffers()):
            if id(tensor) not in held:
                tensor.data = tensor.data.to(self.device)
        model.run_block = self.run_block

    @property
    def host_bytes(self) -> int:
        """Of weights in host memory."""
        return sum(streamed.host.nbytes for streamed in self.blocks)

    @property
    def ring_bytes(self) -> int:
        """Of the buffers on the device."""
        return sum(slot.buffer.nbytes for slot in self.ring.slots) if self.ring else 0

    def __str__(self) -> str:
        """One line for what streams."""
        parts = []
        if self.blocks:
            parts.append(
                f"{len(self.blocks)} blocks stream: {self.host_bytes / 1e9:.3g} GB in host memory, "
                f"{self.ring_bytes / 1e9:.3g} GB of buffers on {self.device}"
            )
        if self.away is not None:
            parts.append("the blocks' inputs wait in host memory for the backward")
        return "; ".join(parts)

    def run_block(self, block: nn.Module, *args: Any) -> Any:
        """What becomes `Transformer.run_block`: run a block as before, with its weights on the device."""
        streamed = self.of.get(block)
        if not torch.is_grad_enabled():
            with self.using(streamed, "sample"):
                return self.run_inside(block, *args)
        if streamed is None and self.away is None:
            return self.run_inside(block, *args)

        visit = BlockRun(None if block is self.first else self.last())
        self.last = weakref.ref(visit)  # what lives as long as the graph is the graph's to keep
        at = [i for i, arg in enumerate(args) if isinstance(arg, Tensor)]
        inputs = Signal.apply(lambda: self.end(streamed), *(args[i] for i in at))
        passed = dict(zip(at, inputs, strict=True))
        with self.using(streamed, "forward"), saved_tensors_hooks(self.packer(streamed, visit, inputs), self.unpack):
            outputs = self.run_inside(block, *(passed.get(i, arg) for i, arg in enumerate(args)))
        several = isinstance(outputs, tuple)
        outputs = Signal.apply(lambda: self.begin(streamed, visit), *(outputs if several else (outputs,)))
        return outputs if several else outputs[0]

    # -------------------------------------------------------------- weights

    @contextmanager
    def using(self, streamed: Streamed | None, order: Order) -> Iterator[None]:
        self.bring(streamed, order)
        try:
            yield
        finally:
            self.put_back(streamed)

    def bring(self, streamed: Streamed | None, order: Order) -> None:
        if streamed is None:
            return
        self.put_back(self.open)  # a first block's backward has no end, and one that failed neither
        assert self.ring is not None
        streamed.point_to(self.ring.use(streamed.index, order))
        streamed.in_use = True
        self.open = streamed

    def put_back(self, streamed: Streamed | None) -> None:
        if streamed is None or streamed is not self.open:
            return
        assert self.ring is not None
        streamed.in_use = False
        streamed.point_to(streamed.host)
        self.open = None
        self.ring.done()

    # -------------------------------------------------------------- the backward

    def begin(self, streamed: Streamed | None, visit: BlockRun) -> None:
        """The gradients of a block's outputs are known."""
        self.bring(streamed, "backward")
        for boundary in visit.boundaries + (visit.before.boundaries if visit.before else []):
            boundary.fetch()
        visit.boundaries.clear()

    def end(self, streamed: Streamed | None) -> None:
        """The gradients of a block's inputs are known."""
        self.put_back(streamed)

    # -------------------------------------------------------------- what autograd keeps

    def packer(self, streamed: Streamed | None, visit: BlockRun, inputs: Sequence[Tensor]) -> Callable[[Tensor], Any]:
        """What is kept in place of a tensor during one run of a block."""
        leaving = {} if self.away is None else {tensor.data_ptr(): tensor for tensor in inputs}
        left: dict[int, OffloadedActivation] = {}

        def pack(tensor: Tensor) -> Any:
            if streamed is not None and tensor.untyped_storage().data_ptr() in self.buffers:
                return StreamedView(streamed, tensor.dtype, tensor.shape, tensor.stride(), int(tensor.storage_offset()))
            address = tensor.data_ptr()
            same = leaving.get(address)
            if self.away is None or same is None or (tensor.shape, tensor.dtype) != (same.shape, same.dtype):
                return tensor
            if address not in left:
                left[address] = OffloadedActivation(tensor, self.away.take(tensor.nbytes), self.away)
                visit.boundaries.append(left[address])
            return left[address]

        return pack

    def unpack(self, kept: Any) -> Tensor:
        if isinstance(kept, OffloadedActivation):
            return kept.get()
        if not isinstance(kept, StreamedView):
            return kept
        slot = self.ring.slot(kept.block.index) if self.ring and kept.block is self.open else None
        if slot is None:
            raise RuntimeError(
                f"the backward of {kept.block.name} asks for a weight while it is in host memory. Blocks stream one at "
                "a time: differentiate through the whole model, with one backward."
            )
        return slot.buffer.view(kept.dtype).as_strided(kept.shape, kept.stride, kept.offset)


def offload(
    model: Transformer,
    blocks: int | float = 0,
    *,
    activations: bool = False,
    device: torch.device | str | None = None,
    ring: int = RING,
    copier: Callable[[torch.device], Copier] | None = None,
) -> Offloader | None:
    """Let blocks of `model` stream from host memory from now on, in place; None if nothing is asked.

    The recompute policy is set before (`checkpointing.set_policy`), and an adapter that is trained is attached before.

    Args:
        blocks: how many, as in `offloaded_blocks`. They may lie on the device or in host memory.
        activations: send the blocks' inputs to host memory between forward and backward.
        device: where the model computes; by default where its first layer is. All that does not stream goes there.
        ring: buffers on the device.
        copier: makes what copies, for the device; weights and activations get one each. By default `copier_for`.

    Raises:
        ValueError: `blocks` is out of range.
    """
    names = offloaded_blocks(model.config, blocks)
    if not names and not activations:
        return None
    place = model.img_in.weight.device if device is None else torch.device(device)
    make = copier or copier_for
    return Offloader(model, names, place, make(place), ActivationPool(make(place)) if activations else None, ring)
