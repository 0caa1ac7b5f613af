"""Frozen linear layers in FP8: e4m3, w = scale * q, with one scale per tensor or per row.

The weight is quantized once, when it is loaded. In the products the other side is quantized too, row by row, at each
call:

    y  = x W^T  = (s_x q_x) (s q)^T
    dx = dy W   = (s_dy q_dy) (s q)        per-row scales belong to the summed dimension: they are folded into dy first

e4m3 serves for gradients too: rows scaled to its range lose 3.7 % of their norm, against 5.9 % in e5m2.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux2.layers.frozen_linear import flatten_rows
from flux2.quantization.base import Device, QuantizedLinear, backward_operation

E4M3_MAX = 448.0
CHUNK = 1 << 21  # elements quantized at once, so that float32 copies stay small compared to a large weight
MULTIPLE = 16  # FP8 products on a GPU need both sides of a weight to be multiples of this


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(M, K) -> values (M, K) in e4m3 and scales (M, 1) in float32: x = scales * values. Keep NaN and infinities."""
    largest = torch.linalg.vector_norm(x, float("inf"), dim=1, keepdim=True).float()
    scale = (largest / E4M3_MAX).clamp(min=1e-12)
    return (x / scale).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


def fp8_product(x: Tensor, weight: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Quantize the rows of x (M, K) and return x @ (weight_scale * weight) in FP8: (M, N).

    `weight` (K, N) is e4m3, column-major. Its scales, (1,) or (N,), become one per column, because the operation does
    not mix scales per row and per tensor.
    """
    values, scale = quantize_rows(x)
    columns = weight_scale.expand(1, weight.shape[1]).contiguous()
    out = torch.bfloat16 if x.is_cuda else dtype  # a GPU returns only bfloat16 with these scales
    return torch._scaled_mm(values, weight, scale, columns, out_dtype=out, use_fast_accum=True).to(dtype)


copy_operation = backward_operation(
    "fp8_copy",
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

    Quantizers that divide the largest value by that of FP8 give rows of zeros the scale 0.

    Args:
        scale: Scales in a shape that multiplies `values`.
        values: FP8 values.
    """
    scale = scale.float()
    if not bool(torch.isfinite(scale * torch.finfo(values.dtype).max).all()) or bool((scale < 0).any()):
        raise ValueError("a scale is negative, or its weights are not finite")
    is_zero = scale == 0
    if bool(is_zero.any()) and bool((is_zero & (values.float() != 0)).any()):
        raise ValueError("a scale is zero, but its values are not")


class Float8Linear(QuantizedLinear):
    """Stored as e4m3 with one scale per tensor or per row.

    Attributes:
        rowwise: Whether each row has its own scale.
        forward_fp8, backward_fp8: Which of the two products are computed in FP8; the others use the dequantized weight
            in the dtype of their input.
        cache_transposed_weights: Whether the transposed weight, which the backward in FP8 needs, is kept (twice the
            memory) or computed at every call.
    """

    kind = "fp8"
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
        forward_fp8: bool = True,
        backward_fp8: bool = True,
        cache_transposed_weights: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, dtype)
        self.rowwise, self.forward_fp8, self.backward_fp8 = rowwise, forward_fp8, backward_fp8
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
        """(out, in) in e4m3, row-major."""
        return self.qweight.view(torch.float8_e4m3fn)

    def transposed(self, after: Tensor | None = None) -> Tensor:
        """(in, out) in e4m3, row-major: cached or copied; `after` is that of `backward_operation`."""
        transposed = self.qweight_t if self.cache_transposed_weights else copied(self.qweight.t(), torch.uint8, after)
        return transposed.view(torch.float8_e4m3fn)

    def scales(self) -> Tensor:
        """(1,) in float32, or (out,) if rowwise."""
        return self.scale.view(torch.float32)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return self.values().to(dtype).mul_(self.scales()[:, None])

    def product(self, x: Tensor) -> Tensor:
        rows = flatten_rows(x)
        if self.forward_fp8:
            y = fp8_product(rows, self.values().t(), self.scales(), x.dtype)
        else:  # e4m3 values are exact in every larger float; the scales are applied to the result
            y = F.linear(rows, self.values().to(x.dtype)).mul_(self.scales())
        return y.view(*x.shape[:-1], self.out_features)

    def input_gradient(self, dy: Tensor) -> Tensor:
        rows, weight_scale = flatten_rows(dy), self.scales()
        if self.rowwise:  # the scales belong to the summed dimension, which a product cannot scale
            rows = rows * weight_scale
            weight_scale = torch.ones(1, device=rows.device)
        if self.backward_fp8:
            dx = fp8_product(rows, self.transposed(dy).t(), weight_scale, dy.dtype)
        else:
            dx = (rows.to(dy.dtype) @ copied(self.values(), dy.dtype, dy)).mul_(weight_scale)
        return dx.view(*dy.shape[:-1], self.in_features)

    def store(self, weight: Tensor) -> None:
        weight = self.on_storage_device(weight)
        values = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
        largest = torch.linalg.vector_norm(weight, float("inf"), dim=1, keepdim=True).float()
        if not bool(torch.isfinite(largest).all()):
            raise ValueError("the weight has values that are not finite")
        if not self.rowwise:
            largest = largest.max()
        scale = (largest / E4M3_MAX).clamp(min=1e-12)
        step = max(1, CHUNK // self.in_features)
        for start in range(0, self.out_features, step):
            rows = slice(start, start + step)
            part = weight[rows] / (scale[rows] if self.rowwise else scale)
            values[rows] = part.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        self._hold_all(values, scale.reshape(-1))

    def _hold_all(self, values: Tensor, scale: Tensor) -> None:
        self.hold("qweight", values.view(torch.uint8))
        self.hold("scale", scale.float())
        if self.cache_transposed_weights:
            self.hold("qweight_t", values.view(torch.uint8).t())

    def storage(self) -> dict[str, Tensor]:
        """Return `weight` (out, in) in e4m3 and `weight_scale` in float32, () or (out, 1)."""
        scale = self.scales()
        return {"weight": self.values(), "weight_scale": scale[:, None] if self.rowwise else scale[0]}

    def adopt(self, tensors: Mapping[str, Tensor]) -> None:
        """Adopt `weight` in e4m3 and `weight_scale`, one or per row; the layer becomes rowwise if the scale is."""
        if missing := {"weight", "weight_scale"} - tensors.keys():
            raise ValueError(f"{' and '.join(sorted(missing))} missing for {self}")
        values, scale = self.on_storage_device(tensors["weight"]), tensors["weight_scale"]
        if values.dtype != torch.float8_e4m3fn:
            raise ValueError(f"a weight in {values.dtype} was given to {self}, not in {torch.float8_e4m3fn}")
        if scale.numel() not in (1, self.out_features):
            raise ValueError(f"a scale of shape {tuple(scale.shape)} was given to {self}: give one, or one per row")
        check_scale(scale.reshape(-1, 1).to(values.device), values)
        if scale.numel() == 1 and self.rowwise:
            scale = scale.reshape(1).expand(self.out_features)
        self.rowwise = scale.numel() > 1
        self._hold_all(values, scale.reshape(-1).to(values.device))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {'one scale per row' if self.rowwise else 'one scale'}"
