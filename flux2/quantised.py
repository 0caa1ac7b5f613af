"""Frozen linear layers whose weights are kept in eight or four bits.

    fp8   e4m3, w = scale * q, with one scale a tensor, or one a row. In the products the other side is quantised too,
          row by row, when it is at hand:
              y  = x W^T       = (s_x q_x) (s q)^T
              dx = dy W        = (s_dy q_dy) (s q)          with a scale a row first folded into dy
          e4m3 for gradients too: rows scaled to its range lose 3.7 % of their norm, against 5.9 % in e5m2.
    nf4   bitsandbytes' 4-bit NormalFloat with doubly quantised block scales (QLoRA, arxiv.org/abs/2305.14314);
          dequantised before each product.

Only the two products above exist: a weight gradient is never formed (flux2/linear.py). To PEFT and to anyone who looks
these are `nn.Linear`s of a float `weight`, which is computed when it is read and cannot be written.

All that is stored, float32 scales too, lies in uint8 Parameters without gradient: `module.to(dtype)` leaves those as
they are, and whatever moves or streams parameters moves all of a layer. The scales are read as float32 in place, so
they must lie at addresses that are multiples of four.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import bitsandbytes.functional as bnb
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux2.linear import FrozenProduct

E4M3_MAX = 448.0
MULTIPLE = 16  # of both sides of a matrix, for FP8 products on a GPU
CHUNK = 1 << 24  # elements that are quantised at once: their float32 copies are then small beside a large weight


class DequantisedWeight(Tensor):
    """The weight of a quantised layer: its shape, dtype and device at once, its values when they are used.

    A result of any operation is a plain tensor. Writing is an error, as it would be lost.
    """

    linear: QuantisedLinear

    @staticmethod
    def __new__(cls, linear: QuantisedLinear) -> DequantisedWeight:
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
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if isinstance(value, cls) and argument.alias_info is not None and argument.alias_info.is_write:
                raise ValueError(value.linear.refusal)

        def values(x: Any) -> Any:
            return x.linear.dequantise(x.dtype) if isinstance(x, cls) else x

        return func(*torch.utils._pytree.tree_map(values, args), **torch.utils._pytree.tree_map(values, kwargs))

    def __repr__(self) -> str:  # type: ignore[override]
        return f"DequantisedWeight(shape={tuple(self.shape)}, dtype={self.dtype}, of={self.linear})"


class QuantisedLinear(nn.Linear):
    """A frozen linear layer without bias whose weight is stored in another form. See Float8Linear and Nf4Linear.

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
        return DequantisedWeight(self)

    @weight.setter
    def weight(self, value: Tensor) -> None:
        raise ValueError(self.refusal)

    @property
    def refusal(self) -> str:
        return (
            f"the weight of a frozen {self.kind} layer cannot be written: a change smaller than its rounding would be "
            "lost. To merge an adapter, or for an initialisation that changes the base (PiSSA, OLoRA, LoftQ ...), load "
            "the model with precision=bf16 or fp32; in this one keep the adapter beside the base."
        )

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out) in the dtype of x, or of autocast."""
        if not x.is_meta and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return FrozenProduct.apply(self, x)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantisedLinear:
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.qweight.device)).dtype
        return super()._apply(fn, recurse)

    def place(self, weight: Tensor) -> Tensor:
        """`weight` where the storage lies; where it lies itself if the storage is still on the meta device."""
        if weight.shape != (self.out_features, self.in_features):
            raise ValueError(f"a weight of shape {tuple(weight.shape)} was given to {self}")
        return weight.detach().to(weight.device if self.qweight.is_meta else self.qweight.device).contiguous()

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) in memory of its own."""
        raise NotImplementedError

    def product(self, x: Tensor) -> Tensor:
        """x W^T: (..., in) -> (..., out) in the dtype of x."""
        raise NotImplementedError

    def input_gradient(self, dy: Tensor) -> Tensor:
        """dy W: (..., out) -> (..., in) in the dtype of dy."""
        raise NotImplementedError

    def store(self, weight: Tensor) -> None:
        """Quantise a float weight (out, in) into the storage."""
        raise NotImplementedError

    def storage(self) -> dict[str, Tensor]:
        """What `adopt` takes back, bit for bit."""
        raise NotImplementedError

    def adopt(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over a weight that is quantised already. Raises ValueError if it is not one of this layer's."""
        raise NotImplementedError


# ------------------------------------------------------------------ fp8


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """(M, K) -> values (M, K) in e4m3 and scales (M, 1) in float32: x = scales * values. Not finite stays so."""
    largest = torch.linalg.vector_norm(x, float("inf"), dim=1, keepdim=True).float()
    scale = (largest / E4M3_MAX).clamp(min=1e-12)
    return (x / scale).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


def scaled_product(a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """(M, K) @ (K, N) in FP8: `a` row-major, `b` column-major, scales (M, 1) and (1, N) -> (M, N).

    Scales are one a row and one a column, because the operation takes no mixture with one a tensor.
    """
    out = torch.bfloat16 if a.is_cuda else dtype  # all that a GPU gives with these scales
    return torch._scaled_mm(a, b, a_scale, b_scale.contiguous(), out_dtype=out, use_fast_accum=True).to(dtype)


class Float8Linear(QuantisedLinear):
    """Stored as e4m3 with one scale a tensor, or one a row.

    Attributes:
        rowwise: one scale a row.
        forward_fp8, backward_fp8: which of the two products are in FP8; the others are in the dtype of their input,
            with the dequantised weight.
        keep_both_layouts: the backward's product wants the weight transposed in memory: keep it so too (twice the
            memory), or transpose it at every call.
    """

    kind = "fp8"
    scale: nn.Parameter

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        rowwise: bool = False,
        forward_fp8: bool = True,
        backward_fp8: bool = True,
        keep_both_layouts: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, dtype)
        self.rowwise = rowwise
        self.forward_fp8 = forward_fp8
        self.backward_fp8 = backward_fp8
        self.keep_both_layouts = keep_both_layouts
        self.allocate(device, qweight=(out_features, in_features), scale=(4 * (out_features if rowwise else 1),))
        if keep_both_layouts:
            self.allocate(device, qweight_t=(in_features, out_features))

    def values(self) -> Tensor:
        """(out, in) in e4m3, row-major."""
        return self.qweight.view(torch.float8_e4m3fn)

    def transposed(self) -> Tensor:
        """(in, out) in e4m3, row-major: kept, or copied."""
        kept = self.qweight_t if self.keep_both_layouts else self.qweight.t().contiguous()
        return kept.view(torch.float8_e4m3fn)

    def scales(self) -> Tensor:
        """(1,) or, rowwise, (out,) in float32."""
        return self.scale.view(torch.float32)

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        return self.values().to(dtype).mul_(self.scales()[:, None])

    def product(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        if self.forward_fp8:
            values, scale = quantise_rows(rows)
            columns = self.scales().expand(1, self.out_features)
            y = scaled_product(values, scale, self.values().t(), columns, x.dtype)
        else:  # e4m3 is exact in every other float: the scales are left for the result
            y = F.linear(rows, self.values().to(x.dtype)).mul_(self.scales())
        return y.view(*x.shape[:-1], self.out_features)

    def input_gradient(self, dy: Tensor) -> Tensor:
        rows = dy.reshape(-1, self.out_features)
        weight_scale = self.scales()
        if self.rowwise:  # the scale belongs to the summed dimension, where a product takes none
            rows = rows * weight_scale
            weight_scale = torch.ones(1, device=rows.device)
        if self.backward_fp8:
            values, scale = quantise_rows(rows)
            columns = weight_scale.expand(1, self.in_features)
            dx = scaled_product(values, scale, self.transposed().t(), columns, dy.dtype)
        else:
            dx = (rows.to(dy.dtype) @ self.values().to(dy.dtype)).mul_(weight_scale)
        return dx.view(*dy.shape[:-1], self.in_features)

    def store(self, weight: Tensor) -> None:
        weight = self.place(weight)
        values = torch.empty_like(weight, dtype=torch.float8_e4m3fn)
        largest = torch.linalg.vector_norm(weight, float("inf"), dim=1, keepdim=True).float()
        if not self.rowwise:
            largest = largest.max()
        scale = (largest / E4M3_MAX).clamp(min=1e-12)
        step = max(1, CHUNK // self.in_features)
        for start in range(0, self.out_features, step):
            rows = slice(start, start + step)
            part = weight[rows] / (scale[rows] if self.rowwise else scale)
            values[rows] = part.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        self._keep(values, scale.reshape(-1))

    def _keep(self, values: Tensor, scale: Tensor) -> None:
        self.hold("qweight", values.view(torch.uint8))
        self.hold("scale", scale.float())
        if self.keep_both_layouts:
            self.hold("qweight_t", values.view(torch.uint8).t())

    def storage(self) -> dict[str, Tensor]:
        """`weight` (out, in) in e4m3 and `weight_scale` in float32, () or (out, 1)."""
        scale = self.scales()
        return {"weight": self.values(), "weight_scale": scale[:, None] if self.rowwise else scale[0]}

    def adopt(self, tensors: Mapping[str, Tensor]) -> None:
        """`weight` in e4m3 and `weight_scale`, one number or one a row; the layer is rowwise if the scale is."""
        if missing := {"weight", "weight_scale"} - tensors.keys():
            raise ValueError(f"{' and '.join(sorted(missing))} missing for {self}")
        values, scale = self.place(tensors["weight"]), tensors["weight_scale"]
        if values.dtype != torch.float8_e4m3fn:
            raise ValueError(f"a weight in {values.dtype} was given to {self}, not in {torch.float8_e4m3fn}")
        if scale.numel() not in (1, self.out_features):
            raise ValueError(f"a scale of shape {tuple(scale.shape)} was given to {self}: one, or one a row, is needed")
        if scale.numel() == 1 and self.rowwise:
            scale = scale.reshape(1).expand(self.out_features)
        self.rowwise = scale.numel() > 1
        self._keep(values, scale.reshape(-1).to(values.device))

    def extra_repr(self) -> str:
        scales = "one scale a row" if self.rowwise else "one scale"
        return f"in_features={self.in_features}, out_features={self.out_features}, e4m3, {scales}"


# ------------------------------------------------------------------ nf4

BLOCK = 64  # elements with one scale
NESTED_BLOCK = 256  # scales with one scale
NF4_KEYS = ("weight", "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4")
NESTED_KEYS = ("weight.nested_absmax", "weight.nested_quant_map")


@lru_cache
def quant_map(device: torch.device) -> Tensor:
    """The sixteen values of NF4."""
    return bnb.get_4bit_type("nf4", device=device)


@lru_cache
def nested_quant_map(device: torch.device) -> Tensor:
    """The 256 values that scales are rounded to."""
    return bnb.create_dynamic_map().to(device)


class Workspace:
    """One buffer that all NF4 layers of a model dequantise into on a GPU, as large as the largest of them.

    This is safe because what is in it is used up before it is written again: products are enqueued on one stream, one
    after the other, and their results are elsewhere; autograd keeps none of it (FrozenProduct saves nothing); and each
    stream has its own.
    """

    def __init__(self) -> None:
        self.largest = 0
        self._buffers: dict[tuple[Any, ...], Tensor] = {}

    def take(self, size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """`size` elements, until the next call."""
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


class Nf4Linear(QuantisedLinear):
    """Stored in four bits and 0.127 more for the scales, as bitsandbytes stores it.

    Attributes:
        nested: whether the scales of the blocks are quantised too; so it is but for an adopted weight without.
        workspace: what the weight is dequantised into for the products; shared by the layers of a model.
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
        device: torch.device | str | None = None,
        workspace: Workspace | None = None,
    ) -> None:
        super().__init__(in_features, out_features, dtype)
        self.nested = True
        self.source_dtype = dtype
        self.workspace = workspace or Workspace()
        size = in_features * out_features
        self.workspace.largest = max(self.workspace.largest, size)
        blocks = -(-size // BLOCK)
        self.allocate(
            device,
            qweight=((size + 1) // 2, 1),
            absmax=(blocks,),
            nested_absmax=(4 * -(-blocks // NESTED_BLOCK),),
            offset=(4,),
        )

    def state(self, dtype: torch.dtype, shape: tuple[int, ...]) -> bnb.QuantState:
        """bitsandbytes' description of the storage, to be dequantised to `dtype` and `shape`."""
        device = self.qweight.device
        nested = None
        if self.nested:
            nested = bnb.QuantState(
                self.nested_absmax.view(torch.float32),
                code=nested_quant_map(device),
                blocksize=NESTED_BLOCK,
                dtype=torch.float32,
            )
        return bnb.QuantState(
            self.absmax if self.nested else self.absmax.view(torch.float32),
            shape=torch.Size(shape),
            code=quant_map(device),
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=dtype,
            offset=self.offset.view(torch.float32)[0] if self.nested else None,
            state2=nested,
        )

    def dequantise(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """The weight (out, in), in `out` (out * in elements of `dtype`) if it is given."""
        size = self.in_features * self.out_features
        # Blocks run through the whole weight. The CPU kernel starts anew at every row, so each row is made one block.
        shape = (size // BLOCK, BLOCK) if size % BLOCK == 0 else (1, size)
        exact = dtype if dtype in (torch.float32, torch.bfloat16, torch.float16) else torch.float32
        into = None if out is None else out.view(shape)
        weight = bnb.dequantize_4bit(self.qweight, self.state(exact, shape), out=into)
        return weight.view(self.out_features, self.in_features).to(dtype)

    def shared(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) for one product: in the workspace where that can be."""
        device = self.qweight.device
        if device.type not in self.out_devices or dtype == torch.float64 or torch.compiler.is_compiling():
            return self.dequantise(dtype)
        return self.dequantise(dtype, self.workspace.take(self.in_features * self.out_features, dtype, device))

    def product(self, x: Tensor) -> Tensor:
        return F.linear(x, self.shared(x.dtype))

    def input_gradient(self, dy: Tensor) -> Tensor:
        return dy @ self.shared(dy.dtype)

    def store(self, weight: Tensor) -> None:
        weight = self.place(weight)
        parts, scales = [], []
        for part in weight.reshape(-1).split(CHUNK):
            packed, state = bnb.quantize_4bit(part, blocksize=BLOCK, quant_type="nf4")
            parts.append(packed)
            scales.append(state.absmax)
        absmax = torch.cat(scales)
        offset = absmax.mean()  # the scales are quantised as bitsandbytes does when it sees the whole weight
        codes, nested = bnb.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK)
        self.nested = True
        self.source_dtype = weight.dtype
        self.hold("qweight", torch.cat(parts))
        self.hold("absmax", codes)
        self.hold("nested_absmax", nested.absmax)
        self.hold("offset", offset.reshape(1))

    def storage(self) -> dict[str, Tensor]:
        """In bitsandbytes' keys, as its `Linear4bit` saves it."""
        state = self.state(self.source_dtype, (self.out_features, self.in_features)).as_dict(packed=True)
        return {"weight": self.qweight.detach()} | {f"weight.{key}": tensor for key, tensor in state.items()}

    def adopt(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes bitsandbytes' keys, with scales quantised or not."""
        nested = any(key in tensors for key in NESTED_KEYS)
        needed = {*NF4_KEYS, *NESTED_KEYS} if nested else set(NF4_KEYS)
        if missing := needed - tensors.keys():
            raise ValueError(f"{', '.join(sorted(missing))} missing for {self}")
        device = tensors["weight"].device if self.qweight.is_meta else self.qweight.device
        state = bnb.QuantState.from_dict({key: tensors[key] for key in needed - {"weight"}}, device)
        size = self.in_features * self.out_features
        blocks = -(-size // BLOCK)
        found = {
            "shape": tuple(state.shape),
            "type": state.quant_type,
            "block": state.blocksize,
            "bytes": tensors["weight"].numel() * tensors["weight"].element_size(),
            "scales": state.absmax.numel(),
            "nested block": state.state2.blocksize if nested else NESTED_BLOCK,
            "nested scales": state.state2.absmax.numel() if nested else -(-blocks // NESTED_BLOCK),
        }
        ours = ((self.out_features, self.in_features), "nf4", BLOCK, (size + 1) // 2, blocks)
        wanted = dict(zip(found, (*ours, NESTED_BLOCK, -(-blocks // NESTED_BLOCK)), strict=True))
        if found != wanted:
            wrong = [f"{key} {found[key]} instead of {wanted[key]}" for key in found if found[key] != wanted[key]]
            raise ValueError(f"a 4-bit weight was given to {self} that is not its: {', '.join(wrong)}")
        if not torch.equal(state.code, quant_map(device)) or (
            nested and not torch.equal(state.state2.code, nested_quant_map(device))
        ):
            raise ValueError(f"a 4-bit weight with other values than NF4's (quant_map) was given to {self}")
        self.nested = nested
        self.source_dtype = state.dtype
        self.hold("qweight", tensors["weight"].to(device).view(torch.uint8).reshape(-1, 1))
        self.hold("absmax", state.absmax)
        self.hold("nested_absmax", state.state2.absmax if nested else torch.empty(0, device=device))
        self.hold("offset", state.offset.reshape(1) if nested else torch.zeros(1, device=device))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, nf4"
