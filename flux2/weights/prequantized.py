"""Pre-quantized weights: find the tensors of a layer in a file that holds them as floats or already quantized.

    plain   a float tensor
    fp8     `X.weight` in e4m3 or e5m2; its scale, one per tensor or one per row, is `X.weight_scale` or, as ComfyUI
            wrote it, `X.scale_weight`; without one it is 1. `X.input_scale` and `X.scale_input` are for products with
            quantized inputs, whose scales are measured here instead: they are not used.
    nf4     bitsandbytes' keys: `X.weight` with two values per byte, `.absmax`, `.quant_map`, `.nested_absmax`,
            `.nested_quant_map` and, with the shape, `.quant_state.bitsandbytes__nf4`

A weight that has the format of its layer is kept bit for bit. NF4 quantizes blocks of 64 elements in memory order, so
three weights (q, k, v) on top of each other, or the halves of one in another order, are their bytes and block scales in
that order. The block scales are quantized too, in blocks of 256 with an offset per weight: those of several weights
cannot be joined, and are kept in float32. FP8 weights on top of each other with a scale each have one scale per row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor

from flux2.quantization.base import QuantizedLinear
from flux2.quantization.float8 import Float8Linear
from flux2.quantization.nf4 import BLOCK, NESTED_BLOCK, Nf4Linear
from flux2.weights.key_names import PublishedTensor
from flux2.weights.parallel_reader import Piece, TensorRead, read_of
from flux2.weights.safetensors_files import StoredTensor, TensorFiles
from flux2.weights.sources import WeightsError

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALES = ("weight_scale", "scale_weight")
UNUSED = ("input_scale", "scale_input")
MARKER = "scaled_fp8"  # a tensor that marks a file as fp8
STATE = "quant_state.bitsandbytes__nf4"


@dataclass(frozen=True)
class StoredPart:
    """One published tensor."""

    form: Literal["plain", "fp8", "nf4"]
    shape: tuple[int, ...]  # of the weight, whatever the format in the file
    stored: Mapping[str, StoredTensor]  # the tensors to read, by the names that `QuantizedLinear.adopt` knows
    unused: tuple[str, ...] = ()  # names in the file that belong to the weight and are not read

    @property
    def weight(self) -> StoredTensor:
        return self.stored["weight"]

    @property
    def names(self) -> set[str]:
        return {stored.key for stored in self.stored.values()} | set(self.unused)

    @property
    def description(self) -> str:
        """File and key of the weight, for errors."""
        return f"{self.weight.file}: {self.weight.key}"


def find_part(files: TensorFiles, name: str) -> StoredPart | None:
    """Return the published tensor `name` in any format, or None if it is not in the files."""
    if name not in files.names:
        return None
    stored = files[name]
    if f"{name}.absmax" in files.names:
        return find_nf4_part(files, stored)
    if stored.dtype not in FP8:
        return StoredPart("plain", stored.shape, {"weight": stored})
    module = name.removesuffix("weight")
    scale = next((module + leaf for leaf in SCALES if module + leaf in files.names), None)
    tensors = {"weight": stored} | ({"weight_scale": files[scale]} if scale else {})
    unused = tuple(module + leaf for leaf in UNUSED if module + leaf in files.names)
    part = StoredPart("fp8", stored.shape, tensors, unused)
    if scale and prod(files[scale].shape) not in (1, stored.shape[0]):
        raise WeightsError(
            f"{part.description} of shape {stored.shape} has a scale of shape {files[scale].shape}. Give files with "
            "one scale per tensor or per row"
        )
    return part


def find_nf4_part(files: TensorFiles, stored: StoredTensor) -> StoredPart:
    """Return a tensor in 4 bits. Raises WeightsError unless it is NF4 with a shape that can be read."""
    name = stored.key
    state = f"{name}.{STATE}"
    if state not in files.names:
        kinds = [key.rpartition(".")[2] for key in files.names if key.startswith(f"{name}.quant_state.")]
        raise WeightsError(
            f"{stored.file}: {name} is in 4 bits, but not in NF4: {state} is missing, there is "
            f"{kinds[0] if kinds else 'no quant_state'}. Give NF4, FP8 or float weights"
        )
    raw = bytearray(files[state].size)
    files[state].read_into(memoryview(raw))
    try:
        shape = tuple(json.loads(raw)["shape"])
        if not all(isinstance(side, int) for side in shape):
            raise ValueError(f"shape {shape}")
    except (ValueError, KeyError, TypeError) as error:
        raise WeightsError(f"{stored.file}: {state} does not hold the shape of a 4-bit weight ({error!r})") from error
    keys = [key for key in files.names if key == name or key.startswith(f"{name}.")]
    return StoredPart("nf4", shape, {"weight" + key.removeprefix(name): files[key] for key in keys})


@dataclass
class Weight:
    """One of our tensors: its published parts, and how they are joined."""

    entry: PublishedTensor
    parts: tuple[StoredPart, ...]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in the file, of the first part if they differ."""
        return self.parts[0].weight.dtype

    @property
    def is_joined(self) -> bool:
        """Whether it is read as one tensor, its parts one after the other."""
        return all(part.form != "nf4" and part.weight.dtype == self.dtype for part in self.parts)

    @property
    def is_plain(self) -> bool:
        """Whether it is read as one float tensor and needs no conversion."""
        return self.is_joined and self.parts[0].form == "plain"

    @property
    def shape(self) -> torch.Size:
        with torch.device("meta"):
            return self.entry.join([torch.empty(part.shape) for part in self.parts]).shape

    def reads(self, device: torch.device) -> dict[str, TensorRead]:
        """Return what to read: each part's tensors under its index, except weights that are read together."""
        reads = {
            f"{i}.{key}": read_of(stored, device)
            for i, part in enumerate(self.parts)
            for key, stored in part.stored.items()
            if not (self.is_joined and key == "weight")
        }
        if self.is_joined:
            pieces = tuple(Piece(part.weight, 0, part.weight.size) for part in self.parts)
            if self.entry.kind == "swapped":
                weight, half = self.parts[0].weight, self.parts[0].weight.size // 2
                pieces = Piece(weight, half, half), Piece(weight, 0, half)
            reads["weight"] = TensorRead(self.dtype, tuple(self.shape), pieces, device)
        return reads

    def dequantized(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Return the float tensor: a plain one as it was read, any other in `dtype`."""
        if self.is_plain:
            return tensors["weight"]
        if self.is_joined:
            return tensors["weight"].to(dtype).mul_(self.scales(tensors))
        return self.entry.join([self.dequantized_part(i, part, tensors, dtype) for i, part in enumerate(self.parts)])

    def dequantized_part(self, i: int, part: StoredPart, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> Tensor:
        """Return a part that was read by itself, in `dtype`."""
        if part.form == "nf4":
            return self.layer(i, tensors, dtype).dequantize(dtype)
        weight = tensors[f"{i}.weight"].to(dtype)
        scale = tensors.get(f"{i}.weight_scale")
        return weight if scale is None else weight.mul_(scale.float().reshape(-1, *[1] * (weight.ndim - 1)))

    def layer(self, i: int, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Nf4Linear:
        """Return a 4-bit part as a separate layer."""
        rows, columns = self.parts[i].shape
        layer = Nf4Linear(columns, rows, dtype=dtype, device="meta")
        self.adopt(layer, self.part_tensors(i, tensors))
        return layer

    def part_tensors(self, i: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key.removeprefix(f"{i}."): tensor for key, tensor in tensors.items() if key.startswith(f"{i}.")}

    def scales(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the scales of fp8 parts read together, in float32: (1,) if all are equal, otherwise (rows, 1)."""
        device = tensors["weight"].device
        each = [
            tensors.get(f"{i}.weight_scale", torch.ones(1, device=device)).float().reshape(-1, 1)
            for i in range(len(self.parts))
        ]
        if all(scale.numel() == 1 and torch.equal(scale, each[0]) for scale in each):
            return each[0].reshape(1)
        rows = [scale.expand(part.shape[0], 1) for scale, part in zip(each, self.parts, strict=True)]
        return self.entry.join(rows)

    def keep_stored_form(self, layer: QuantizedLinear, tensors: Mapping[str, Tensor]) -> bool:
        """Put the weight into the layer as it is in the file; return False, doing nothing, if its format differs."""
        joined = None
        if isinstance(layer, Nf4Linear) and all(part.form == "nf4" for part in self.parts):
            joined = self.joined_nf4(tensors)
        elif isinstance(layer, Float8Linear) and self.is_joined and self.dtype == torch.float8_e4m3fn:
            joined = {"weight": tensors["weight"], "weight_scale": self.scales(tensors)}
        if joined is not None:
            self.adopt(layer, joined)
        return joined is not None

    def adopt(self, layer: QuantizedLinear, tensors: Mapping[str, Tensor]) -> None:
        try:
            layer.adopt(tensors)
        except (ValueError, KeyError) as error:  # bitsandbytes raises KeyError for missing keys
            raise WeightsError(f"{self.parts[0].description} cannot be read: {error}") from error

    def joined_nf4(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """Return the storage of all parts, or None if quantization blocks run from one part into the next."""
        if self.entry.kind == "same":
            return self.part_tensors(0, tensors)
        halves = 2 if self.entry.kind == "swapped" else 1
        runs = [prod(part.shape) // halves for part in self.parts]  # lengths of contiguous elements
        if any(run % BLOCK for run in runs):
            return None
        first = self.part_tensors(0, tensors)
        if len(runs) == 1 and "weight.nested_absmax" in first and runs[0] % (BLOCK * NESTED_BLOCK) == 0:
            reordered = ("weight", "weight.absmax", "weight.nested_absmax")
            return first | {key: self.entry.join([first[key]]) for key in reordered}
        return self.join_blocks([self.layer(i, tensors) for i in range(len(self.parts))])

    def join_blocks(self, layers: Sequence[Nf4Linear]) -> dict[str, Tensor]:
        """Return the storage, in bitsandbytes' keys, of the parts as layers, with block scales in float32."""
        import bitsandbytes.functional as bnb

        scales = []
        for layer in layers:
            state = layer.state(torch.float32, (layer.out_features, layer.in_features))
            absmax = state.absmax
            if layer.nested:
                absmax = bnb.dequantize_blockwise(absmax, state.state2) + state.offset
            scales.append(absmax.float())
        absmax, dtype = self.entry.join(scales), layers[0].source_dtype
        joined = bnb.QuantState(absmax, self.shape, state.code, BLOCK, quant_type="nf4", dtype=dtype)
        stored = {f"weight.{key}": tensor for key, tensor in joined.as_dict(packed=True).items()}
        return {"weight": self.entry.join([layer.qweight.detach() for layer in layers])} | stored
