"""Frozen linear layers in 8 bits: 255 evenly spaced values in blocks of 64, each with a float32 scale.

For text encoders, by bitsandbytes' blockwise kernels. Not LLM.int8(), which rounds the inputs of a product too and sets
its outlier columns apart by what is in the batch: an embedding would depend on the prompts that are encoded with it.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux2.quantization.base import QuantizedLinear

BLOCK = 64  # elements with one scale


@lru_cache
def value_map(device: torch.device) -> Tensor:
    """The values from -1 to 1 that elements are rounded to, as shares of their block's largest."""
    import bitsandbytes.functional as bnb

    return bnb.create_linear_map(signed=True, total_bits=8).to(device)


class Int8Linear(QuantizedLinear):
    """Stored in eight bits and half a bit more for the scales; the weight is dequantized for each product."""

    kind = "int8"
    absmax: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(in_features, out_features, dtype)
        size = in_features * out_features
        self.allocate(device, qweight=(size,), absmax=(4 * -(-size // BLOCK),))

    def store(self, weight: Tensor) -> None:
        import bitsandbytes.functional as bnb

        weight = self.place(weight)
        codes, state = bnb.quantize_blockwise(weight, code=value_map(weight.device), blocksize=BLOCK)
        self.hold("qweight", codes.reshape(-1))
        self.hold("absmax", state.absmax)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        import bitsandbytes.functional as bnb

        exact = dtype if dtype in (torch.float32, torch.bfloat16, torch.float16) else torch.float32
        state = bnb.QuantState(
            self.absmax.view(torch.float32), code=value_map(self.qweight.device), blocksize=BLOCK, dtype=exact
        )
        weight = bnb.dequantize_blockwise(self.qweight, state)
        return weight.view(self.out_features, self.in_features).to(dtype)

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantize(x.dtype))

    def input_gradient(self, dy: Tensor) -> Tensor:
        return dy @ self.dequantize(dy.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, int8"
