"""Frozen linear layers whose weights are stored in another form than they are multiplied in: what they share.

Training needs two products of such a layer, x W^T and dy W (flux2/layers/frozen_linear.py); a weight gradient is never
formed. To PEFT and to anyone who looks it is an `nn.Linear` of a float `weight`, which is computed when it is read and
cannot be written.

All that is stored, float32 scales too, lies in uint8 Parameters without gradient: `module.to(dtype)` leaves those as
they are, and whatever moves or streams parameters moves all of a layer. The scales are read as float32 in place, so
they must lie at addresses that are multiples of four.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flux2.layers.frozen_linear import FrozenProduct, autocasted


class DequantizedWeight(Tensor):
    """The weight of a quantized layer: its shape, dtype and device at once, its values when they are used.

    A result of any operation is a plain tensor. Writing is an error, as it would be lost.
    """

    linear: QuantizedLinear

    @staticmethod
    def __new__(cls, linear: QuantizedLinear) -> DequantizedWeight:
        shape = (linear.out_features, linear.in_features)
        weight = Tensor._make_wrapper_subclass(cls, shape, dtype=linear.dtype, device=linear.qweight.device)
        weight.linear = linear
        return weight

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == Tensor.data.__set__ and isinstance(args[0], cls):  # type: ignore[attr-defined]
            raise ValueError(args[0].linear.refusal)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if isinstance(value, cls) and argument.alias_info is not None and argument.alias_info.is_write:
                raise ValueError(value.linear.refusal)

        def values(x: Any) -> Any:
            return x.linear.dequantize(x.dtype) if isinstance(x, cls) else x

        return func(*torch.utils._pytree.tree_map(values, args), **torch.utils._pytree.tree_map(values, kwargs))

    def __repr__(self) -> str:  # type: ignore[override]
        return f"DequantizedWeight(shape={tuple(self.shape)}, dtype={self.dtype}, of={self.linear})"


class QuantizedLinear(nn.Linear):
    """A frozen linear layer without bias whose weight is stored in another form. See flux2/quantization/float8.py and
    flux2/quantization/nf4.py.

    Attributes:
        dtype: of `weight`, when it is read; `module.to(dtype)` changes it. Products are in the dtype of their input,
            or of autocast.
    """

    kind = ""
    qweight: nn.Parameter

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        self.dtype = dtype
        self.register_parameter("bias", None)

    def allocate(self, device: torch.device | str | None, **sizes: tuple[int, ...]) -> None:
        for name, size in sizes.items():
            self.hold(name, torch.empty(size, dtype=torch.uint8, device=device))

    def hold(self, name: str, tensor: Tensor) -> None:
        """Keep the bytes of `tensor` as the parameter `name`."""
        raw = tensor.detach().contiguous()
        raw = raw if raw.dtype == torch.uint8 else raw.reshape(-1 if raw.ndim == 0 else raw.shape).view(torch.uint8)
        self.register_parameter(name, nn.Parameter(raw, requires_grad=False))

    @property
    def weight(self) -> Tensor:
        """(out, in) in `dtype`: to be read; writing it is refused."""
        return DequantizedWeight(self)

    @weight.setter
    def weight(self, value: Tensor) -> None:
        raise ValueError(self.refusal)

    @property
    def refusal(self) -> str:
        return (
            f"the weight of a frozen {self.kind} layer cannot be written: a change smaller than its rounding would be "
            "lost. To merge an adapter, or for an initialization that changes the base (PiSSA, OLoRA, LoftQ ...), load "
            "the model with precision=bf16 or fp32; in this one keep the adapter beside the base."
        )

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in the dtype of x, or of autocast."""
        return FrozenProduct.apply(self, autocasted(x))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.qweight.device)).dtype
        return super()._apply(fn, recurse)

    def place(self, weight: Tensor) -> Tensor:
        """`weight` where the storage lies; where it lies itself if the storage is still on the meta device."""
        if weight.shape != (self.out_features, self.in_features):
            raise ValueError(f"a weight of shape {tuple(weight.shape)} was given to {self}")
        return weight.detach().to(weight.device if self.qweight.is_meta else self.qweight.device).contiguous()

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) in memory of its own."""
        raise NotImplementedError

    def product(self, x: Tensor) -> Tensor:
        """x W^T: (..., in) -> (..., out) in the dtype of x."""
        raise NotImplementedError

    def input_gradient(self, dy: Tensor) -> Tensor:
        """dy W: (..., out) -> (..., in) in the dtype of dy."""
        raise NotImplementedError

    def store(self, weight: Tensor) -> None:
        """Quantize a float weight (out, in) into the storage."""
        raise NotImplementedError

    def storage(self) -> dict[str, Tensor]:
        """What `adopt` takes back, bit for bit."""
        raise NotImplementedError

    def adopt(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over a weight that is quantized already. Raises ValueError if it is not one of this layer's."""
        raise NotImplementedError
