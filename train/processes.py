"""What a run finds: its processes and their device, the processor's cores, and whether the Hub can be reached."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

import huggingface_hub
import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState, GradientState
from huggingface_hub import constants as hub

from flux2.pipeline import pick_device
from flux2.sources import looks_local


def make_accelerator(device: str | None) -> Accelerator:
    """The processes and the device of this run.

    Raises ValueError for a GPU that is not there. In bfloat16 the loop autocasts by itself: a prepared model would also
    autocast where pictures are sampled, which inference does not.
    """
    chosen = pick_device(device)
    AcceleratorState._reset_state()  # a sweep runs several jobs in one process
    GradientState._reset_state()
    # without `cpu`, processes on a machine without a GPU do not find each other and train the same run twice
    accelerator = Accelerator(cpu=chosen.type == "cpu", mixed_precision="no")
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU):
        raise ValueError(
            f"accelerate launch was configured for {accelerator.distributed_type.value}; this trains on one or several "
            "GPUs, each with a whole copy of the model: accelerate launch --multi_gpu --num_processes 2 ..."
        )
    world = int(os.environ.get("WORLD_SIZE", "1"))
    assert accelerator.num_processes == world, f"{accelerator.num_processes} processes know each other, not {world}"
    launched = any(key.startswith("ACCELERATE_") for key in os.environ)
    if launched and chosen.type == "cpu" and os.environ.get("OMP_NUM_THREADS") == "1":
        # `accelerate launch` leaves one thread, and most of the machine idle
        torch.set_num_threads(max(1, cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    return accelerator


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_offline(places: Iterable[object]) -> bool:
    """Whether one of `places` may be on the Hugging Face Hub, which cannot be reached; then as with HF_HUB_OFFLINE=1.

    What was downloaded before is used then, or the error comes at once: left alone, the Hub's library would try again
    for half a minute and say so each time.
    """
    remote = any(isinstance(place, str) and not looks_local(place) for place in places)
    if not remote or hub.is_offline_mode():
        return False
    try:
        huggingface_hub.get_session().head(hub.ENDPOINT, timeout=10)
    except Exception:  # of the HTTP library that it is built on
        os.environ["HF_HUB_OFFLINE"] = "1"  # for libraries that are not imported yet
        hub.HF_HUB_OFFLINE = True
        if "datasets" in sys.modules:
            sys.modules["datasets"].config.HF_HUB_OFFLINE = True
        return True
    return False
