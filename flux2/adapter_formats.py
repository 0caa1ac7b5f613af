"""The file formats of low-rank adapters: our layers in the keys of diffusers and of ComfyUI, and back.

Low-rank pairs are kept as

    delta W = scale * B A        A: (rank, in), B: (out, rank), scale = alpha / rank

A LoRA on a fused q, k, v projection is exactly three on the separate ones: the same A, and B cut in thirds. Three
separate ones fuse into one of rank 3r: the A stacked, the B on a block diagonal. The formats without an alpha get the
scale folded into B, each layer its own. Names of layers come from the table in `names`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from flux2.names import listed, swap_halves, transformer_module


class AdapterError(ValueError):
    """An adapter cannot be attached, or its file cannot be read or does not fit the model."""


@dataclass(frozen=True)
class Pair:
    """One layer's low-rank update with the scale folded into `b`: delta W = b @ a.

    With `magnitude` it is a DoRA: W + delta W = (W + b @ a) with each row brought to the length that is given.
    """

    a: Tensor  # (rank, in)
    b: Tensor  # (out, rank)
    magnitude: Tensor | None = None  # (out,)


def to_diffusers(pairs: Mapping[str, Pair]) -> dict[str, Tensor]:
    """Our layers to the keys that diffusers' `load_lora_weights` reads."""
    state = {}
    for layer, pair in pairs.items():
        published = transformer_module(layer)
        for name, b in published.split(pair.b).items():
            state[f"transformer.{name}.lora_A.weight"] = pair.a.clone()
            state[f"transformer.{name}.lora_B.weight"] = b.contiguous()
        if pair.magnitude is not None:  # one a row: cut as B is
            for name, length in published.split(pair.magnitude).items():
                state[f"transformer.{name}.lora_magnitude_vector"] = length.contiguous()
    return state


def to_comfyui(pairs: Mapping[str, Pair]) -> dict[str, Tensor]:
    """Our layers to the keys that ComfyUI reads, which are Black Forest Labs' names. Raises AdapterError for a DoRA."""
    state = {}
    for layer, pair in pairs.items():
        if pair.magnitude is not None:
            raise AdapterError(f"{layer} is of a DoRA, which this form cannot hold")
        state[f"diffusion_model.{layer}.lora_A.weight"] = pair.a
        state[f"diffusion_model.{layer}.lora_B.weight"] = pair.b
    return state


def fuse(parts: Sequence[Pair]) -> Pair:
    """Pairs of separate q, k, v layers to one of the fused layer; the three of a split one come back as it was."""
    if all(torch.equal(part.a, parts[0].a) for part in parts):
        return Pair(parts[0].a, torch.cat([part.b for part in parts]))
    return Pair(torch.cat([part.a for part in parts]), torch.block_diag(*(part.b for part in parts)))


def whole_pair(name: str, a: Tensor, b: Tensor, alpha: Tensor | None) -> Pair:
    """The update of one layer. Raises AdapterError unless the shapes are (rank, in), (out, rank) and one number."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
        raise AdapterError(
            f"{name}: lora_A has shape {tuple(a.shape)} and lora_B {tuple(b.shape)}; (rank, in) and (out, rank) of one "
            "rank were expected"
        )
    if alpha is None:
        return Pair(a, b)
    if alpha.numel() != 1:
        raise AdapterError(f"{name}: alpha has shape {tuple(alpha.shape)}; one number was expected")
    return Pair(a, b * (alpha.item() / a.shape[0]))


def from_state(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Pair]:
    """Read the keys of diffusers or ComfyUI back into our layers.

    Args:
        state: `*.lora_A.weight`, `*.lora_B.weight` and, perhaps, `*.alpha`.
        model: whose layers the keys must name.

    Raises:
        AdapterError: a key is of neither format, a tensor has values that are not finite, a pair is incomplete or of
            two ranks, or a layer is not in the model or not of its shape.
    """
    if not state:
        raise AdapterError("it holds no tensors")
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        if "lora_magnitude_vector" in key:
            raise AdapterError("it is a DoRA in the keys of diffusers: load the PEFT folder that it was saved in")
        match = re.fullmatch(r"(?:transformer\.|diffusion_model\.)?(.+?)\.(lora_A|lora_B|alpha)(?:\.weight)?", key)
        if not match:
            raise AdapterError(f"{key!r} is not a LoRA key of diffusers or ComfyUI")
        if not bool(torch.isfinite(tensor.float()).all()):
            raise AdapterError(f"{key} has NaN or infinite values: the training that made it failed")
        halves.setdefault(match[1], {})[match[2]] = tensor.float()

    def pair(name: str) -> Pair:
        half = halves.pop(name)
        if not {"lora_A", "lora_B"} <= half.keys():
            raise AdapterError(f"{name} has only {' and '.join(half)}: the file is incomplete")
        return whole_pair(name, half["lora_A"], half["lora_B"], half.get("alpha"))

    pairs = {}
    for layer, module in model.named_modules():
        if not isinstance(module, nn.Linear | LoraLayer) or ".lora_" in layer:
            continue
        rows, columns = module.out_features, module.in_features
        published = transformer_module(layer.removesuffix(".base_layer"))
        if layer in halves:
            found = pair(layer)
        elif any(name in halves for name in published.names):
            part_rows = rows // len(published.names)
            nothing = Pair(torch.zeros(0, columns), torch.zeros(part_rows, 0))
            parts = [pair(name) if name in halves else nothing for name in published.names]
            for name, part in zip(published.names, parts, strict=True):
                check_features(name, part, columns, part_rows)
            found = fuse(parts)
            if published.kind == "swapped":
                found = Pair(found.a, swap_halves(found.b))
        else:
            continue
        check_features(layer, found, columns, rows)
        pairs[layer] = found
    if halves:
        raise AdapterError(f"the adapter has layers that this model does not: {listed(halves)}")
    return pairs


def check_features(name: str, pair: Pair, columns: int, rows: int) -> None:
    """Raises AdapterError unless `pair` is for a layer of `columns` to `rows` features."""
    if pair.a.shape[1] != columns or pair.b.shape[0] != rows:
        raise AdapterError(
            f"{name}: the adapter is for a layer of {pair.a.shape[1]} to {pair.b.shape[0]} features, the "
            f"model's has {columns} to {rows}. It was trained on another model."
        )
