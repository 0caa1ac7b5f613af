"""FLUX.2: images from text and reference images. `flux2.load("tiny").generate("a small red cup")`.

Begin with pipeline.py, which loads a model once and generates many images; models/transformer.py is the network.
"""

import ctypes
import logging
import os
import platform
import sys
from typing import TYPE_CHECKING, Any

# OpenMP threads that wait for each other spin before they sleep, with libgomp for 300,000 rounds by default: 4 ms on a
# current Intel CPU. On a busy machine most of that is lost, as the thread that is waited for does not run, and steps of
# the demo took up to 60 times as long. 10,000 rounds are as fast as the default on an idle machine. Sleeping at once
# (OMP_WAIT_POLICY=passive) makes a step half as long again there (benchmarks/busy.py). On other architectures a round
# has no pause instruction and is far shorter, so the default stays. libgomp reads the variable when torch is loaded:
# every command imports flux2 before torch.
SPIN_VARIABLES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")  # what the user sets stays
if platform.machine() in ("x86_64", "AMD64") and not os.environ.keys() & set(SPIN_VARIABLES):
    os.environ["GOMP_SPINCOUNT"] = "10000"

# The allocator's segments grow where they are, instead of being of fixed sizes: less memory is lost to fragments, and
# what is predicted to fit needs no second attempt (benchmarks/planner_simulated.py). PyTorch has this on Linux only.
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # what the user sets stays
if sys.platform == "linux" and not os.environ.keys() & set(ALLOCATOR_VARIABLES):
    os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"

# glibc gives memory that is freed at the end of its heap back to the system, at first from 128 KB on and later from at
# most 64 MB on. A step on a CPU then gets the same pages again, one fault and 4 KB of zeros at a time: some percent of
# its time. 1 GB is kept instead; tensors above 32 MB are mapped on their own, and go back when they are freed.
HEAP_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")  # what the user sets stays
if sys.platform == "linux" and not os.environ.keys() & set(HEAP_VARIABLES):
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # musl has none
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD of malloc.h
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD

# Windows writes files and pipes in a code page of 256 characters; any other one, as in a name, becomes an escape.
if sys.platform == "win32" and hasattr(sys.stdout, "reconfigure"):
    sys.stdout.reconfigure(errors="backslashreplace")

# bitsandbytes, imported by PEFT, warns on some CPUs that a kernel could not be downloaded; flux2 does not use it
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

if TYPE_CHECKING:
    from flux2.pipeline import Pipeline, load

__all__ = ["Pipeline", "load"]


def __getattr__(name: str) -> Any:
    """Import `Pipeline` and `load` on first use: their imports take seconds, and commands print something before."""
    if name in __all__:
        from flux2 import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
