"""Frozen linear layers in NF4: 4-bit NormalFloat in blocks of 64, the blocks' scales quantized too.

QLoRA's format (arxiv.org/abs/2305.14314), by bitsandbytes and as bitsandbytes stores it. The weight is dequantized for
each product, on a GPU into a buffer that all layers of a model share.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux2.quantization.base import QuantizedLinear

if TYPE_CHECKING:  # bitsandbytes takes a second to import: each function that needs it imports it
    import bitsandbytes.functional as bnb

BLOCK = 64  # elements with one scale
PART = 1 << 18  # elements quantized at once: on a CPU bitsandbytes holds 16 distances to each, twice, in float32
NESTED_BLOCK = 256  # scales with one scale
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that bitsandbytes quantizes from and to
NF4_KEYS = ("weight", "weight.absmax", "weight.quant_map", "weight.quant_state.bitsandbytes__nf4")
NESTED_KEYS = ("weight.nested_absmax", "weight.nested_quant_map")


@lru_cache
def quant_map(device: torch.device) -> Tensor:
    """The sixteen values of NF4."""
    import bitsandbytes.functional as bnb

    return bnb.get_4bit_type("nf4", device=device)


@lru_cache
def nested_quant_map(device: torch.device) -> Tensor:
    """The 256 values that scales are rounded to."""
    import bitsandbytes.functional as bnb

    return bnb.create_dynamic_map().to(device)


def quant_state(
    absmax: Tensor, nested_absmax: Tensor | None, offset: Tensor, dtype: torch.dtype, shape: tuple[int, ...]
) -> bnb.QuantState:
    """bitsandbytes' description of a weight to be dequantized to `dtype` and `shape`; scales as bytes."""
    import bitsandbytes.functional as bnb

    nested = None
    if nested_absmax is not None:
        nested = bnb.QuantState(
            nested_absmax.view(torch.float32),
            code=nested_quant_map(absmax.device),
            blocksize=NESTED_BLOCK,
            dtype=torch.float32,
        )
    return bnb.QuantState(
        absmax if nested else absmax.view(torch.float32),
        shape=torch.Size(shape),
        code=quant_map(absmax.device),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=dtype,
        offset=offset.view(torch.float32)[0] if nested else None,
        state2=nested,
    )


def unpack(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    offset: Tensor,
    rows: int,
    columns: int,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """The weight (rows, columns), in `out` (as many elements of `dtype`) if it is given."""
    import bitsandbytes.functional as bnb

    size = rows * columns
    # Blocks run through the whole weight. The CPU kernel starts anew at every row, so each row is made one block.
    shape = (size // BLOCK, BLOCK) if size % BLOCK == 0 else (1, size)
    exact = dtype if dtype in KERNEL_DTYPES else torch.float32
    into = None if out is None else out.view(shape)
    weight = bnb.dequantize_4bit(packed, quant_state(absmax, nested_absmax, offset, exact, shape), out=into)
    return weight.view(rows, columns).to(dtype)


@torch.library.custom_op(
    "flux2::nf4_unpack",
    mutates_args=(),
    schema="(Tensor packed, Tensor absmax, Tensor? nested, Tensor offset, int rows, int columns, ScalarType dtype)"
    " -> Tensor",
)
def unpacked(
    packed: Tensor,
    absmax: Tensor,
    nested: Tensor | None,
    offset: Tensor,
    rows: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """`unpack` as one operation, which `torch.compile` does not look into."""
    return unpack(packed, absmax, nested, offset, rows, columns, dtype)


@unpacked.register_fake
def _(
    packed: Tensor,
    absmax: Tensor,
    nested: Tensor | None,
    offset: Tensor,
    rows: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    return packed.new_empty(rows, columns, dtype=dtype)


class Workspace:
    """One buffer that all NF4 layers of a model dequantize into on a GPU, as large as the largest of them.

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


class Nf4Linear(QuantizedLinear):
    """Stored in four bits and 0.127 more for the scales, as bitsandbytes stores it.

    Attributes:
        nested: whether the scales of the blocks are quantized too; so it is but for an adopted weight without.
        workspace: what the weight is dequantized into for the products; shared by the layers of a model.
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
        """bitsandbytes' description of the storage, to be dequantized to `dtype` and `shape`."""
        return quant_state(self.absmax, self.nested_absmax if self.nested else None, self.offset, dtype, shape)

    def dequantize(self, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """The weight (out, in), in `out` (out * in elements of `dtype`) if it is given."""
        nested = self.nested_absmax if self.nested else None
        sizes = (self.out_features, self.in_features)
        if self.qweight.is_meta:  # which bitsandbytes does not know
            return torch.empty(sizes, dtype=dtype, device="meta")
        if torch.compiler.is_compiling():
            return unpacked(self.qweight, self.absmax, nested, self.offset, *sizes, dtype)
        return unpack(self.qweight, self.absmax, nested, self.offset, *sizes, dtype, out)

    def shared(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) for one product: in the workspace where that can be."""
        device = self.qweight.device
        if device.type not in self.out_devices or dtype == torch.float64 or torch.compiler.is_compiling():
            return self.dequantize(dtype)
        return self.dequantize(dtype, self.workspace.take(self.in_features * self.out_features, dtype, device))

    def product(self, x: Tensor) -> Tensor:
        y = F.linear(x.reshape(-1, self.in_features), self.shared(x.dtype))
        return y.view(*x.shape[:-1], self.out_features)

    def input_gradient(self, dy: Tensor) -> Tensor:
        dx = dy.reshape(-1, self.out_features) @ self.shared(dy.dtype)
        return dx.view(*dy.shape[:-1], self.in_features)

    def store(self, weight: Tensor) -> None:
        import bitsandbytes.functional as bnb

        weight = self.place(weight)
        if weight.dtype not in KERNEL_DTYPES:
            weight = weight.float()
        packed = torch.empty(((weight.numel() + 1) // 2, 1), dtype=torch.uint8, device=weight.device)
        scales = []
        for part, into in zip(weight.reshape(-1).split(PART), packed.split(PART // 2), strict=True):
            _, state = bnb.quantize_4bit(part, blocksize=BLOCK, quant_type="nf4", out=into)
            scales.append(state.absmax)
        absmax = torch.cat(scales)
        if not bool(torch.isfinite(absmax).all()):
            raise ValueError("the weight has values that are not finite")
        offset = absmax.mean()  # the scales are quantized as bitsandbytes does when it sees the whole weight
        codes, nested = bnb.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK)
        self.nested = True
        self.source_dtype = weight.dtype
        self.hold("qweight", packed)
        self.hold("absmax", codes)
        self.hold("nested_absmax", nested.absmax)
        self.hold("offset", offset.reshape(1))

    def storage(self) -> dict[str, Tensor]:
        """In bitsandbytes' keys, as its `Linear4bit` saves it."""
        state = self.state(self.source_dtype, (self.out_features, self.in_features)).as_dict(packed=True)
        return {"weight": self.qweight.detach()} | {f"weight.{key}": tensor for key, tensor in state.items()}

    def adopt(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes bitsandbytes' keys, with scales quantized or not."""
        import bitsandbytes.functional as bnb

        nested = any(key in tensors for key in NESTED_KEYS)
        needed = {*NF4_KEYS, *NESTED_KEYS} if nested else set(NF4_KEYS)
        if missing := needed - tensors.keys():
            raise ValueError(f"{', '.join(sorted(missing))} missing for {self}")
        scales = {"weight.absmax": torch.uint8 if nested else torch.float32, "weight.quant_map": torch.float32}
        scales |= dict.fromkeys(NESTED_KEYS, torch.float32) if nested else {}
        if wrong := [key for key, dtype in scales.items() if tensors[key].dtype != dtype]:
            key = wrong[0]
            raise ValueError(f"{key} is in {tensors[key].dtype} instead of {scales[key]}")
        device = tensors["weight"].device if self.qweight.is_meta else self.qweight.device
        try:
            state = bnb.QuantState.from_dict({key: tensors[key] for key in needed - {"weight"}}, device)
        except (AttributeError, TypeError) as error:  # dtypes by name, and shapes, of which it checks nothing
            raise ValueError(f"its quant_state cannot be used ({error})") from error
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
        known = [state.state2.absmax, state.offset] if nested else [state.absmax]
        if not all(bool(torch.isfinite(one).all()) for one in known):
            raise ValueError("a scale of a 4-bit weight is not finite")
        self.nested = nested
        self.source_dtype = state.dtype
        self.hold("qweight", tensors["weight"].to(device).view(torch.uint8).reshape(-1, 1))
        self.hold("absmax", state.absmax)
        self.hold("nested_absmax", state.state2.absmax if nested else torch.empty(0, device=device))
        self.hold("offset", state.offset.reshape(1) if nested else torch.zeros(1, device=device))

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, nf4"
