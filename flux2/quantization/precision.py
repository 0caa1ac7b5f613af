"""In what precision a model is kept and computed.

    fp32, bf16   everything in that dtype
    fp8          the linears of the blocks in e4m3 with one scale a tensor (or a row), and products in FP8 where the
                 hardware has them; all else in `dtype`
    nf4          the linears of the blocks in 4 bits, dequantized for each product; all else in `dtype`

`precision_from_name` makes a `Precision` of a name; `convert` swaps the chosen layers of a model, best on the meta
device, so that each weight is quantized when it is loaded (`QuantizedLinear.store`) and the whole is never in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import nn

from flux2.layers.selection import BLOCK_LINEARS, linear_names
from flux2.quantization.base import QuantizedLinear
from flux2.quantization.float8 import MULTIPLE, Float8Linear
from flux2.quantization.nf4 import Nf4Linear, Workspace

__all__ = [
    "Float8Linear",
    "Nf4Linear",
    "Precision",
    "QuantizedLinear",
    "convert",
    "describe",
    "pick_dtype",
    "precision_from_name",
]

Storage = Literal["fp8", "nf4"]
Backward = Literal["fp8", "bf16"]
Matmul = Literal["auto", "fp8", "dequantized"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
STORAGES: tuple[Storage, ...] = get_args(Storage)
NAMES = ("auto", "fp32", "bf16", "fp8", "nf4")
FP8_CAPABILITY = (8, 9)  # of the first GPUs that multiply FP8


@dataclass(frozen=True)
class Precision:
    """How a model is kept. Raises ValueError for what cannot be, naming the setting.

    Attributes:
        dtype: of all that is not converted, and of products where they are not in FP8.
        storage: of the converted layers; None converts none.
        layers: regular expressions for whole names of the layers that are converted.
        rowwise: FP8 with one scale a row in place of one a tensor.
        backward: `fp8`: the input gradient's product is in FP8 too; `bf16`: it is in `dtype`.
        matmul: `fp8`: products in FP8; `dequantized`: in `dtype`, on the weight converted back; `auto`: in FP8 where
            that is fast, which is on GPUs of compute capability 8.9 and above.
        cache_transposed_weights: keep the weight in both memory layouts: no copy in the backward, twice the memory.
    """

    dtype: torch.dtype = torch.float32
    storage: Storage | None = None
    layers: tuple[str, ...] = BLOCK_LINEARS
    rowwise: bool = False
    backward: Backward = "fp8"
    matmul: Matmul = "auto"
    cache_transposed_weights: bool = False

    def __post_init__(self) -> None:
        choices = {"storage": (None, *STORAGES), "backward": get_args(Backward), "matmul": get_args(Matmul)}
        for key, accepted in choices.items():
            if getattr(self, key) not in accepted:
                named = ", ".join("null" if choice is None else choice for choice in accepted)
                raise ValueError(f"precision.{key}={getattr(self, key)!r} must be one of {named}")
        for key in ("rowwise", "cache_transposed_weights"):
            if not isinstance(getattr(self, key), bool):
                raise ValueError(f"precision.{key}={getattr(self, key)!r} must be true or false")
        if isinstance(self.layers, str) or not all(isinstance(layer, str) for layer in self.layers):
            raise ValueError(f"precision.layers={self.layers!r} must be a list of regular expressions")

    @property
    def name(self) -> str:
        return self.storage or next(name for name, dtype in DTYPES.items() if dtype == self.dtype)

    @property
    def recipe(self) -> str:
        """What the stored bytes of a converted layer depend on, besides its weight."""
        return "fp8-rows" if self.storage == "fp8" and self.rowwise else self.storage or self.name

    def multiplies_in_fp8(self, device: torch.device | str) -> bool:
        """Whether converted layers on `device` multiply in FP8. Raises ValueError if that is asked for in vain."""
        device = torch.device(device)
        if self.storage != "fp8" or self.matmul == "dequantized":
            return False
        if device.type != "cuda":
            return self.matmul == "fp8"
        capability = gpu_capability(device)
        if capability < FP8_CAPABILITY and self.matmul == "fp8":
            raise ValueError(
                f"precision.matmul=fp8: this GPU's compute capability is {capability[0]}.{capability[1]}, and FP8 "
                "products need 8.9 or more; use precision.matmul=auto, which keeps FP8 storage and multiplies in bf16"
            )
        return capability >= FP8_CAPABILITY


@lru_cache
def gpu_capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def precision_from_name(name: str | None, device: torch.device) -> Precision:
    """The precision called `name` as on `device`: fp32, bf16, fp8, nf4, or auto (also None).

    auto is bfloat16 on a GPU and float32 on a CPU, and so is what fp8 and nf4 leave unconverted.
    """
    if name is not None and name not in NAMES:
        raise ValueError(f"precision={name!r} must be one of {', '.join(NAMES)}")
    storage = next((storage for storage in STORAGES if storage == name), None)
    return Precision(pick_dtype(name if name in DTYPES else None, device), storage)


def pick_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """`fp32` or `bf16`; by default bfloat16 on a GPU and float32 on a CPU."""
    if name is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise ValueError(f"precision.dtype={name!r} must be one of {', '.join(DTYPES)}, or null")
    return DTYPES[name]


def convert(model: nn.Module, precision: Precision, device: torch.device | str = "cpu") -> list[str]:
    """Swap the layers that `precision` names for quantized ones, in place; returns their names.

    Args:
        model: best on the meta device; a layer that has its weight already is quantized at once.
        device: where the model will be used, which decides whether products are in FP8.

    Raises:
        ValueError: a pattern that matches no layer, or FP8 products that `device` does not have.
    """
    if precision.storage is None:
        return []
    in_fp8 = precision.multiplies_in_fp8(device)
    workspace = Workspace()
    names = linear_names(model, precision.layers, "precision.layers")
    for name in names:
        old = model.get_submodule(name)
        assert isinstance(old, nn.Linear)
        if old.bias is not None:
            raise ValueError(f"precision.layers: {name} has a bias, and a quantized layer has none")
        new = _quantized(old, precision, in_fp8, workspace).train(old.training)
        if not old.weight.is_meta:
            new.store(old.weight)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)
    return names


def set_transposed_cache(model: nn.Module, both: bool) -> int:
    """Let the layers that multiply gradients in FP8 keep their weights transposed too, or not; returns their number."""
    layers = [layer for layer in model.modules() if isinstance(layer, Float8Linear) and layer.backward_fp8]
    for layer in layers:
        layer.set_transposed_cache(both)
    return len(layers)


def _quantized(old: nn.Linear, precision: Precision, in_fp8: bool, workspace: Workspace) -> QuantizedLinear:
    sizes, dtype, device = (old.in_features, old.out_features), precision.dtype, old.weight.device
    if precision.storage == "nf4":
        return Nf4Linear(*sizes, dtype=dtype, device=device, workspace=workspace)
    in_fp8 = in_fp8 and all(size % MULTIPLE == 0 for size in sizes)
    backward_fp8 = in_fp8 and precision.backward == "fp8"
    return Float8Linear(
        *sizes,
        dtype=dtype,
        device=device,
        rowwise=precision.rowwise,
        forward_fp8=in_fp8,
        backward_fp8=backward_fp8,
        cache_transposed_weights=backward_fp8 and precision.cache_transposed_weights,
    )


def describe(model: nn.Module, precision: Precision, device: torch.device | str = "cpu") -> str:
    """One line for what `convert` did: which layers are in which form, and how they multiply."""
    rest = str(precision.dtype).removeprefix("torch.")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    if not layers:
        return f"all weights in {rest}"
    total = sum(isinstance(module, nn.Linear) and ".lora_" not in name for name, module in model.named_modules())
    held = sum(parameter.nbytes for layer in layers.values() for parameter in layer.parameters(recurse=False))
    text = f"{len(layers)} of {total} linear layers in {precision.storage} ({held / 1e9:.3g} GB), all else in {rest}"
    if precision.storage == "nf4":
        return f"{text}; dequantized to {rest} for each product"
    eights = [layer for layer in layers.values() if isinstance(layer, Float8Linear)]
    by_row = sum(layer.rowwise for layer in eights)
    text += f", one scale a {'row' if by_row == len(eights) else 'tensor'}"
    text += f" ({by_row} layers: a row)" if 0 < by_row < len(eights) else ""
    inside = [layer for layer in eights if layer.forward_fp8]
    unused = precision.cache_transposed_weights and not any(layer.cache_transposed_weights for layer in eights)
    if not inside:
        text += f"; products in {rest}: {_why_not(precision, torch.device(device))}"
        return text + (", so that a second layout would do nothing and is not kept" if unused else "")
    text += f"; products in FP8{'' if inside[0].backward_fp8 else f', in the backward in {rest}'}"
    odd = len(layers) - len(inside)
    return text + (f", and in {rest} for {odd} layers whose sizes are no multiples of {MULTIPLE}" if odd else "")


def _why_not(precision: Precision, device: torch.device) -> str:
    if precision.matmul == "dequantized":
        return "precision.matmul=dequantized"
    if device.type != "cuda" and precision.matmul == "auto":
        return "FP8 products are slower on a CPU"
    if device.type == "cuda" and gpu_capability(device) < FP8_CAPABILITY:
        return f"this GPU's compute capability is {'.'.join(map(str, gpu_capability(device)))}, FP8 products need 8.9"
    return f"the layers' sizes are no multiples of {MULTIPLE}"
