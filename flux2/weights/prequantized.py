"""Pre-quantized weights: find the tensors of a layer in a file that holds them as floats or already quantized.

    plain   a float tensor
    fp8     `X.weight` in e4m3 or e5m2; its scale, one per tensor, row or block, is `X.weight_scale`,
            `X.weight_scale_inv` (a factor too, despite its name) or, as ComfyUI wrote it, `X.scale_weight`; without one
            it is 1. `INPUT_SCALES` are for products with quantized inputs, whose scales are measured here instead: they
            are not used.
            `X.comfy_quant` is JSON that names the format.
    nf4     bitsandbytes' keys: `X.weight` with two values per byte, `.absmax`, `.quant_map`, `.nested_absmax`,
            `.nested_quant_map` and, with the shape, `.quant_state.bitsandbytes__nf4`

A weight that has the format of its layer is kept bit for bit. NF4 quantizes blocks of 64 elements in memory order, so
three weights (q, k, v) on top of each other, or the halves of one in another order, are their bytes and block scales in
that order. The block scales are quantized too, in blocks of 256 with an offset per weight: those of several weights
cannot be joined, and are kept in float32. FP8 weights on top of each other with a scale each have one scale per row;
those with a scale per block are dequantized. Other formats are refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from math import ceil, prod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from flux2.quantization.base import QuantizedLinear
from flux2.quantization.eight_bit import check_scale
from flux2.quantization.float8 import Float8Linear
from flux2.quantization.nf4 import BLOCK, NESTED_BLOCK, Nf4Linear
from flux2.utils.json_files import parse_json
from flux2.utils.text import listed
from flux2.weights.key_names import PublishedTensor
from flux2.weights.parallel_reader import Piece, TensorRead, read_of
from flux2.weights.safetensors_files import ADVICE, StoredTensor, TensorFiles
from flux2.weights.sources import WeightsError

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALES = ("weight_scale", "scale_weight", "weight_scale_inv")
INPUT_SCALES = ("input_scale", "scale_input", "activation_scale", "input_scale_ub")
MARKER = "scaled_fp8"  # a tensor that marks a file as fp8
COMFY = "comfy_quant"  # a tensor next to a weight: JSON that names its format
COMFY_METADATA = "_quantization_metadata"  # an entry of the header: the same for all layers
COMFY_FORMATS = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
COMFY_KEYS = {"format", "full_precision_matrix_mult", "orig_dtype", "orig_shape"}  # others change what a weight means
COMFY_LIMIT = 4096  # bytes
SCALE_BLOCK = 128  # rows and columns that share an FP8 scale, unless config.json says otherwise
USUAL_BLOCKS = (32, 64, 128, 256)  # sides of blocks that (1, rows) scales may stand for
STATE = "quant_state.bitsandbytes__nf4"
# last parts of names that only these formats have
FOREIGN = {
    "weight_scale_2": "NVFP4",
    "weight_global_scale": "NVFP4",
    "weight_packed": "a packed format of compressed-tensors",
    "qweight": "GPTQ, AWQ or SVDQuant",
    "SCB": "the 8-bit format of bitsandbytes",
}


@dataclass(frozen=True)
class StoredPart:
    """One published tensor."""

    form: Literal["plain", "fp8", "nf4"]
    shape: tuple[int, ...]  # of the weight, whatever the format in the file
    stored: Mapping[str, StoredTensor]  # the tensors to read, by the names that `QuantizedLinear.adopt` knows
    unused: tuple[str, ...] = ()  # names in the file that belong to the weight and are not read
    block: tuple[int, int] | None = None  # rows and columns that share a scale, if they are neither a tensor nor a row
    marker: tuple[str, ...] = ()  # the name of `COMFY`, if it is in the file

    @property
    def weight(self) -> StoredTensor:
        return self.stored["weight"]

    @property
    def names(self) -> set[str]:
        return {stored.key for stored in self.stored.values()} | {*self.unused, *self.marker}

    @property
    def description(self) -> str:
        """File and key of the weight, for errors."""
        return f"{self.weight.file}: {self.weight.key}"


def check_formats(files: TensorFiles) -> None:
    """Raise WeightsError, with the name of the format, if the files hold weights in one that is not read."""
    for name in sorted(files.names):
        if kind := FOREIGN.get(name.rpartition(".")[2]):
            raise WeightsError(f"{files[name].file}: {name} belongs to a weight in {kind}, which is not read. {ADVICE}")
    if (text := files.metadata.get(COMFY_METADATA)) is not None:
        layers = parse_table(text, files.place, COMFY_METADATA).get("layers")
        if not isinstance(layers, dict):
            raise WeightsError(f"{files.place}: {COMFY_METADATA} has no layers: the file is damaged. {ADVICE}")
        for layer, entry in layers.items():
            check_comfy_format(entry, f"{files.place}: {layer}")


def parse_table(text: str | bytes, file: Path, what: str) -> dict[str, Any]:
    """Return the table in a file's JSON. Raises WeightsError that names `what`."""
    try:
        table = parse_json(text)
    except ValueError as error:
        raise WeightsError(f"{file}: {what} is not JSON: the file is damaged. {ADVICE}") from error
    if not isinstance(table, dict):
        raise WeightsError(f"{file}: {what} is not a JSON table: the file is damaged. {ADVICE}")
    return table


def check_comfy_format(entry: Any, weight: str) -> torch.dtype:
    """Return the dtype of a weight that ComfyUI describes by `entry`. Raises WeightsError if it is not plain FP8."""
    kind = entry.get("format") if isinstance(entry, dict) else None
    if not isinstance(kind, str) or kind not in COMFY_FORMATS:
        raise WeightsError(f"{weight} is stored in {str(kind)[:80]}, which is not read. {ADVICE}")
    if unknown := sorted(entry.keys() - COMFY_KEYS):
        raise WeightsError(f"{weight} is stored in {kind} with {listed(unknown)}, which is not read. {ADVICE}")
    return COMFY_FORMATS[kind]


def find_part(files: TensorFiles, name: str) -> StoredPart | None:
    """Return the published tensor `name` in any format, or None if it is not in the files."""
    if name not in files.names:
        return None
    stored, module = files[name], name.removesuffix("weight")
    if f"{name}.absmax" in files.names:
        return find_nf4_part(files, stored)
    marker: tuple[str, ...] = ()
    if name.endswith("weight") and (key := module + COMFY) in files.names:
        raw, marker = bytearray(min(files[key].size, COMFY_LIMIT)), (key,)
        files[key].read_into(memoryview(raw))
        if check_comfy_format(parse_table(bytes(raw), files[key].file, key), f"{stored.file}: {name}") != stored.dtype:
            raise WeightsError(f"{stored.file}: {name} has dtype {stored.dtype}, but {key} says otherwise. {ADVICE}")
    if stored.dtype not in FP8:
        return StoredPart("plain", stored.shape, {"weight": stored})
    scale = next((module + leaf for leaf in SCALES if module + leaf in files.names), None)
    tensors = {"weight": stored} | ({"weight_scale": files[scale]} if scale else {})
    unused = tuple(module + leaf for leaf in INPUT_SCALES if module + leaf in files.names)
    block = scale_block(stored, files[scale]) if scale else None
    return StoredPart("fp8", stored.shape, tensors, unused, block, marker)


def scale_block(weight: StoredTensor, scale: StoredTensor) -> tuple[int, int] | None:
    """Return how many rows and columns share a scale; None if there is one per tensor or per row.

    Blocks at the end may be smaller. A shape (1, rows) is one per row unless it may mean something else, too.

    Raises WeightsError if the scales do not fit the weight, or fit it in two ways.
    """
    what = f"{weight.file}: {weight.key} of shape {weight.shape} has a scale"
    if not scale.dtype.is_floating_point or scale.dtype in FP8:
        raise WeightsError(f"{what} of dtype {scale.dtype}, as in MXFP8, which is not read. {ADVICE}")
    if prod(scale.shape) == 1 or scale.shape[:1] == weight.shape[:1] == (prod(scale.shape),):
        return None
    if len(scale.shape) == len(weight.shape) == 2:
        given = configured_block(weight)
        if given is None and scale.shape == (1, weight.shape[0]):
            sizes = product(USUAL_BLOCKS, USUAL_BLOCKS)
            if weight.shape[0] != weight.shape[1] and all(block_counts(weight, size) != scale.shape for size in sizes):
                return None
            raise WeightsError(
                f"{what} of shape {scale.shape}, which may be one per row, per column or per block. Give one of shape "
                f"{(weight.shape[0], 1)} for rows, or a config.json next to the file with weight_block_size"
            )
        for block in guessed_blocks(weight, scale) if given is None else [given]:
            if block_counts(weight, block) == scale.shape:
                return block
    raise WeightsError(
        f"{what} of shape {scale.shape}. Give files with one scale per tensor, per row or per block, and the "
        "config.json that has its size"
    )


def block_counts(weight: StoredTensor, block: tuple[int, int]) -> tuple[int, ...]:
    """Return how many blocks of this size a matrix has in each direction."""
    return tuple(ceil(side / n) for side, n in zip(weight.shape, block, strict=True))


def configured_block(weight: StoredTensor) -> tuple[int, int] | None:
    """Return the size of blocks in config.json next to the file; None if there is none."""
    config = weight.file.parent / "config.json"
    if config.is_file():
        described = parse_table(config.read_bytes(), config, "it").get("quantization_config") or {}
        size = described.get("weight_block_size") if isinstance(described, dict) else None
        if isinstance(size, list) and len(size) == 2 and all(isinstance(side, int) and side > 0 for side in size):
            return size[0], size[1]
    return None


def guessed_blocks(weight: StoredTensor, scale: StoredTensor) -> list[tuple[int, int]]:
    """Return the sizes of blocks to try: the usual one and an exact one."""
    exact = [side // count for side, count in zip(weight.shape, scale.shape, strict=True) if count and not side % count]
    return [(SCALE_BLOCK, SCALE_BLOCK), *([(exact[0], exact[1])] if len(exact) == 2 else [])]


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
        shape = tuple(parse_json(bytes(raw))["shape"])
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
        return all(part.form != "nf4" and part.block is None and part.weight.dtype == self.dtype for part in self.parts)

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
        scale = self.scale(i, tensors)
        weight = tensors[f"{i}.weight"].to(dtype)
        return weight if scale is None else weight.mul_(scale)

    def layer(self, i: int, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Nf4Linear:
        """Return a 4-bit part as a separate layer."""
        rows, columns = self.parts[i].shape
        layer = Nf4Linear(columns, rows, dtype=dtype, device="meta")
        self.adopt(layer, self.part_tensors(i, tensors), self.parts[i])
        return layer

    def part_tensors(self, i: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key.removeprefix(f"{i}."): tensor for key, tensor in tensors.items() if key.startswith(f"{i}.")}

    def scale(self, i: int, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """Return the scales of an fp8 part in float32, in a shape that multiplies it; None if it has none.

        Raises WeightsError unless they are usable.
        """
        if (scale := tensors.get(f"{i}.weight_scale")) is None:
            return None
        part = self.parts[i]
        values = list(self.entry.split(tensors["weight"]).values())[i] if self.is_joined else tensors[f"{i}.weight"]
        scale = scale.float()
        if part.block is None:
            scale = scale.reshape(-1, *[1] * (len(part.shape) - 1))
        else:
            for dim, (size, side) in enumerate(zip(part.block, part.shape, strict=True)):
                scale = scale.repeat_interleave(size, dim)[(slice(None),) * dim + (slice(side),)]
        try:
            check_scale(scale, values)
        except ValueError as error:
            raise WeightsError(f"{part.description} cannot be read: {error}. {ADVICE}") from error
        return scale

    def scales(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the scales of fp8 parts read together, in float32: (1,) if all are equal, otherwise (rows, 1)."""
        device = tensors["weight"].device
        found = [self.scale(i, tensors) for i in range(len(self.parts))]
        each = [(torch.ones(1, device=device) if scale is None else scale).reshape(-1, 1) for scale in found]
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
            self.adopt(layer, joined, self.parts[0])
        return joined is not None

    def adopt(self, layer: QuantizedLinear, tensors: Mapping[str, Tensor], part: StoredPart) -> None:
        """Put a quantized weight into the layer. Raises WeightsError that names `part` if it does not fit."""
        try:
            layer.adopt(tensors)
        except (ValueError, KeyError) as error:  # bitsandbytes raises KeyError for missing keys
            raise WeightsError(f"{part.description} cannot be read: {error}. {ADVICE}") from error

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
