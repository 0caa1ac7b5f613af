"""What the jobs of a sweep leave to each other: they run one after another in one process.

The transformer of a job, without its adapter, the autoencoder of its sheets and the prepared data are kept until the
next job asks for what was made of the same settings; if it asks for another, the old one is freed first, so that only
one large model is in memory. A job that fails leaves nothing of what it had taken: in what state that is, nobody knows.
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
from torch.distributed.tensor import DTensor

from flux2 import adapters
from flux2.memory.block_offload import Offloader
from flux2.models.transformer import Transformer
from train.utils.memory import free_memory

T = TypeVar("T")
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Shared:
    """Things by name, each with the key of what it was made of.

    Attributes:
        keeps: whether what is taken now is kept for another job.
    """

    def __init__(self) -> None:
        self._kept: dict[str, tuple[object, Any]] = {}
        self._taken: dict[str, tuple[object, Any]] = {}
        self.keeps = False

    @contextmanager
    def job(self, keeps: bool) -> Iterator[None]:
        """A job of a sweep, if it `keeps`: what it takes is kept for the next one when it ends without an error."""
        self.keeps, self._taken = keeps, {}
        try:
            yield
            self._kept |= self._taken
        finally:
            self.keeps, self._taken = False, {}

    def take(self, name: str, key: object, make: Callable[[], T], say: Callable[[str], None], called: str = "") -> T:
        """What the job before left as `name` if it was made of `key`, else what `make` makes once that is freed.

        Args:
            key: compared with `==`.
            say: is told, by what it is `called`, that the one of the job before is used.
        """
        there = name in self._kept
        made_of, thing = self._kept.pop(name, (None, None))
        if there and made_of == key:
            say(f"using the {called or name} of the job before")
        else:
            del thing
            if there:
                free_memory()
            thing = make()
        if self.keeps:
            self._taken[name] = key, thing
        return thing

    def drop(self, name: str) -> None:
        """Keep what this job took as `name` for no other."""
        self._taken.pop(name, None)

    def free(self, *names: str) -> None:
        """Let go of what the job before left: of `names`, or of all."""
        found = [self._kept.pop(name) for name in names or list(self._kept) if name in self._kept]
        if found:
            del found
            free_memory()

    def held(self, device: torch.device) -> int:
        """Bytes on `device` of models that the job before left, which are free for a job that needs others."""
        models = [thing for _, thing in self._kept.values() if isinstance(thing, Base | nn.Module)]
        tensors = chain.from_iterable(tensors_of(m.transformer if isinstance(m, Base) else m) for m in models)
        return sum(tensor.nbytes for _, tensor in tensors if tensor.device.type == device.type)


SHARED = Shared()  # of this process: jobs have nothing else in common


# ------------------------------------------------------------------ the transformer


def tensors_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(model.named_parameters(), model.named_buffers())


def checksum(tensor: Tensor) -> int:
    """The sum of its bits, read as whole numbers: of one that was written to, nearly always another."""
    tensor = tensor.detach()
    return int(tensor.view(INTEGERS[tensor.element_size()]).sum(dtype=torch.int64))


def state_of(model: nn.Module) -> list[tuple[object, ...]]:
    """What tells whether a model is the one that it was: its modules and tensors, with their checksums."""
    modules = [(name, type(module)) for name, module in model.named_modules()]
    tensors = [
        (name, tensor.shape, tensor.dtype, tensor.requires_grad, checksum(tensor)) for name, tensor in tensors_of(model)
    ]
    return [*modules, *tensors]


@dataclass
class Base:
    """A transformer that is trained with one adapter after another.

    Attributes:
        check: whether its state is noted now, without an adapter, to be compared when one is taken off.
        offloader: what streams its blocks, if they do.
    """

    transformer: Transformer
    check: bool = True
    offloader: Offloader | None = None

    def __post_init__(self) -> None:
        self.before = state_of(self.transformer) if self.check else []

    def take_off(self, wrapped: peft.PeftModel) -> bool:
        """Take the adapter off; whether the transformer is then as it was, bit for bit, and can be trained again."""
        if any(isinstance(tensor, DTensor) for _, tensor in tensors_of(wrapped)):
            return False  # in pieces on several devices
        adapters.detach(wrapped)
        self.transformer.requires_grad_(False).eval()
        return state_of(self.transformer) == self.before
