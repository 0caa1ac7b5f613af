"""Frozen linear layers in INT8 (eight_bit.py): integers from -127 to 127 with one scale per row of the weight.

The sums of a product are exact integers in 32 bits. From them on, the result is computed as on any device:

    y  = x W^T = (q_x q^T) * s * s_x                 s per output column, s_x per token
    dx = dy W  = (q_dy q) * s_dy                     q_dy: dy * s, quantized by token

A block Hadamard rotation (QuIP#, arXiv 2402.04396; QuaRot, arXiv 2404.00456) spreads columns with large values over
their block, so that fewer values of a row are rounded to zero. H is orthonormal and symmetric, so H H = 1:

    y = x W^T = (x H) (W H)^T        W H is what is stored        dx = (dy (W H)) H
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux2.layers import fused_elementwise
from flux2.quantization.base import Device
from flux2.quantization.eight_bit import LARGEST, SMALLEST_SCALE, EightBitLinear, row_maxima

ROTATION, LEAST_ROTATION = 256, 16  # columns of a rotated block: the largest and the smallest number
WORKSPACE = 1 << 27  # elements of a result that are computed at once
MOST_PADDED = 16  # a product on a GPU needs more rows than this
COARSE, SAMPLED_ROWS = 2, 64  # see Int8Linear.is_coarse


def rotation_block(in_features: int) -> int:
    """Return the largest power of two up to `ROTATION` that divides `in_features`.

    Raise ValueError if that is below `LEAST_ROTATION`: so few columns hide no outlier.
    """
    block = min(in_features & -in_features, ROTATION)
    if block < LEAST_ROTATION:
        raise ValueError(
            f"precision.rotate=true: {in_features} input features are no multiple of {LEAST_ROTATION}, the smallest "
            "block that can be rotated. Set precision.rotate=false, or leave this layer out of precision.layers."
        )
    return block


def hadamard_signs(size: int, device: Device = None) -> Tensor:
    """Return Sylvester's Hadamard matrix (size, size) of 1 and -1 in int8; `size` is a power of two."""
    signs = torch.ones(1, 1, dtype=torch.int8, device=device)
    while len(signs) < size:
        signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)])
    return signs


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(M, K) -> values (M, K) in int8 and scales (M, 1) in float32: x = scales * values, up to half a scale.

    A row with NaN or infinity has a scale that is not finite. Around 1536 float16 has steps of one, so adding that
    rounds to an integer, which is the low byte of the sum: 9 bytes a number are read and written, instead of 21 with
    one operation for each of division, rounding and conversion.
    """
    scale = (row_maxima(x) / LARGEST[torch.int8]).clamp(min=SMALLEST_SCALE)
    sums = x.new_empty(x.shape, dtype=torch.float16)
    torch.addcmul(scale.new_full((1, 1), 1536.0), x, 1 / scale, out=sums)  # computed in float32 or above
    return sums.view(torch.int16).to(torch.int8), scale


def integer_product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x @ weight, (M, K) and (K, N) in int8, exactly: (M, N) in int32. K is at most 2^31 / 127^2 = 133,144."""
    if x.is_cuda and len(x) <= MOST_PADDED:
        return torch._int_mm(F.pad(x, (0, 0, 0, MOST_PADDED + 1 - len(x))), weight)[: len(x)]
    return torch._int_mm(x, weight)


def int8_product(x: Tensor, weight: Tensor, before: Tensor | None, after: Tensor | None, fused: bool = False) -> Tensor:
    """Quantize the rows of x (M, K) and return (x * before) @ weight * after: (M, N) in the dtype of x.

    `weight` (K, N) is int8, column-major; `before` (K,) and `after` (N,) are float32. Some rows are computed at a time,
    as many as `WORKSPACE` allows, because the integer sums have 4 bytes each. `fused`: quantize with a Triton kernel.
    """
    y = x.new_empty(len(x), weight.shape[1])
    pieces = -(-len(x) * weight.shape[1] // WORKSPACE)
    step = max(1, -(-len(x) // max(1, pieces)))
    for rows, out in zip(x.split(step), y.split(step), strict=True):
        if fused:
            values, scale = fused_elementwise.quantize_rows(rows, before, torch.int8, SMALLEST_SCALE)
        else:
            # not in a variable, in which it would stay while the product runs
            values, scale = quantize_rows(
                rows if before is None else torch.mul(rows, before, out=torch.empty_like(rows))
            )
        sums = integer_product(values, weight)
        torch.mul(sums, scale if after is None else after, out=out)  # in the dtype of x, without a float32 copy
        if after is not None:
            out.mul_(scale)
    return y


class Int8Linear(EightBitLinear):
    """Stored in int8 with one scale per row.

    Attributes:
        block: Number of columns that are rotated together; 0 without rotation.
    """

    kind = "int8"
    values_dtype = torch.int8
    multiple = 8
    rotation: nn.Parameter  # signs of the Hadamard matrix (block, block)

    def __init__(
        self, in_features: int, out_features: int, *, device: Device = None, rotate: bool = False, **options: Any
    ) -> None:
        super().__init__(in_features, out_features, device=device, rowwise=True, **options)
        self.block = rotation_block(in_features) if rotate else 0
        if rotate:
            self.hold("rotation", hadamard_signs(self.block, device))

    def rotate(self, x: Tensor) -> Tensor:
        if not self.block:
            return x
        signs = self.rotation.view(torch.int8).to(x.dtype)
        return (x.reshape(-1, self.block) @ signs.mul_(self.block**-0.5)).view(x.shape)

    def is_coarse(self) -> bool:
        """Return whether half of the integers in a sample of rows are from -2 to 2: a few columns decide the scales.

        The typical weight is then less than 4 steps, and the input gradient's cosine with the exact one below 0.997.
        A normal distribution has a median of 20. Rows of zeros do not count; nor does a layer without its weight.
        """
        values: Tensor = getattr(self.qweight, "to_local", lambda: self.qweight)()  # of a shard
        if values.is_meta:
            return False
        rows = values[:: max(1, len(values) // SAMPLED_ROWS)].view(torch.int8)
        rows = rows[rows.any(dim=1)]
        return bool(rows.numel()) and bool((rows.abs() <= COARSE).float().mean() >= 0.5)

    def multiply(self, x: Tensor, weight: Tensor, before: Tensor | None, after: Tensor | None) -> Tensor:
        return int8_product(x, weight, before, after, self.fuses(x))

    def storage(self) -> dict[str, Tensor]:
        """Return `weight` (out, in) in int8, `weight_scale` (out, 1) in float32, if rotated `weight_rotation` ()."""
        block = {"weight_rotation": torch.tensor(self.block, dtype=torch.int32)} if self.block else {}
        return super().storage() | block

    def adopt(self, tensors: Mapping[str, Tensor]) -> None:
        """Adopt what `storage` returns. Raise ValueError if it is rotated in other blocks than this layer, or not."""
        block = int(tensors["weight_rotation"]) if "weight_rotation" in tensors else 0
        if block != self.block:
            raise ValueError(
                f"a weight rotated in blocks of {block} was given to {self}: 0 is without rotation. Set "
                f"precision.rotate={str(block > 0).lower()}, or quantize the weight again."
            )
        super().adopt(tensors)
        if block and self.rotation.is_meta:
            self.hold("rotation", hadamard_signs(block, self.qweight.device))

    def store(self, weight: Tensor) -> None:
        if self.block and self.rotation.is_meta:
            self.hold("rotation", hadamard_signs(self.block, weight.device))
        super().store(weight)

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", rotated in blocks of {self.block}" if self.block else "")
