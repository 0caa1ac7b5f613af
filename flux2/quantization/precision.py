"""The precision in which a model is stored and computed.

    fp32, bf16   everything in that dtype
    fp8          the linears of the blocks in e4m3 with one scale per tensor (or per row), with products in FP8 where
                 the hardware supports them; everything else in `dtype`
    int8         likewise in integers with one scale per row, on a CPU and on GPUs of compute capability 7.5 and above
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
from flux2.quantization.eight_bit import EightBitLinear
from flux2.quantization.float8 import Float8Linear
from flux2.quantization.int8 import Int8Linear
from flux2.quantization.nf4 import Nf4Linear, Workspace
from flux2.utils.choices import PRECISIONS
from flux2.utils.text import listed

Storage = Literal["fp8", "int8", "nf4"]
Backward = Literal["fp8", "int8", "bf16"]
Matmul = Literal["auto", "fp8", "int8", "dequantized"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
STORAGES: tuple[Storage, ...] = get_args(Storage)
EIGHT_BITS: dict[Storage | None, type[EightBitLinear]] = {"fp8": Float8Linear, "int8": Int8Linear}
CAPABILITY = {"fp8": (8, 9), "int8": (7, 5)}  # compute capability of the first GPUs with these products


@dataclass(frozen=True)
class Precision:
    """How a model is stored and computed. An invalid setting raises ValueError with its name.

    Attributes:
        dtype: Dtype of everything that is not converted, and of products that are not in 8 bits.
        storage: Format of the converted layers; None converts none.
        layers: Regular expressions that match whole names of the layers to convert.
        rowwise: One FP8 scale per row instead of one per tensor.
        backward: `fp8` or `int8`, as `storage`, computes the input gradient in 8 bits too, `bf16` computes it in
            `dtype`. The default is the former; without storage in 8 bits it has no effect.
        matmul: `fp8` or `int8`, as `storage`, multiplies in 8 bits, `dequantized` in `dtype` with the dequantized
            weight. `auto` is `int8` for that storage, and multiplies FP8 weights in FP8 where that is fast: on GPUs of
            compute capability 8.9 and above.
        rotate: Rotate the columns of an INT8 weight, and the rows it is multiplied with, by blocks (int8.py).
        cache_transposed_weights: Keep the weight in both memory layouts: no copy in the backward, twice the memory.
    """

    dtype: torch.dtype = torch.float32
    storage: Storage | None = None
    layers: tuple[str, ...] = BLOCK_LINEARS
    rowwise: bool = False
    backward: Backward | None = None
    matmul: Matmul = "auto"
    rotate: bool = False
    cache_transposed_weights: bool = False

    def __post_init__(self) -> None:
        eight_bits = self.storage in EIGHT_BITS
        if self.backward is None:
            object.__setattr__(self, "backward", self.storage if eight_bits else "bf16")
        choices: dict[str, tuple[str | None, ...]] = {
            "storage": (None, *STORAGES),
            "backward": (self.storage, "bf16") if eight_bits else get_args(Backward),
            "matmul": ("auto", self.storage, "dequantized") if eight_bits else get_args(Matmul),
        }
        for key, accepted in choices.items():
            if getattr(self, key) not in accepted:
                names = ", ".join("null" if choice is None else choice for choice in accepted)
                where = f" with precision.storage={self.storage}" if eight_bits and key != "storage" else ""
                raise ValueError(f"precision.{key}={getattr(self, key)!r} must be one of {names}{where}")
        for key in ("rowwise", "rotate", "cache_transposed_weights"):
            if not isinstance(getattr(self, key), bool):
                raise ValueError(f"precision.{key}={getattr(self, key)!r} must be true or false")
        for key, needed in (("rowwise", "fp8"), ("rotate", "int8")):
            if getattr(self, key) and self.storage != needed:
                raise ValueError(
                    f"precision.{key}=true has no effect with precision.storage={self.storage or 'null'}: it is for "
                    f"weights in {needed}. Set precision={needed}, or precision.{key}=false."
                )
        if isinstance(self.layers, str) or not all(isinstance(layer, str) for layer in self.layers):
            raise ValueError(f"precision.layers={self.layers!r} must be a list of regular expressions")

    @property
    def name(self) -> str:
        return self.storage or next(name for name, dtype in DTYPES.items() if dtype == self.dtype)

    @property
    def recipe(self) -> str:
        """Return what the stored bytes of a converted layer depend on, in addition to its weight."""
        suffix = "-rows" if self.rowwise else "-rotated" if self.rotate else ""
        return f"{self.name}{suffix}"

    def multiplies_in_8_bits(self, device: torch.device | str) -> bool:
        """Return whether converted layers on `device` multiply in 8 bits.

        Raise ValueError if `matmul` requires it and the device cannot.
        """
        device = torch.device(device)
        if self.storage is None or self.storage not in EIGHT_BITS or self.matmul == "dequantized":
            return False
        is_required = self.matmul != "auto" or self.storage == "int8"
        if device.type != "cuda":
            return is_required
        capability, needed = gpu_capability(device), CAPABILITY[self.storage]
        if capability < needed and is_required:
            instead = "auto, which keeps FP8 storage and" if self.storage == "fp8" else "dequantized, which"
            raise ValueError(
                f"precision.matmul={self.matmul}: this GPU's compute capability is {dotted(capability)}, and "
                f"{self.storage.upper()} products need {dotted(needed)} or more; use precision.matmul={instead} "
                "multiplies in bf16"
            )
        return capability >= needed


def dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


@lru_cache
def gpu_capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def precision_from_name(name: str | None, device: torch.device) -> Precision:
    """Return the precision called `name` for `device`: fp32, bf16, fp8, int8, nf4, or auto (also None).

    auto means bfloat16 on a GPU and float32 on a CPU; the quantized ones use the same for everything unconverted.
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
    products are in 8 bits. Raise ValueError if a pattern matches no layer, a layer has a bias or cannot be rotated, or
    `device` lacks the required products.
    """
    if precision.storage is None:
        return []
    in_8_bits = precision.multiplies_in_8_bits(device)
    names = linear_names(model, precision.layers, "precision.layers")
    if precision.storage == "nf4":
        swap_linears(model, names, partial(Nf4Linear, dtype=precision.dtype, workspace=Workspace()))
        return names
    kind = EIGHT_BITS[precision.storage]
    options: dict[str, bool] = {"rowwise": True} if precision.rowwise else {"rotate": True} if precision.rotate else {}

    def make(*sizes: int, device: torch.device) -> EightBitLinear:
        forward = in_8_bits and all(size % kind.multiple == 0 for size in sizes)
        backward = forward and precision.backward == precision.storage
        return kind(
            *sizes,
            dtype=precision.dtype,
            device=device,
            forward_8bit=forward,
            backward_8bit=backward,
            cache_transposed_weights=backward and precision.cache_transposed_weights,
            **options,
        )

    swap_linears(model, names, make)
    return names


def set_transposed_cache(model: nn.Module, enabled: bool) -> int:
    """Set whether the layers with a backward in 8 bits keep transposed weights; return the number of these layers."""
    layers = [layer for layer in model.modules() if isinstance(layer, EightBitLinear) and layer.backward_8bit]
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
    eight_bits = [layer for layer in layers if isinstance(layer, EightBitLinear)]
    rowwise = sum(layer.rowwise for layer in eight_bits)
    text += f", one scale per {'row' if rowwise == len(eight_bits) else 'tensor'}"
    text += f" ({rowwise} layers: per row)" if 0 < rowwise < len(eight_bits) else ""
    text += ", rotated" if precision.rotate else ""
    multiplying = [layer for layer in eight_bits if layer.forward_8bit]
    unused = precision.cache_transposed_weights and not any(layer.cache_transposed_weights for layer in eight_bits)
    if not multiplying:
        text += f"; products in {rest}: {_why_not_in_8_bits(precision, torch.device(device))}"
        return text + (", so transposed weights would have no effect and are not cached" if unused else "")
    kind = precision.name.upper()
    text += f"; products in {kind}{'' if multiplying[0].backward_8bit else f', in the backward in {rest}'}"
    if odd := len(layers) - len(multiplying):
        text += f", and in {rest} for {odd} layers whose sizes are no multiples of {multiplying[0].multiple}"
    return text


def caution(model: nn.Module) -> str:
    """Return a sentence about layers whose INT8 products are inexact; empty if there are none."""
    coarse = [name for name, layer in model.named_modules() if isinstance(layer, Int8Linear) and layer.is_coarse()]
    if not coarse:
        return ""
    return (
        f"int8 is inexact for {listed(coarse, 2)}: a few columns are so large that half of the weights are rounded to "
        "integers from -2 to 2, where 127 is the largest"
    )


def _why_not_in_8_bits(precision: Precision, device: torch.device) -> str:
    if precision.matmul == "dequantized":
        return "precision.matmul=dequantized"
    if device.type != "cuda" and precision.storage == "fp8" and precision.matmul == "auto":
        return "FP8 products are slower on a CPU"
    needed = CAPABILITY[precision.name]
    if device.type == "cuda" and gpu_capability(device) < needed:
        capability, kind = dotted(gpu_capability(device)), precision.name.upper()
        return f"this GPU's compute capability is {capability}, {kind} products need {dotted(needed)}"
    return f"the layers' sizes are no multiples of {EIGHT_BITS[precision.storage].multiple}"
