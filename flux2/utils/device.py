"""Choice of the device that a model runs on, and its random numbers."""

from collections.abc import Sequence

import torch


def seed_devices(seed: int, devices: Sequence[torch.device]) -> None:
    """Seed the CPU with `seed`, and each GPU among `devices` with another one.

    `torch.manual_seed` takes 1 ms, because it seeds every kind of device.
    """
    torch.default_generator.manual_seed(seed)
    for number, device in enumerate(devices):
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed + number)


def pick_device(device: str | None) -> torch.device:
    """Return `device`, by default the GPU if there is one. Raise ValueError except for the CPU or a GPU that exists."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        chosen = torch.device(device or ("cuda" if gpus else "cpu"))
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={device!r} is not a device: give cuda, cuda:1 or cpu") from error
    if chosen.type not in ("cuda", "cpu"):
        raise ValueError(f"device={device!r} is not supported: give cuda, cuda:1 or cpu")
    if chosen.type == "cuda" and not gpus:
        raise ValueError(
            f"device={device!r}: PyTorch {torch.__version__} sees no CUDA GPU here. Use device=cpu (practical for "
            "model=tiny only), or install a CUDA build of PyTorch."
        )
    if chosen.type == "cuda" and (chosen.index or 0) >= gpus:
        raise ValueError(f"device={device!r}: there are {gpus} GPUs, counted from cuda:0")
    return chosen
