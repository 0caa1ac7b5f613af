"""Frozen linear layers in NF4: 4-bit NormalFloat in blocks of 64, with quantized scales of the blocks.

This is QLoRA's format (arxiv.org/abs/2305.14314), computed and stored by bitsandbytes. The weight is dequantized for
each product, on a GPU into a buffer that all layers of a model share. flux2/weights/prequantized.py reads such weights
from files.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from flux2.quantization.base import KERNEL_DTYPES, Device, QuantizedLinear, backward_operation, kernels

BLOCK = 64  # elements per scale
PART = 1 << 18  # elements quantized at once: on a CPU bitsandbytes holds 32 float32 values for each
NESTED_BLOCK = 256  # scales per nested scale
NF4_KEYS = {"weight", "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4"}
NESTED_KEYS = {"weight.nested_absmax", "weight.nested_quant_map"}
Scales = tuple[Tensor, Tensor | None, Tensor]  # absmax, its nested scales if it is quantized, and its offset; as bytes


@lru_cache
def quant_map(device: torch.device) -> Tensor:
    """Return the sixteen values of NF4."""
    return kernels().get_4bit_type("nf4", device=device)


@lru_cache
def nested_quant_map(device: torch.device) -> Tensor:
    """Return the 256 values that scales are rounded to."""
    return kernels().create_dynamic_map().to(device)


def quant_state(scales: Scales, dtype: torch.dtype, shape: tuple[int, ...]) -> Any:
    """Return bitsandbytes' description (QuantState) of a weight to be dequantized to `dtype` and `shape`."""
    absmax, nested_absmax, offset = scales
    nested: dict[str, Any] = {}
    if nested_absmax is None:
        absmax = absmax.view(torch.float32)
    else:
        code, floats = nested_quant_map(absmax.device), nested_absmax.view(torch.float32)
        state = kernels().QuantState(floats, code=code, blocksize=NESTED_BLOCK, dtype=torch.float32)
        nested = {"offset": offset.view(torch.float32)[0], "state2": state}
    options = {"code": quant_map(absmax.device), "blocksize": BLOCK, "quant_type": "nf4", "dtype": dtype}
    return kernels().QuantState(absmax, shape=torch.Size(shape), **options, **nested)


def unpack(
    packed: Tensor, scales: Scales, shape: tuple[int, int], dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """Return the weight of `shape`, in `out` (as many elements of `dtype`) if that is given."""
    size = shape[0] * shape[1]
    # Blocks run through the whole weight, but the CPU kernel restarts at every row, so each block becomes a row.
    rows = (size // BLOCK, BLOCK) if size % BLOCK == 0 else (1, size)
    state = quant_state(scales, dtype if dtype in KERNEL_DTYPES else torch.float32, rows)
    weight = kernels().dequantize_4bit(packed, state, out=None if out is None else out.view(rows))
    return weight.view(shape).to(dtype)


unpack_operation = backward_operation(
    "nf4_unpack",
    lambda packed, absmax, nested, offset, rows, columns, dtype: unpack(
        packed, (absmax, nested, offset), (rows, columns), dtype
    ),
    lambda packed, absmax, nested, offset, rows, columns, dtype: packed.new_empty(rows, columns, dtype=dtype),
    "(Tensor packed, Tensor absmax, Tensor? nested, Tensor offset, int rows, int columns, ScalarType dtype) -> Tensor",
)


class Workspace:
    """One buffer, as large as the largest layer, that all NF4 layers of a model dequantize into on a GPU.

    Its content is used up before it is overwritten: one stream runs the products one after the other, their results
    are stored elsewhere, autograd keeps none of it (FrozenProduct saves nothing), and each stream has its own buffer.
    """

    def __init__(self) -> None:
        self.largest = 0
        self._buffers: dict[tuple[Any, ...], Tensor] = {}

    def take(self, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return `size` elements that are valid until the next call."""
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        key = (dtype, device, stream)
        self.largest = max(self.largest, size)
        if key not in self._buffers or self._buffers[key].numel() < size:
            self._buffers[key] = torch.empty(self.largest, dtype=dtype, device=device)
        return self._buffers[key][:size]

    def __deepcopy__(self, memo: dict[int, Any]) -> Workspace:
        copied = Workspace()
        copied.largest = self.largest
        return copied


class Nf4Linear(QuantizedLinear):
    """Stored in 4 bits plus 0.127 for the scales, as bitsandbytes stores it.

    Attributes:
        nested: Whether the scales of the blocks are quantized too; False only for an adopted weight without that.
        workspace: Buffer for the dequantized weight of a product, shared by the layers of a model.
    """

    kind = "nf4"
    out_devices = ("cuda",)  # where bitsandbytes' kernel writes into a given tensor
    absmax: nn.Parameter
    nested_absmax: nn.Parameter
    offset: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: Device = None,
        workspace: Workspace | None = None,
    ) -> None:
        super().__init__(in_features, out_features, dtype)
        self.nested, self.source_dtype = True, dtype
        self.workspace = workspace or Workspace()
        size = in_features * out_features
        self.workspace.largest = max(self.workspace.largest, size)
        blocks = -(-size // BLOCK)
        nested_size = 4 * -(-blocks // NESTED_BLOCK)
        self.allocate(device, qweight=((size + 1) // 2, 1), absmax=(blocks,), nested_absmax=(nested_size,), offset=(4,))

    @property
    def scales(self) -> Scales:
        return self.absmax, self.nested_absmax if self.nested else None, self.offset

    def state(self, dtype: torch.dtype, shape: tuple[int, ...]) -> Any:
        """Return bitsandbytes' description of the storage, to be dequantized to `dtype` and `shape`."""
        return quant_state(self.scales, dtype, shape)

    def dequantize(self, dtype: torch.dtype, out: Tensor | None = None, after: Tensor | None = None) -> Tensor:
        """Return the weight (out, in), in `out` (out * in elements of `dtype`) if that is given."""
        shape = (self.out_features, self.in_features)
        if self.qweight.is_meta:  # not supported by bitsandbytes
            return torch.empty(shape, dtype=dtype, device="meta")
        if torch.compiler.is_compiling():
            return unpack_operation(self.qweight, *self.scales, *shape, dtype, after)
        return unpack(self.qweight, self.scales, shape, dtype, out)

    def weight_for_product(self, dtype: torch.dtype, after: Tensor | None = None) -> Tensor:
        """Return the weight (out, in), in the workspace where the kernel can write into it."""
        device = self.qweight.device
        if device.type not in self.out_devices or dtype == torch.float64 or torch.compiler.is_compiling():
            return self.dequantize(dtype, after=after)
        return self.dequantize(dtype, self.workspace.take(self.in_features * self.out_features, dtype, device))

    def store(self, weight: Tensor) -> None:
        weight = self.on_storage_device(weight)
        if weight.dtype not in KERNEL_DTYPES:
            weight = weight.float()
        packed = torch.empty(((weight.numel() + 1) // 2, 1), dtype=torch.uint8, device=weight.device)
        scales = []
        for part, target in zip(weight.reshape(-1).split(PART), packed.split(PART // 2), strict=True):
            _, state = kernels().quantize_4bit(part, blocksize=BLOCK, quant_type="nf4", out=target)
            scales.append(state.absmax)
        absmax = torch.cat(scales)
        if not bool(torch.isfinite(absmax).all()):
            raise ValueError("the weight has values that are not finite")
        offset = absmax.mean()  # quantizes the scales as bitsandbytes does when it gets the whole weight
        codes, nested = kernels().quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK)
        self.nested, self.source_dtype = True, weight.dtype
        self.hold("qweight", packed)
        self.hold("absmax", codes)
        self.hold("nested_absmax", nested.absmax)
        self.hold("offset", offset.reshape(1))

    def storage(self) -> dict[str, Tensor]:
        """Return the tensors under bitsandbytes' keys, as its `Linear4bit` saves them."""
        state = self.state(self.source_dtype, (self.out_features, self.in_features)).as_dict(packed=True)
        return {"weight": self.qweight.detach()} | {f"weight.{key}": tensor for key, tensor in state.items()}

    def adopt(self, tensors: Mapping[str, Tensor]) -> None:
        """Adopt tensors under bitsandbytes' keys, with scales quantized or not."""
        nested = any(key in tensors for key in NESTED_KEYS)
        device = tensors["weight"].device if self.qweight.is_meta and "weight" in tensors else self.qweight.device
        state = self._checked_state(tensors, nested, device)
        self.nested, self.source_dtype = nested, state.dtype
        self.hold("qweight", tensors["weight"].to(device).view(torch.uint8).reshape(-1, 1))
        self.hold("absmax", state.absmax)
        self.hold("nested_absmax", state.state2.absmax if nested else torch.empty(0, device=device))
        self.hold("offset", state.offset.reshape(1) if nested else torch.zeros(1, device=device))

    def _checked_state(self, tensors: Mapping[str, Tensor], nested: bool, device: torch.device) -> Any:
        """Return bitsandbytes' state of `tensors`. Raise ValueError unless they are a weight of this layer."""
        needed = NF4_KEYS | (NESTED_KEYS if nested else set())
        if missing := needed - tensors.keys():
            raise ValueError(f"{', '.join(sorted(missing))} missing for {self}")
        for key in sorted(needed & {"weight.absmax", "weight.quant_map", *NESTED_KEYS}):
            dtype = torch.uint8 if nested and key == "weight.absmax" else torch.float32
            if tensors[key].dtype != dtype:
                raise ValueError(f"{key} is in {tensors[key].dtype} instead of {dtype}")
        try:
            state = kernels().QuantState.from_dict({key: tensors[key] for key in needed - {"weight"}}, device)
        except (AttributeError, TypeError) as error:  # it does not check dtypes by name, nor shapes
            raise ValueError(f"its quant_state cannot be used ({error})") from error
        size = self.in_features * self.out_features
        blocks = -(-size // BLOCK)
        checks = {  # name: (actual, expected)
            "shape": (tuple(state.shape), (self.out_features, self.in_features)),
            "type": (state.quant_type, "nf4"),
            "block": (state.blocksize, BLOCK),
            "bytes": (tensors["weight"].numel() * tensors["weight"].element_size(), (size + 1) // 2),
            "scales": (state.absmax.numel(), blocks),
        }
        if nested:
            checks["nested block"] = (state.state2.blocksize, NESTED_BLOCK)
            checks["nested scales"] = (state.state2.absmax.numel(), -(-blocks // NESTED_BLOCK))
        wrong = [f"{key} {actual} instead of {needs}" for key, (actual, needs) in checks.items() if actual != needs]
        if wrong:
            raise ValueError(f"a 4-bit weight does not fit {self}: {', '.join(wrong)}")
        is_nf4 = torch.equal(state.code, quant_map(device))
        if not is_nf4 or (nested and not torch.equal(state.state2.code, nested_quant_map(device))):
            raise ValueError(f"a 4-bit weight with other values than NF4's (quant_map) was given to {self}")
        # the values that quantized scales are rounded to are at most 1, so this bounds each scale
        largest = state.state2.absmax.abs().max() + state.offset.abs() if nested else state.absmax.abs().max()
        if not bool(torch.isfinite(largest)):
            raise ValueError(f"weight.{'nested_' if nested else ''}absmax has a scale that is not finite in float32")
        return state
