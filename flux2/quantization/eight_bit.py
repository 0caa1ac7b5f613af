"""Frozen linear layers in 8 bits, w = scale * q, which also multiply in 8 bits: what float8.py and int8.py share.

The weight is quantized once, when it is loaded. In the products the other side is quantized too, row by row (one row is
one token), at each call:

    y  = x W^T  = (s_x q_x) (s q)^T
    dx = dy W   = (s_dy q_dy) (s q)        per-row scales belong to the summed dimension: they are folded into dy first

so a transposed weight with one scale per row is used without its scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux2.layers.frozen_linear import flatten_rows
from flux2.layers.fused_elementwise import FusedModule
from flux2.quantization.base import Device, QuantizedLinear, backward_operation

LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
CHUNK = 1 << 21  # elements quantized at once, so that float32 copies stay small compared to a large weight
SMALLEST_SCALE = 1e-30  # of a row that is quantized in a product: far below the gradients that scales are folded into


def row_maxima(x: Tensor) -> Tensor:
    """(M, K) -> the largest magnitude of each row (M, 1) in float32; NaN for a row with NaN."""
    return torch.linalg.vector_norm(x, float("inf"), dim=1, keepdim=True).float()


def round_to(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return float32 x in `dtype`, clamped to its range and rounded to nearest. x is overwritten."""
    x = x.round_() if dtype == torch.int8 else x
    return x.clamp_(-LARGEST[dtype], LARGEST[dtype]).to(dtype)


copy_operation = backward_operation(
    "weight_copy",
    lambda values, dtype: values.to(dtype, copy=True, memory_format=torch.contiguous_format),
    lambda values, dtype: torch.empty(values.shape, dtype=dtype, device=values.device),
    "(Tensor values, ScalarType dtype) -> Tensor",
)


def copied(values: Tensor, dtype: torch.dtype, after: Tensor | None) -> Tensor:
    """Return a copy of `values` in `dtype`, row-major; `after` is that of `backward_operation`."""
    if torch.compiler.is_compiling():
        return copy_operation(values, dtype, after)
    return values.to(dtype, copy=True, memory_format=torch.contiguous_format)


def check_scale(scale: Tensor, values: Tensor) -> None:
    """Raise ValueError unless each scale, in float32, is a positive number with finite products, or zero for zeros.

    Quantizers that divide the largest value by that of the format give rows of zeros the scale 0.

    Args:
        scale: Scales in a shape that multiplies `values`.
        values: Values in 8 bits.
    """
    scale = scale.float()
    largest = torch.finfo(values.dtype).max if values.is_floating_point() else LARGEST[values.dtype]
    if not bool(torch.isfinite(scale * largest).all()) or bool((scale < 0).any()):
        raise ValueError("a scale is negative, or its weights are not finite")
    is_zero = scale == 0
    if bool(is_zero.any()) and bool((is_zero & (values.float() != 0)).any()):
        raise ValueError("a scale is zero, but its values are not")


class EightBitLinear(FusedModule, QuantizedLinear):
    """Stored in 8 bits with one scale per tensor or per row; a subclass says in which numbers, and multiplies them.

    Attributes:
        values_dtype: Dtype of the stored values.
        multiple: Products in 8 bits on a GPU need both sides of a weight to be multiples of this.
        rowwise: Whether each row has its own scale.
        forward_8bit, backward_8bit: Which of the two products are computed in 8 bits; the others use the dequantized
            weight in the dtype of their input.
        cache_transposed_weights: Whether the transposed weight, which the backward in 8 bits needs, is kept (twice the
            memory) or computed at every call.
    """

    values_dtype: ClassVar[torch.dtype]
    multiple: ClassVar[int]
    scale: nn.Parameter
    qweight_t: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: Device = None,
        rowwise: bool = False,
        forward_8bit: bool = True,
        backward_8bit: bool = True,
        cache_transposed_weights: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, dtype)
        self.rowwise, self.forward_8bit, self.backward_8bit = rowwise, forward_8bit, backward_8bit
        self.cache_transposed_weights = cache_transposed_weights
        self.allocate(device, qweight=(out_features, in_features), scale=(4 * (out_features if rowwise else 1),))
        if cache_transposed_weights:
            self.allocate(device, qweight_t=(in_features, out_features))

    def set_transposed_cache(self, enabled: bool) -> None:
        """Start or stop keeping the transposed weight; the products do not change."""
        if enabled and not self.cache_transposed_weights:
            self.hold("qweight_t", self.qweight.t())
        elif self.cache_transposed_weights and not enabled:
            del self.qweight_t
        self.cache_transposed_weights = enabled

    def values(self) -> Tensor:
        """(out, in) in `values_dtype`, row-major."""
        return self.qweight.view(self.values_dtype)

    def transposed(self, after: Tensor | None = None) -> Tensor:
        """(in, out) in `values_dtype`, row-major: cached or copied; `after` is that of `backward_operation`."""
        transposed = self.qweight_t if self.cache_transposed_weights else copied(self.qweight.t(), torch.uint8, after)
        return transposed.view(self.values_dtype)

    def scales(self) -> Tensor:
        """(1,) in float32, or (out,) if rowwise."""
        return self.scale.view(torch.float32)

    def rotate(self, x: Tensor) -> Tensor:
        """(M, in) -> x in the basis in which the weight is stored; the same function leads back."""
        return x

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return self.rotate(self.values().to(dtype).mul_(self.scales()[:, None]))

    def multiply(self, x: Tensor, weight: Tensor, before: Tensor | None, after: Tensor | None) -> Tensor:
        """Quantize the rows of x (M, K) and return (x * before) @ weight * after in 8 bits: (M, N) in the dtype of x.

        Args:
            x: Float rows.
            weight: (K, N) in `values_dtype`, column-major.
            before: float32 factors of the columns of x (K,), applied before it is quantized.
            after: float32 factors of the result, (1,) or (N,).
        """
        raise NotImplementedError

    def product(self, x: Tensor) -> Tensor:
        rows = self.rotate(flatten_rows(x))
        if self.forward_8bit:
            y = self.multiply(rows, self.values().t(), None, self.scales())
        else:  # the values are exact in every larger float; the scales are applied to the result
            y = F.linear(rows, self.values().to(x.dtype)).mul_(self.scales())
        return y.view(*x.shape[:-1], self.out_features)

    def input_gradient(self, dy: Tensor) -> Tensor:
        rows, scales = flatten_rows(dy), self.scales()
        # scales per row belong to the summed dimension, which a product cannot scale
        before, after = (scales, None) if self.rowwise else (None, scales)
        if self.backward_8bit:
            dx = self.multiply(rows, self.transposed(dy).t(), before, after)
        else:
            dx = (rows if before is None else (rows * before).to(dy.dtype)) @ copied(self.values(), dy.dtype, dy)
            dx = dx if after is None else dx.mul_(after)
        return self.rotate(dx).view(*dy.shape[:-1], self.in_features)

    def store(self, weight: Tensor) -> None:
        weight = self.on_storage_device(weight)
        values = torch.empty_like(weight, dtype=self.values_dtype)
        parts = weight.split(max(1, CHUNK // self.in_features))
        largest = torch.cat([row_maxima(self.rotate(part.float())) for part in parts])
        if not bool(torch.isfinite(largest).all()):
            raise ValueError("the weight has values that are not finite")
        if not self.rowwise:
            largest = largest.max()
        scale = (largest / LARGEST[self.values_dtype]).clamp(min=1e-12)
        scales = scale.expand(self.out_features, 1).split(len(parts[0]))
        for part, into, each in zip(parts, values.split(len(parts[0])), scales, strict=True):
            # with one scale in the dtype of the weight, as it always was: quantized copies stay equal bit for bit
            scaled = self.rotate(part.float()) / each if self.rowwise else part / scale
            into.copy_(round_to(scaled, self.values_dtype))
        self.hold_all(values, scale.reshape(-1))

    def hold_all(self, values: Tensor, scale: Tensor) -> None:
        """Keep the values (out, in) and scales, (1,) or (out,), of a weight."""
        self.hold("qweight", values.view(torch.uint8))
        self.hold("scale", scale.float())
        if self.cache_transposed_weights:
            self.hold("qweight_t", values.view(torch.uint8).t())

    def storage(self) -> dict[str, Tensor]:
        """Return `weight` (out, in) in `values_dtype` and `weight_scale` in float32, () or (out, 1)."""
        scale = self.scales()
        return {"weight": self.values(), "weight_scale": scale[:, None] if self.rowwise else scale[0]}

    def adopt(self, tensors: Mapping[str, Tensor]) -> None:
        """Adopt `weight` in `values_dtype` and `weight_scale`, one or per row; the layer becomes rowwise if that is."""
        if missing := {"weight", "weight_scale"} - tensors.keys():
            raise ValueError(f"{' and '.join(sorted(missing))} missing for {self}")
        values, scale = self.on_storage_device(tensors["weight"]), tensors["weight_scale"]
        if values.dtype != self.values_dtype:
            raise ValueError(f"a weight in {values.dtype} was given to {self}, not in {self.values_dtype}")
        if scale.numel() not in (1, self.out_features):
            raise ValueError(f"a scale of shape {tuple(scale.shape)} was given to {self}: give one, or one per row")
        check_scale(scale.reshape(-1, 1).to(values.device), values)
        if scale.numel() == 1 and self.rowwise:
            scale = scale.reshape(1).expand(self.out_features)
        self.rowwise = scale.numel() > 1
        self.hold_all(values, scale.reshape(-1).to(values.device))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {'one scale per row' if self.rowwise else 'one scale'}"
