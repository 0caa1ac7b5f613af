"""Objects reused between the jobs of a sweep that run one after another in one process.

The transformer without its adapter, the autoencoder of the sample grids and the prepared data are kept for a next job
with the same settings. If its settings differ, the old object is freed first, so that only one large model is in
memory. A job that fails leaves none of its objects to the next one, because their state is unknown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeVar

import peft
import torch
from torch import Tensor, nn

from flux2 import adapters
from flux2.memory.block_offload import Offloader
from flux2.models.transformer import Transformer
from train.distributed.sharding import is_sharded
from train.utils.memory import free_memory

T = TypeVar("T")
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class SharedObjects:
    """Objects by name, each with the key of the settings it was built from."""

    def __init__(self) -> None:
        self._stored: dict[str, tuple[object, Any]] = {}  # of the previous job
        self._taken: dict[str, tuple[object, Any]] = {}  # of this job
        self.keeps = False  # whether this job's objects are kept for the next one

    @contextmanager
    def job(self, keeps: bool) -> Iterator[None]:
        """Context manager of a job: if it `keeps`, its objects are stored for the next job, except after an error."""
        self.keeps, self._taken = keeps, {}
        try:
            yield
            self._stored |= self._taken
        finally:
            self.keeps, self._taken = False, {}

    def take(self, name: str, key: object, make: Callable[[], T], say: Callable[[str], None], called: str = "") -> T:
        """Return the previous job's object `name` if its key equals `key`; otherwise free it and call `make`.

        `key` holds the object's settings; `say` receives a line, with the name `called`, when it is used again.
        """
        if name in self._stored and self._stored[name][0] == key:
            thing = self._stored.pop(name)[1]
            say(f"using the {called or name} of the previous job")
        else:
            self.free(name)
            thing = make()
        if self.keeps:
            self._taken[name] = key, thing
        return thing

    def drop(self, name: str) -> None:
        """Do not keep this job's object `name` for the next job."""
        self._taken.pop(name, None)

    def free(self, *names: str) -> None:
        """Release the previous job's objects `names`, or all of them."""
        found = [self._stored.pop(name) for name in names or list(self._stored) if name in self._stored]
        if found:
            del found
            free_memory()

    def held(self, device: torch.device) -> int:
        """Return the bytes on `device` of the previous job's models, which are freed if this job needs others."""
        models = [thing for _, thing in self._stored.values() if isinstance(thing, Base | nn.Module)]
        tensors = chain.from_iterable(tensors_of(m.transformer if isinstance(m, Base) else m) for m in models)
        kind, index = device.type, device.index
        return sum(t.nbytes for _, t in tensors if t.device.type == kind and index in (None, t.device.index))


SHARED = SharedObjects()  # the only state that jobs of this process share


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(model.named_parameters(), model.named_buffers())


def checksum(tensor: Tensor) -> int:
    """Return the sum of the elements, read as integers: a tensor that was modified has nearly always another sum."""
    tensor = tensor.detach()
    return int(tensor.view(INTEGERS[tensor.element_size()]).sum(dtype=torch.int64))


def state_of(model: nn.Module) -> list[tuple[object, ...]]:
    """Return the modules and tensors of a model with their checksums, to detect changes."""
    modules = [(name, type(module)) for name, module in model.named_modules()]
    tensors = [
        (name, tensor.shape, tensor.dtype, tensor.requires_grad, checksum(tensor)) for name, tensor in tensors_of(model)
    ]
    return [*modules, *tensors]


@dataclass
class Base:
    """A transformer that is trained with one adapter after another."""

    transformer: Transformer
    check: bool = True  # record the state without an adapter now, to compare when an adapter is removed
    offloader: Offloader | None = None  # streams its blocks

    def __post_init__(self) -> None:
        self.before = state_of(self.transformer) if self.check else []

    def remove_adapter(self, wrapped: peft.PeftModel) -> bool:
        """Remove the adapter; return whether the transformer is unchanged, bit for bit, and can be trained again."""
        if any(is_sharded(tensor) for _, tensor in tensors_of(wrapped)):
            return False  # sharded across devices
        adapters.detach(wrapped)
        self.transformer.requires_grad_(False).eval()
        return state_of(self.transformer) == self.before
