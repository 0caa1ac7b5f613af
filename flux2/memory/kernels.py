"""Whether Triton kernels compute what lies between the matrix products (flux2/layers/fused_elementwise.py).

    torch    never
    triton   always on a GPU; an error where they cannot run
    auto     on a GPU where they compile and agree with PyTorch in a trial; elsewhere `torch`, after one warning

The trial is a step of a small model, because a kernel that compiles for one GPU may fail on another one. Blocks that
`memory.compile` compiles use PyTorch's operations, which the compiler fuses itself.
"""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flux2.layers.fused_elementwise import FusedModule
from flux2.models.transformer import Transformer, rotary_angles
from flux2.models.variants import TransformerConfig
from flux2.quantization.precision import CAPABILITY, Precision, convert

KERNELS = ("auto", "torch", "triton")
TRIED = TransformerConfig(heads=3, double_blocks=1, single_blocks=1, text_width=64, guidance=False)
TRIED_TOKENS = 48
# relative difference of results; in 8 bits the last bit of a row's largest number moves the roundings of the whole row
TOLERANCE, TOLERANCE_IN_8_BITS = 0.02, 0.1


def check_kernels(kernels: Any, key: str = "memory.kernels") -> None:
    """Raise ValueError unless `kernels` is in `KERNELS`; `key` is the setting's name."""
    if kernels not in KERNELS:
        raise ValueError(f"{key}={kernels!r} must be one of {', '.join(KERNELS)}")


def choose_kernels(kernels: str, device: torch.device) -> str:
    """Return "triton" or "torch" for one of `KERNELS` on `device`.

    Warn if kernels that "auto" tries fail on this GPU. Raise ValueError if "triton" cannot be used.
    """
    if kernels == "torch" or (kernels == "auto" and device.type != "cuda"):
        return "torch"
    failure = kernel_failure(device) if device.type == "cuda" else f"device={device} is no GPU"
    if failure is None:
        return "triton"
    if kernels == "triton":
        raise ValueError(f"memory.kernels=triton: Triton's kernels cannot be used here ({failure}). Set torch or auto.")
    warnings.warn(
        f"memory.kernels=auto: PyTorch's operations are used, because Triton's failed ({failure})", stacklevel=2
    )
    return "torch"


def use_kernels(model: nn.Module, enabled: bool) -> None:
    """Set whether the modules of `model` use Triton kernels on a GPU."""
    for module in model.modules():
        if isinstance(module, FusedModule):
            module.kernels = enabled


@cache
def kernel_failure(device: torch.device) -> str | None:
    """Return why a small step with Triton kernels fails on a GPU, or None if its results are PyTorch's.

    The step is tried with plain weights and with each storage whose products in 8 bits this GPU has.
    """
    capability = torch.cuda.get_device_capability(device)
    storages: tuple[Literal["fp8", "int8"] | None, ...] = (None, "fp8", "int8")
    for storage in storages:
        if storage is not None and capability < CAPABILITY[storage]:
            continue
        model = tried_model(storage, device)
        try:
            expected = tried_step(model)
            use_kernels(model, True)
            results = tried_step(model)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # of the compiler, of the driver, or because Triton or a C compiler is missing
            return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]:.300}"
        difference = torch.stack([(one - other).norm() for one, other in zip(results, expected, strict=True)])
        size = torch.stack([other.norm() for other in expected])
        if not bool((difference <= (TOLERANCE if storage is None else TOLERANCE_IN_8_BITS) * size).all()):
            return f"its results differ from PyTorch's with precision={storage or 'bf16'}"
    return None


def tried_model(storage: Literal["fp8", "int8"] | None, device: torch.device) -> Transformer:
    """Return a small frozen transformer of random weights in bfloat16, with its blocks in `storage`."""
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        model = Transformer(TRIED).bfloat16().requires_grad_(False)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    convert(model, Precision(torch.bfloat16, storage, matmul=storage or "auto"), device)
    return model.to(device)


def tried_step(model: Transformer) -> tuple[Tensor, Tensor]:
    """Return what the blocks of `model` add to fixed tokens, and to the gradient of these, in float32."""
    device, generator = model.img_in.weight.device, torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, torch.bfloat16)

    tokens, gradient = random(2, 1, 2 * TRIED_TOKENS, TRIED.hidden)
    modulation = [(shift, scale, gate) for shift, scale, gate in random(5, 3, 1, 1, TRIED.hidden)]
    positions = torch.arange(2 * TRIED_TOKENS, device=device)[:, None].expand(-1, len(TRIED.rope_axes))
    rope = rotary_angles(positions, TRIED.rope_axes, TRIED.rope_theta)
    with torch.enable_grad(), torch.autocast(device.type, torch.bfloat16):
        text, image = tokens.requires_grad_().split(TRIED_TOKENS, dim=1)
        image, text = model.double_blocks[0](image, text, modulation[:2], modulation[2:4], rope)
        result = model.single_blocks[0](torch.cat([text, image], dim=1), modulation[4], rope)
    (dx,) = torch.autograd.grad(result, tokens, gradient)
    return (result - tokens).detach().float(), (dx - gradient).float()
