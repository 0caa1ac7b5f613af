"""Frozen linear layers in 8 bits: 255 evenly spaced values in blocks of 64, each with a float32 scale.

For text encoders, with bitsandbytes' blockwise kernels. Not LLM.int8(), which also rounds the inputs of a product and
sets its outlier columns apart by the content of the batch: an embedding would depend on the prompts encoded with it.
"""

from functools import lru_cache

import torch
from torch import Tensor, nn

from flux2.quantization.base import KERNEL_DTYPES, Device, QuantizedLinear, kernels

BLOCK = 64  # elements per scale


@lru_cache
def value_map(device: torch.device) -> Tensor:
    """Return the values from -1 to 1 that elements are rounded to, relative to the largest element of their block."""
    return kernels().create_linear_map(signed=True, total_bits=8).to(device)


class BlockwiseInt8Linear(QuantizedLinear):
    """Stored in 8 bits plus half a bit for the scales; dequantized for each product."""

    kind = "int8"
    absmax: nn.Parameter

    def __init__(
        self, in_features: int, out_features: int, *, dtype: torch.dtype = torch.float32, device: Device = None
    ) -> None:
        super().__init__(in_features, out_features, dtype)
        size = in_features * out_features
        self.allocate(device, qweight=(size,), absmax=(4 * -(-size // BLOCK),))

    def store(self, weight: Tensor) -> None:
        weight = self.on_storage_device(weight)
        codes, state = kernels().quantize_blockwise(weight, code=value_map(weight.device), blocksize=BLOCK)
        self.hold("qweight", codes.reshape(-1))
        self.hold("absmax", state.absmax)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        exact = dtype if dtype in KERNEL_DTYPES else torch.float32
        absmax, code = self.absmax.view(torch.float32), value_map(self.qweight.device)
        state = kernels().QuantState(absmax, code=code, blocksize=BLOCK, dtype=exact)
        weight = kernels().dequantize_blockwise(self.qweight, state)
        return weight.view(self.out_features, self.in_features).to(dtype)
