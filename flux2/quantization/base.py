"""Frozen linear layers whose weight is stored in another form than it is multiplied in: the common base class.

Training needs two products of such a layer, x W^T and dy W (flux2/layers/frozen_linear.py); no weight gradient is
formed. To PEFT and other code it is an `nn.Linear` with a float `weight`, which is computed when it is read and cannot
be written.

All storage, including float32 scales, lies in uint8 Parameters without gradient: `module.to(dtype)` leaves those
unchanged, and code that moves or streams parameters moves all of a layer. The scales are viewed as float32 in place, so
their addresses must be multiples of four.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from flux2.layers.frozen_linear import FrozenProduct, cast_for_autocast, flatten_rows

Device = torch.device | str | None
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # the dtypes that bitsandbytes quantizes from and to


def backward_operation(name: str, function: Callable[..., Tensor], fake: Callable[..., Tensor], schema: str) -> Any:
    """Return `function` as one operation of PyTorch, named flux2::`name`, that compilers do not look into.

    The last argument of its schema, which is added here, is any tensor of the backward, or None in the forward. Without
    it a compiler sees that the forward and the backward compute the same from a weight, and keeps the result, as large
    as an unquantized weight, from one to the other.
    """
    operation = torch.library.custom_op(
        f"flux2::{name}",
        lambda *args: function(*args[:-1]),
        mutates_args=(),
        schema=schema.replace(")", ", Tensor? after)", 1),
    )
    operation.register_fake(lambda *args: fake(*args[:-1]))
    return operation


def kernels() -> Any:
    """Return bitsandbytes.functional, imported on first use because that takes a second."""
    import bitsandbytes.functional

    return bitsandbytes.functional


class DequantizedWeight(Tensor):
    """The weight of a quantized layer: shape, dtype and device are known at once, values are computed on use.

    The result of any operation is a plain tensor. Writing raises ValueError, because the change would be lost.
    """

    linear: QuantizedLinear

    @staticmethod
    def __new__(cls, linear: QuantizedLinear) -> DequantizedWeight:
        size = (linear.out_features, linear.in_features)
        weight = Tensor._make_wrapper_subclass(cls, size, dtype=linear.dtype, device=linear.qweight.device)
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
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if isinstance(value, cls) and argument.alias_info is not None and argument.alias_info.is_write:
                raise ValueError(value.linear.refusal)
        args, kwargs = tree_map_only(cls, lambda x: x.linear.dequantize(x.dtype), (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"DequantizedWeight(shape={tuple(self.shape)}, dtype={self.dtype}, of={self.linear})"


class QuantizedLinear(nn.Linear):
    """A frozen linear layer without bias whose weight is stored in another form (float8.py, nf4.py, int8.py).

    Attributes:
        dtype: Dtype of `weight` when it is read; `module.to(dtype)` changes it. Products are computed in the dtype of
            their input, or of autocast.
    """

    kind = ""
    qweight: nn.Parameter

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.dtype = in_features, out_features, dtype
        self.register_parameter("bias", None)

    def allocate(self, device: Device, **sizes: tuple[int, ...]) -> None:
        for name, size in sizes.items():
            self.hold(name, torch.empty(size, dtype=torch.uint8, device=device))

    def hold(self, name: str, tensor: Tensor) -> None:
        """Register the bytes of `tensor` as the parameter `name`."""
        raw = torch.atleast_1d(tensor.detach().contiguous()).view(torch.uint8)
        self.register_parameter(name, nn.Parameter(raw, requires_grad=False))

    @property
    def weight(self) -> Tensor:
        """(out, in) in `dtype`, read-only."""
        return DequantizedWeight(self)

    @weight.setter
    def weight(self, value: Tensor) -> None:
        raise ValueError(self.refusal)

    @property
    def refusal(self) -> str:
        return (
            f"the weight of a frozen {self.kind} layer cannot be written: a change smaller than its rounding would be "
            "lost. To merge an adapter, or for an initialization that changes the base (PiSSA, OLoRA, LoftQ ...), load "
            "the model with precision=bf16 or fp32; with this precision, do not merge the adapter."
        )

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in the dtype of x, or of autocast."""
        return FrozenProduct.apply(self, cast_for_autocast(x))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.qweight.device)).dtype
        return super()._apply(fn, recurse)

    def on_storage_device(self, weight: Tensor) -> Tensor:
        """Return `weight` on the device of the storage, or where it is if the storage is still on the meta device.

        Raise ValueError for a weight of another shape.
        """
        if weight.shape != (self.out_features, self.in_features):
            raise ValueError(f"a weight of shape {tuple(weight.shape)} was given to {self}")
        return weight.detach().to(weight.device if self.qweight.is_meta else self.qweight.device).contiguous()

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Return the weight (out, in) in newly allocated memory."""
        raise NotImplementedError

    def weight_for_product(self, dtype: torch.dtype, after: Tensor | None = None) -> Tensor:
        """Return the weight (out, in) for one product, possibly in a buffer that the next product overwrites.

        `after` is a tensor of the backward if the product is one (`backward_operation`).
        """
        return self.dequantize(dtype)

    def product(self, x: Tensor) -> Tensor:
        """Return x W^T: (..., in) -> (..., out) in the dtype of x."""
        y = F.linear(flatten_rows(x), self.weight_for_product(x.dtype))
        return y.view(*x.shape[:-1], self.out_features)

    def input_gradient(self, dy: Tensor) -> Tensor:
        """Return dy W: (..., out) -> (..., in) in the dtype of dy."""
        dx = flatten_rows(dy) @ self.weight_for_product(dy.dtype, after=dy)
        return dx.view(*dy.shape[:-1], self.in_features)

    def store(self, weight: Tensor) -> None:
        """Quantize a float weight (out, in) into the storage."""
        raise NotImplementedError

    def storage(self) -> dict[str, Tensor]:
        """Return the tensors from which `adopt` restores the storage bit for bit."""
        raise NotImplementedError

    def adopt(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over a weight that is already quantized. Raise ValueError if it does not fit this layer."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {self.kind}"


def swap_linears(model: nn.Module, names: Sequence[str], make: Callable[..., QuantizedLinear]) -> None:
    """Replace the linears `names` of `model` by what `make(in_features, out_features, device=...)` returns, in place.

    Weights that are not on the meta device are quantized at once. Raise ValueError for a linear with a bias.
    """
    for name in names:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        if linear.bias is not None:
            raise ValueError(f"{name} has a bias, but a quantized layer has none: leave it out of the quantized layers")
        quantized = make(linear.in_features, linear.out_features, device=linear.weight.device).train(linear.training)
        if not linear.weight.is_meta:
            quantized.store(linear.weight)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, quantized)
