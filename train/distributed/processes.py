"""What a run finds, and what its processes do together: their device, the exchange of gradients, the sharing of work;
the processor's cores, and whether the Hub can be reached."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from flux2.utils.device import pick_device

# How long a process waits for another. One that ends is noticed at once by the launcher, so this is not for those: it
# is for long work that one does while others wait, such as what is encoded, against NCCL's ten minutes.
PATIENCE = timedelta(hours=2)

T = TypeVar("T")
R = TypeVar("R")


def make_accelerator(device: str | None) -> Accelerator:
    """The processes and the device of this run.

    Raises ValueError for a GPU that is not there. In bfloat16 the loop autocasts by itself: a prepared model would also
    autocast where pictures are sampled, which inference does not.
    """
    chosen = pick_device(device)
    AcceleratorState._reset_state()  # a sweep runs several jobs in one process
    GradientState._reset_state()
    # without `cpu`, processes on a machine without a GPU do not find each other and train the same run twice
    with without_fsdp():
        accelerator = Accelerator(
            cpu=chosen.type == "cpu",
            mixed_precision="no",
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=PATIENCE),
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),  # or gradients are held twice
            ],
        )
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        raise ValueError(
            f"accelerate launch was configured for {accelerator.distributed_type.value}; this trains on one or several "
            "GPUs, each with the whole model or a share of it: accelerate launch --multi_gpu --num_processes 2 ..., "
            "and shard=true for the latter"
        )
    world = int(os.environ.get("WORLD_SIZE", "1"))
    assert accelerator.num_processes == world, f"{accelerator.num_processes} processes know each other, not {world}"
    if not accelerator.is_main_process:
        warnings.simplefilter("ignore")  # what libraries find in the pictures, they find in the first process too
    launched = any(key.startswith("ACCELERATE_") for key in os.environ)
    if launched and chosen.type == "cpu" and os.environ.get("OMP_NUM_THREADS") == "1":
        # `accelerate launch` leaves one thread, and most of the machine idle
        torch.set_num_threads(max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    return accelerator


@contextmanager
def without_fsdp() -> Iterator[None]:
    """Within this context Accelerate does not see that it was launched for FSDP.

    The base is sharded by train/distributed/sharding.py, with or without GPUs; Accelerate would wrap the adapter too,
    and without GPUs it would do nothing, and not say so.
    """
    asked = os.environ.pop("ACCELERATE_USE_FSDP", None)
    try:
        yield
    finally:
        if asked is not None:
            os.environ["ACCELERATE_USE_FSDP"] = asked


class ProcessesDiverged(RuntimeError):  # noqa: N818
    """A process failed within a forward of all: the others wait for it there, and it cannot go on."""


@dataclass(frozen=True)
class Processes:
    """What the processes of a run do together.

    Attributes:
        sharded: whether each holds a share of the base (train/distributed/sharding.py). A forward is then one of all
        processes.
    """

    accelerator: Accelerator
    sharded: bool = False

    def wrap(self, wrapped: nn.Module) -> nn.Module:
        """What is called in place of the model with its adapter, so that gradients are averaged.

        The frozen base is the same in all processes, as they read it from the same files: nothing of it is sent. The
        adapter becomes that of the main process.
        """
        if self.sharded:
            with torch.no_grad():
                for parameter in trained(wrapped):
                    torch.distributed.broadcast(parameter, 0)
            return wrapped
        named = chain(wrapped.named_parameters(), wrapped.named_buffers())
        frozen = [name for name, tensor in named if not tensor.requires_grad]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(wrapped, frozen)
        # where the model is, it stays; a graph that may change from step to step is not said to be static
        return self.accelerator.prepare_model(wrapped, device_placement=False)

    def average_gradients(self, wrapped: nn.Module) -> None:
        """After the last micro-batch: the mean over all processes, if `wrap` did not see to it. One message a dtype."""
        if not self.sharded:
            return
        gradients = [parameter.grad for parameter in trained(wrapped) if parameter.grad is not None]
        for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
            own = [gradient for gradient in gradients if gradient.dtype == dtype]
            together = torch.cat([gradient.flatten() for gradient in own]).div_(self.accelerator.num_processes)
            torch.distributed.all_reduce(together)
            parts = together.split([gradient.numel() for gradient in own])
            torch._foreach_copy_(own, [part.view_as(gradient) for part, gradient in zip(parts, own, strict=True)])

    def map(self, do: Callable[[T], R], work: Sequence[T]) -> list[R]:
        """`do` of each of `work`, in this order, in every process; each does its share. Called by all.

        With a sharded base `do` must make as many forwards for each of `work`, and who has less of it does some twice.

        Raises:
            ProcessesDiverged: `do` failed and the base is sharded.
            RuntimeError: `do` failed in another process; in that one it is the error itself.
        """
        count, own = self.accelerator.num_processes, self.accelerator.process_index
        if count == 1:
            return [do(one) for one in work]
        rounds = -(-len(work) // count)
        done: dict[int, R] = {}
        failed: Exception | None = None
        try:
            for place in range(own, rounds * count, count):
                if place < len(work):
                    done[place] = do(work[place])
                elif self.sharded:
                    do(work[-1])
        except Exception as error:
            if self.sharded:
                raise ProcessesDiverged(f"{type(error).__name__}: {error}") from error
            failed = error
        found: list[Any] = [None] * count
        said = None if failed is None else f"{type(failed).__name__}: {failed}"
        torch.distributed.all_gather_object(found, (done, said))
        if failed is not None:
            raise failed
        for process, (_, said) in enumerate(found):
            if said is not None:
                raise RuntimeError(f"process {process} failed: {said}")
        everything = {place: result for results, _ in found for place, result in results.items()}
        return [everything[place] for place in range(len(work))]


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


Share = Callable[[Callable[[Any], Any], Sequence[Any]], list[Any]]


def alone(do: Callable[[Any], Any], work: Sequence[Any]) -> list[Any]:
    """`do` of each of `work`, in this process; of several, `Processes.map` shares it."""
    return [do(one) for one in work]
