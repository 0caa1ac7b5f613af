"""The precision in which a model is stored and computed.

    fp32, bf16   everything in that dtype
    fp8          the linears of the blocks in e4m3 with one scale per tensor (or per row), with products in FP8 where
                 the hardware supports them; everything else in `dtype`
    nf4          the linears of the blocks in 4 bits, dequantized for each product; everything else in `dtype`

`precision_from_name` returns the `Precision` of a name. `convert` swaps the chosen layers of a model, ideally on the
meta device: each weight is then quantized as it is loaded (`QuantizedLinear.store`), and the float model is never in
memory as a whole.
"""

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal, get_args

import torch
from torch import nn

from flux2.layers.selection import BLOCK_LINEARS, linear_names
from flux2.quantization.base import QuantizedLinear, swap_linears
from flux2.quantization.float8 import MULTIPLE, Float8Linear
from flux2.quantization.nf4 import Nf4Linear, Workspace
from flux2.utils.choices import PRECISIONS

Storage = Literal["fp8", "nf4"]
Backward = Literal["fp8", "bf16"]
Matmul = Literal["auto", "fp8", "dequantized"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
STORAGES: tuple[Storage, ...] = get_args(Storage)
FP8_CAPABILITY = (8, 9)  # compute capability of the first GPUs with FP8 products


@dataclass(frozen=True)
class Precision:
    """How a model is stored and computed. An invalid setting raises ValueError with its name.

    Attributes:
        dtype: Dtype of everything that is not converted, and of products outside FP8.
        storage: Format of the converted layers; None converts none.
        layers: Regular expressions that match whole names of the layers to convert.
        rowwise: One FP8 scale per row instead of one per tensor.
        backward: `fp8` computes the input gradient in FP8 too, `bf16` computes it in `dtype`.
        matmul: `fp8` multiplies in FP8, `dequantized` in `dtype` with the dequantized weight. `auto` multiplies in FP8
            where that is fast: on GPUs of compute capability 8.9 and above.
        cache_transposed_weights: Keep the weight in both memory layouts: no copy in the backward, twice the memory.
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
                names = ", ".join("null" if choice is None else choice for choice in accepted)
                raise ValueError(f"precision.{key}={getattr(self, key)!r} must be one of {names}")
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
        """Return what the stored bytes of a converted layer depend on, in addition to its weight."""
        return "fp8-rows" if self.storage == "fp8" and self.rowwise else self.storage or self.name

    def multiplies_in_fp8(self, device: torch.device | str) -> bool:
        """Return whether converted layers on `device` multiply in FP8.

        Raise ValueError if `matmul` requires it and the device cannot.
        """
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
    """Return the precision called `name` for `device`: fp32, bf16, fp8, nf4, or auto (also None).

    auto means bfloat16 on a GPU and float32 on a CPU; fp8 and nf4 use the same for everything unconverted.
    """
    if name is not None and name not in PRECISIONS:
        raise ValueError(f"precision={name!r} must be one of {', '.join(PRECISIONS)}")
    storage = next((storage for storage in STORAGES if storage == name), None)
    return Precision(pick_dtype(name if name in DTYPES else None, device), storage)


def pick_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """Return the dtype called `fp32` or `bf16`; by default bfloat16 on a GPU and float32 on a CPU."""
    if name is None:
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise ValueError(f"precision.dtype={name!r} must be one of {', '.join(DTYPES)}, or null")
    return DTYPES[name]


def convert(model: nn.Module, precision: Precision, device: torch.device | str = "cpu") -> list[str]:
    """Swap the layers that `precision` names for quantized ones, in place, and return their names.

    A layer that has its weight already is quantized at once. `device`, on which the model will run, decides whether
    products are in FP8. Raise ValueError if a pattern matches no layer, a layer has a bias, or `device` lacks the
    required FP8 products.
    """
    if precision.storage is None:
        return []
    fp8_products = precision.multiplies_in_fp8(device)

    def fp8(*sizes: int, device: torch.device) -> Float8Linear:
        forward_fp8 = fp8_products and all(size % MULTIPLE == 0 for size in sizes)
        backward_fp8 = forward_fp8 and precision.backward == "fp8"
        return Float8Linear(
            *sizes,
            dtype=precision.dtype,
            device=device,
            rowwise=precision.rowwise,
            forward_fp8=forward_fp8,
            backward_fp8=backward_fp8,
            cache_transposed_weights=backward_fp8 and precision.cache_transposed_weights,
        )

    nf4 = partial(Nf4Linear, dtype=precision.dtype, workspace=Workspace())
    names = linear_names(model, precision.layers, "precision.layers")
    swap_linears(model, names, nf4 if precision.storage == "nf4" else fp8)
    return names


def set_transposed_cache(model: nn.Module, enabled: bool) -> int:
    """Set whether the layers with an FP8 backward keep transposed weights, and return the number of these layers."""
    layers = [layer for layer in model.modules() if isinstance(layer, Float8Linear) and layer.backward_fp8]
    for layer in layers:
        layer.set_transposed_cache(enabled)
    return len(layers)


def describe(model: nn.Module, precision: Precision, device: torch.device | str = "cpu") -> str:
    """Return one line about the result of `convert`: which layers are stored how, and how they multiply."""
    rest = str(precision.dtype).removeprefix("torch.")
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    if not layers:
        return f"all weights in {rest}"
    total = sum(isinstance(module, nn.Linear) and ".lora_" not in name for name, module in model.named_modules())
    size = sum(parameter.nbytes for layer in layers for parameter in layer.parameters(recurse=False))
    text = f"{len(layers)} of {total} linear layers in {precision.storage} ({size / 1e9:.3g} GB), all others in {rest}"
    if precision.storage == "nf4":
        return f"{text}; dequantized to {rest} for each product"
    fp8_layers = [layer for layer in layers if isinstance(layer, Float8Linear)]
    rowwise = sum(layer.rowwise for layer in fp8_layers)
    text += f", one scale per {'row' if rowwise == len(fp8_layers) else 'tensor'}"
    text += f" ({rowwise} layers: per row)" if 0 < rowwise < len(fp8_layers) else ""
    multiplying = [layer for layer in fp8_layers if layer.forward_fp8]
    unused = precision.cache_transposed_weights and not any(layer.cache_transposed_weights for layer in fp8_layers)
    if not multiplying:
        text += f"; products in {rest}: {_why_not_fp8(precision, torch.device(device))}"
        return text + (", so transposed weights would have no effect and are not cached" if unused else "")
    text += f"; products in FP8{'' if multiplying[0].backward_fp8 else f', in the backward in {rest}'}"
    odd = len(layers) - len(multiplying)
    return text + (f", and in {rest} for {odd} layers whose sizes are no multiples of {MULTIPLE}" if odd else "")


def _why_not_fp8(precision: Precision, device: torch.device) -> str:
    if precision.matmul == "dequantized":
        return "precision.matmul=dequantized"
    if device.type != "cuda" and precision.matmul == "auto":
        return "FP8 products are slower on a CPU"
    if device.type == "cuda" and gpu_capability(device) < FP8_CAPABILITY:
        return f"this GPU's compute capability is {'.'.join(map(str, gpu_capability(device)))}, FP8 products need 8.9"
    return f"the layers' sizes are no multiples of {MULTIPLE}"
