"""Tensors of ours as files hold them: as floats, or quantized already.

    plain   a float tensor
    fp8     `X.weight` in e4m3 or e5m2; its scale, one a tensor or one a row, is `X.weight_scale` or, as ComfyUI wrote
            it, `X.scale_weight`; without, it is 1. `X.input_scale` and `X.scale_input` are for products with quantized
            inputs, whose scales are measured here instead: they are not used.
    nf4     bitsandbytes' keys: `X.weight` with two values a byte, `.absmax`, `.quant_map`, `.nested_absmax`,
            `.nested_quant_map` and, with the shape, `.quant_state.bitsandbytes__nf4`

What is in the form of the layer that it is for is taken over bit for bit. NF4 quantizes blocks of 64 elements in the
order of memory, so that three weights (q, k, v) on top of each other, or the halves of one in another order, are their
bytes and block scales in that order. But the scales are quantized again, in blocks of 256 with an offset a weight:
those of several weights do not join, and are kept in float32 then. FP8 weights on top of each other with a scale each
have one scale a row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Literal

import torch
from torch import Tensor

from flux2.quantization.base import QuantizedLinear
from flux2.quantization.float8 import Float8Linear
from flux2.quantization.nf4 import BLOCK, NESTED_BLOCK, Nf4Linear
from flux2.weights.key_names import Published
from flux2.weights.parallel_reader import Piece, Read, whole
from flux2.weights.safetensors_files import Stored, TensorFiles
from flux2.weights.sources import WeightsError

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALES = ("weight_scale", "scale_weight")
UNUSED = ("input_scale", "scale_input")
MARKER = "scaled_fp8"  # a tensor that tells that a file is in fp8
STATE = "quant_state.bitsandbytes__nf4"


@dataclass(frozen=True)
class Part:
    """One published tensor.

    Attributes:
        shape: of the weight that is meant, whatever the form.
        stored: what is read, by the names that `QuantizedLinear.adopt` knows.
        unused: names in the file that belong to it and are not read.
    """

    form: Literal["plain", "fp8", "nf4"]
    shape: tuple[int, ...]
    stored: Mapping[str, Stored]
    unused: tuple[str, ...] = ()

    @property
    def names(self) -> set[str]:
        return {stored.key for stored in self.stored.values()} | set(self.unused)

    @property
    def said(self) -> str:
        """What it is, for errors."""
        weight = self.stored["weight"]
        return f"{weight.file}: {weight.key}"


def find_part(files: TensorFiles, name: str) -> Part | None:
    """The published tensor `name` in whatever form, or None if it is not there."""
    if name not in files.names:
        return None
    stored = files[name]
    if f"{name}.absmax" in files.names:
        return four_bit_part(files, stored)
    if stored.dtype not in FP8:
        return Part("plain", stored.shape, {"weight": stored})
    module = name.removesuffix("weight")
    scale = next((module + leaf for leaf in SCALES if module + leaf in files.names), None)
    tensors = {"weight": stored} | ({"weight_scale": files[scale]} if scale else {})
    part = Part("fp8", stored.shape, tensors, tuple(module + leaf for leaf in UNUSED if module + leaf in files.names))
    if scale and prod(files[scale].shape) not in (1, stored.shape[0]):
        raise WeightsError(
            f"{part.said} of shape {stored.shape} has a scale of shape {files[scale].shape}; one, or one a row, is read"
        )
    return part


def four_bit_part(files: TensorFiles, stored: Stored) -> Part:
    name = stored.key
    state = f"{name}.{STATE}"
    if state not in files.names:
        kinds = [key.rpartition(".")[2] for key in files.names if key.startswith(f"{name}.quant_state.")]
        raise WeightsError(
            f"{stored.file}: {name} is in 4 bits, and of these only NF4 is read, with {state}; there is "
            f"{kinds[0] if kinds else 'no quant_state'}"
        )
    try:
        shape = tuple(json.loads(bytes(files.small(state).tolist()))["shape"])
        if not all(isinstance(side, int) for side in shape):
            raise ValueError(f"shape {shape}")
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{stored.file}: {state} does not tell the shape of a 4-bit weight ({error!r})") from error
    keys = [key for key in files.names if key == name or key.startswith(f"{name}.")]
    return Part("nf4", shape, {"weight" + key.removeprefix(name): files[key] for key in keys})


@dataclass
class Weight:
    """One tensor of ours: published parts, and how they are joined."""

    entry: Published
    parts: tuple[Part, ...]
    together: bool = field(init=False)  # read as one tensor, its parts one after the other

    def __post_init__(self) -> None:
        dtypes = {part.stored["weight"].dtype for part in self.parts}
        self.together = len(dtypes) == 1 and all(part.form != "nf4" for part in self.parts)

    @property
    def plain(self) -> bool:
        """Whether it is read as one float tensor and needs nothing more."""
        return self.together and self.parts[0].form == "plain"

    @property
    def shape(self) -> torch.Size:
        with torch.device("meta"):
            return self.entry.join([torch.empty(part.shape) for part in self.parts]).shape

    def reads(self, device: torch.device) -> dict[str, Read]:
        """What is to be read of it: each part's tensors under its index, but for weights that are read together."""
        reads = {
            f"{i}.{key}": whole(stored, device)
            for i, part in enumerate(self.parts)
            for key, stored in part.stored.items()
            if not (self.together and key == "weight")
        }
        if self.together:
            dtype = self.parts[0].stored["weight"].dtype
            reads["weight"] = Read(dtype, tuple(self.shape), self.pieces(), device)
        return reads

    def pieces(self) -> tuple[Piece, ...]:
        """The bytes of the weights, in our order."""
        stored = [part.stored["weight"] for part in self.parts]
        if self.entry.kind != "swapped":
            return tuple(Piece(one, 0, one.size) for one in stored)
        half = stored[0].size // 2
        return Piece(stored[0], half, half), Piece(stored[0], 0, half)

    def dequantized(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """The float tensor; of a plain one as it was read, otherwise in `dtype`."""
        if self.plain:
            return tensors["weight"]
        if self.together:
            return tensors["weight"].to(dtype).mul_(self.scales(tensors))
        return self.entry.join([self.dequantized_part(i, part, tensors, dtype) for i, part in enumerate(self.parts)])

    def dequantized_part(self, i: int, part: Part, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """One part that was read by itself."""
        if part.form == "nf4":
            return self.layer(i, tensors, dtype).dequantize(dtype)
        weight = tensors[f"{i}.weight"].to(dtype)
        scale = tensors.get(f"{i}.weight_scale")
        return weight if scale is None else weight.mul_(scale.float().reshape(-1, *[1] * (weight.ndim - 1)))

    def layer(self, i: int, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Nf4Linear:
        """A 4-bit part as a layer of its own."""
        rows, columns = self.parts[i].shape
        layer = Nf4Linear(columns, rows, dtype=dtype, device="meta")
        self.adopt(layer, self.of_part(i, tensors))
        return layer

    def of_part(self, i: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key.removeprefix(f"{i}."): tensor for key, tensor in tensors.items() if key.startswith(f"{i}.")}

    def scales(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Of fp8 parts read together: (1,) if one is that of all, otherwise (rows, 1); float32."""
        device = tensors["weight"].device
        each = [
            tensors.get(f"{i}.weight_scale", torch.ones(1, device=device)).float().reshape(-1, 1)
            for i in range(len(self.parts))
        ]
        if all(scale.numel() == 1 and torch.equal(scale, each[0]) for scale in each):
            return each[0].reshape(1)
        rows = [scale.expand(part.shape[0], 1) for scale, part in zip(each, self.parts, strict=True)]
        return self.entry.join(rows)

    def taken_over_by(self, layer: QuantizedLinear, tensors: Mapping[str, Tensor]) -> bool:
        """Give the layer its weight as it is in the file, if that is in the layer's form."""
        forms = {part.form for part in self.parts}
        if isinstance(layer, Nf4Linear) and forms == {"nf4"}:
            joined = self.joined_nf4(tensors)
        elif isinstance(layer, Float8Linear) and self.together and tensors["weight"].dtype == torch.float8_e4m3fn:
            joined = {"weight": tensors["weight"], "weight_scale": self.scales(tensors)}
        else:
            joined = None
        if joined is None:
            return False
        self.adopt(layer, joined)
        return True

    def adopt(self, layer: QuantizedLinear, tensors: Mapping[str, Tensor]) -> None:
        try:
            layer.adopt(tensors)
        except (ValueError, KeyError) as error:  # bitsandbytes' own about its keys
            raise WeightsError(f"{self.parts[0].said} cannot be read: {error}") from error

    def joined_nf4(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """The storage of the whole, or None where blocks run from one part into the next."""
        if self.entry.kind == "same":
            return self.of_part(0, tensors)
        halves = 2 if self.entry.kind == "swapped" else 1
        runs = [prod(part.shape) // halves for part in self.parts]  # elements that stay next to each other
        if any(run % BLOCK for run in runs):
            return None
        first = self.of_part(0, tensors)
        if len(runs) == 1 and "weight.nested_absmax" in first and runs[0] % (BLOCK * NESTED_BLOCK) == 0:
            reordered = ("weight", "weight.absmax", "weight.nested_absmax")
            return first | {key: self.entry.join([first[key]]) for key in reordered}
        layers = [self.layer(i, tensors) for i in range(len(self.parts))]
        return join_blocks(self.entry, layers, tuple(self.shape))


def join_blocks(entry: Published, layers: Sequence[Nf4Linear], shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Storage, in bitsandbytes' keys, of layers on top of each other or in halves, with block scales in float32."""
    import bitsandbytes.functional as bnb

    scales = []
    for layer in layers:
        state = layer.state(torch.float32, (layer.out_features, layer.in_features))
        nested = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset if layer.nested else state.absmax
        scales.append(nested.float())
    state = bnb.QuantState(
        entry.join(scales),
        shape=torch.Size(shape),
        code=state.code,
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=layers[0].source_dtype,
    )
    stored = {f"weight.{key}": tensor for key, tensor in state.as_dict(packed=True).items()}
    return {"weight": entry.join([layer.qweight.detach() for layer in layers])} | stored
