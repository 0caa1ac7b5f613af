"""What tests on the simulated device share: its counters and switches, and true-size models without their memory."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from simulated_gpu.build import environment
from torch import Tensor, nn

from flux2 import adapters
from flux2.memory import ring_buffer
from flux2.memory.ring_buffer import CudaCopier
from flux2.models.transformer import Transformer
from flux2.models.variants import TransformerConfig
from flux2.quantization.precision import Precision, convert
from flux2.weights.loading import device_chooser

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = Path(__file__).with_name("launch.py")
ATTACH: dict[str, Callable[..., None]] = {
    "lora": partial(adapters.attach, rank=16),
    "dora": partial(adapters.attach_dora, rank=16),
    "lokr": partial(adapters.attach_lokr, rank=16),
    "loha": partial(adapters.attach_loha, rank=16),
    "oft": partial(adapters.attach_oft, block_size=32),
}


@cache
def device() -> ctypes.CDLL:
    """Return the library that is preloaded: its functions simulated_gpu_* read and set what README.md lists."""
    library = ctypes.CDLL(os.path.join(os.environ["SIMULATED_GPU"], "libsimulated_gpu.so"))
    for name in ("used", "most", "most_pinned"):
        getattr(library, f"simulated_gpu_{name}").restype = ctypes.c_size_t
    for name in ("launches", "refused", "host_waits"):
        getattr(library, f"simulated_gpu_{name}").restype = ctypes.c_long
    library.simulated_gpu_refuse_after.argtypes = [ctypes.c_long]
    library.simulated_gpu_repeated.restype = ctypes.c_void_p
    library.simulated_gpu_repeated.argtypes = [ctypes.c_size_t]
    return library


@contextmanager
def refusing_after(allocations: int) -> Iterator[None]:
    """Context manager in which the device has memory for this many more allocations of PyTorch's allocator."""
    device().simulated_gpu_refuse_after(allocations)
    try:
        yield
    finally:
        device().simulated_gpu_refuse_after(-1)


class RepeatedCopier(CudaCopier):
    """Copies from pinned host memory that takes 64 MB of this machine's at most, whatever its size."""

    def host(self, size: int) -> Tensor:
        size = max(size, 1)
        address = ctypes.cast(device().simulated_gpu_repeated(size), ctypes.POINTER(ctypes.c_ubyte))
        memory = np.ctypeslib.as_array(address, (size,))
        assert ring_buffer.pin(memory, self.place)
        return torch.from_numpy(memory)


def empty_transformer(
    config: TransformerConfig,
    precision: Precision,
    place: torch.device,
    host: Sequence[str] = (),
    devices: Mapping[str, torch.device] | None = None,
) -> Transformer:
    """Return a transformer whose weights are not set: on `place`, in host memory, or on the `devices` of modules."""
    device_of = device_chooser(host, place, devices)
    with torch.device("meta"):
        model = Transformer(config).to(precision.dtype)
    convert(model, precision, place)
    for name, module in model.named_modules():
        there = device_of(f"{name}.")
        for leaf, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, leaf, nn.Parameter(torch.empty_like(parameter, device=there), requires_grad=False))
    return model


def run(*command: object, timeout: int = 600, **settings: object) -> str:
    """Run a command of the project in a process that sees a device of these settings; return what it prints.

    Raises AssertionError, with what it printed, if it fails. Settings in capitals are of its environment.
    """
    own = {name: str(settings.pop(name)) for name in list(settings) if name.isupper()}
    done = attempt(*command, timeout=timeout, own=own, **settings)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout + done.stderr


def attempt(
    *command: object, timeout: int = 600, own: dict[str, str] | None = None, **settings: object
) -> subprocess.CompletedProcess[str]:
    """Run a command like `run`, whether or not it succeeds."""
    words = [sys.executable, str(LAUNCHER), *map(str, command)]
    given = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment(**settings), **(own or {})}
    given["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    return subprocess.run(words, cwd=ROOT, env=given, capture_output=True, text=True, timeout=timeout)
