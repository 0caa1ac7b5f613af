"""The device and the processes of a run: averaging of gradients, and distribution of work."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType, InitProcessGroupKwargs
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import patch_environment
from torch import nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors
from torch.nn.parallel import DistributedDataParallel

from flux2.adapters import adapter_parameters
from flux2.utils.device import pick_device
from train.utils.console import warn

# Timeout of collective operations instead of NCCL's ten minutes, for long work of one process such as encoding. The
# launcher notices a process that ends at once.
PATIENCE = timedelta(hours=2)

INSTEAD = "Use accelerate launch --multi_gpu --num_processes 2 ..., and shard=true to shard the model"

T = TypeVar("T")
R = TypeVar("R")


def check_launcher(environment: Mapping[str, str]) -> None:
    """Warn about settings of `accelerate launch` that have no effect here. Raise ValueError for other libraries."""
    for library in ("DEEPSPEED", "MEGATRON_LM"):
        if environment.get(f"ACCELERATE_USE_{library}", "false").lower() == "true":
            raise ValueError(f"accelerate launch was configured for {library}, which is not supported. {INSTEAD}")
    if environment.get("LOCAL_RANK", "0") != "0":
        return
    for name, off, key in (
        ("MIXED_PRECISION", "no", "precision"),
        ("GRADIENT_ACCUMULATION_STEPS", "1", "gradient_accumulation"),
        ("DYNAMO_BACKEND", "no", "memory.compile"),
    ):
        if (value := environment.get(f"ACCELERATE_{name}", off)).lower() != off:
            warn(f"{name.lower()}={value} of accelerate has no effect: {key} decides")


def make_accelerator(device: str | None) -> Accelerator:
    """Return the Accelerator with the processes and the device of this run.

    Raises ValueError for a GPU that does not exist. Mixed precision stays off, because the loop autocasts by itself: a
    prepared model would also autocast when it draws samples, which inference does not.
    """
    chosen = pick_device(device)
    check_launcher(os.environ)
    AcceleratorState._reset_state()  # a sweep runs several jobs in one process
    GradientState._reset_state()
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    environment = {"ACCELERATE_USE_FSDP": "false", "ACCELERATE_DYNAMO_BACKEND": "no"}
    if chosen.index is not None:
        if not alone:
            raise ValueError(
                f"device={device} is one GPU, but several processes were started, each on a GPU of its own. Give "
                "device=cuda, and choose the GPUs by the environment: CUDA_VISIBLE_DEVICES=1,2"
            )
        environment["ACCELERATE_TORCH_DEVICE"] = str(chosen)
    if chosen.type == "cuda" and alone:
        torch.cuda.set_device(chosen.index or 0)  # what takes the current GPU takes this one
    group: dict[str, Any] = {"timeout": PATIENCE}
    if chosen.type == "cuda" and not alone and not torch.distributed.is_nccl_available():
        group["backend"] = "gloo"  # Windows: gradients are averaged by the CPU
    # train/distributed/sharding.py shards the base, with or without GPUs; Accelerate would also wrap the adapter, and
    # without GPUs it would silently do nothing
    with patch_environment(**environment):
        accelerator = Accelerator(
            cpu=chosen.type == "cpu",  # else processes without a GPU do not connect and train the same run twice
            mixed_precision="no",
            kwargs_handlers=[
                InitProcessGroupKwargs(**group),
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),  # avoids a second copy of gradients
            ],
        )
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        raise ValueError(
            f"accelerate launch was configured for {accelerator.distributed_type.value}, which is not supported. "
            f"{INSTEAD}"
        )
    world = int(os.environ.get("WORLD_SIZE", "1"))
    assert accelerator.num_processes == world, f"{accelerator.num_processes} processes are connected, not {world}"
    if not accelerator.is_main_process:
        warnings.simplefilter("ignore")  # the first process shows the same warnings of libraries
    launched = any(key.startswith("ACCELERATE_") for key in os.environ)
    if launched and chosen.type == "cpu" and os.environ.get("OMP_NUM_THREADS") == "1":
        # `accelerate launch` sets one thread, which leaves most cores idle
        torch.set_num_threads(max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    return accelerator


class ProcessesDiverged(RuntimeError):  # noqa: N818
    """A process failed during a collective forward, in which the others wait for it."""


@dataclass(frozen=True)
class Processes:
    """Collective operations of the processes of a run."""

    accelerator: Accelerator
    sharded: bool = False  # each process holds a shard of the base, and every forward is a collective operation

    def wrap(self, wrapped: nn.Module) -> nn.Module:
        """Return a wrapper of the model with its adapter that averages gradients.

        The adapter is copied from the main process. The frozen base is not: all processes read it from the same files.
        """
        if self.sharded:
            with torch.no_grad():
                for parameter in adapter_parameters(wrapped):
                    torch.distributed.broadcast(parameter, 0)
            return wrapped
        named = chain(wrapped.named_parameters(), wrapped.named_buffers())
        frozen = [name for name, tensor in named if not tensor.requires_grad]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(wrapped, frozen)
        # the model is on its device already
        return self.accelerator.prepare_model(wrapped, device_placement=False)

    def average_gradients(self, wrapped: nn.Module) -> None:
        """Average gradients after the last micro-batch, unless the wrapper did; one collective operation per dtype."""
        if not self.sharded:
            return
        gradients = [parameter.grad for parameter in adapter_parameters(wrapped) if parameter.grad is not None]
        for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
            own = [gradient for gradient in gradients if gradient.dtype == dtype]
            flat = _flatten_dense_tensors(own).div_(self.accelerator.num_processes)
            torch.distributed.all_reduce(flat)
            torch._foreach_copy_(own, _unflatten_dense_tensors(flat, own))

    def map(self, do: Callable[[T], R], work: Sequence[T]) -> list[R]:
        """Return `do(item)` for all items of `work` in every process; each computes its share. All must call it.

        With a sharded base `do` must make equally many forwards for each item, and processes with fewer items repeat
        the last one. If `do` fails, raises ProcessesDiverged with a sharded base; otherwise its own exception in its
        process, and RuntimeError in the others.
        """
        count, own = self.accelerator.num_processes, self.accelerator.process_index
        if count == 1:
            return [do(one) for one in work]
        done: dict[int, R] = {}
        failed: Exception | None = None
        try:
            for index in range(own, math.ceil(len(work) / count) * count, count):
                if index < len(work):
                    done[index] = do(work[index])
                elif self.sharded:
                    do(work[-1])
        except Exception as error:
            if self.sharded:
                raise ProcessesDiverged(f"{type(error).__name__}: {error}") from error
            failed = error
        gathered: list[Any] = [None] * count
        message = None if failed is None else f"{type(failed).__name__}: {failed}"
        torch.distributed.all_gather_object(gathered, (done, message))
        if failed is not None:
            raise failed
        for process, (_, message) in enumerate(gathered):
            if message is not None:
                raise RuntimeError(f"process {process} failed: {message}")
        results = {index: result for part, _ in gathered for index, result in part.items()}
        return [results[index] for index in range(len(work))]


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


Share = Callable[[Callable[[Any], Any], Sequence[Any]], list[Any]]


def map_serially(do: Callable[[Any], Any], work: Sequence[Any]) -> list[Any]:
    """Return `do(item)` for all items of `work`, in this process; `Processes.map` distributes them over several."""
    return [do(one) for one in work]
