"""Low-rank pairs, and the keys under which diffusers, ComfyUI and kohya's scripts read them.

A low-rank pair is

    delta W = scale * B A        A: (rank, in), B: (out, rank), scale = alpha / rank

A LoRA on a fused q, k, v projection equals three on the separate ones: the same A, and B cut in thirds. The scale of
each layer is folded into B; kohya's alpha is then the rank. flux2/weights/key_names.py has the names of layers;
`reading` reads files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flux2.weights.key_names import transformer_module

KOHYA = "lora_unet_"  # prefix of kohya's keys


class AdapterError(ValueError):
    """An adapter cannot be attached, or its file cannot be read or does not fit the model."""


@dataclass(frozen=True)
class LoraPair:
    """One layer's low-rank update with the scale folded into `b` and `bias`: delta W = b @ a.

    With `magnitude` it is a DoRA: `rescale(W + b @ a, magnitude)`.
    """

    a: Tensor  # (rank, in)
    b: Tensor  # (out, rank)
    magnitude: Tensor | None = None  # (out,): lengths of rows; (parts, in): of columns, see `rescale`
    bias: Tensor | None = None  # (out,): added to the layer's output, which no other program but diffusers can


def rescale(weight: Tensor, magnitude: Tensor) -> Tensor:
    """Return `weight` (out, in) with its rows, or the columns of each of its parts, scaled to the given lengths.

    Rows are PEFT's DoRA; columns are what OneTrainer and LyCORIS train by default, in each of q, k and v separately.
    """
    if magnitude.ndim == 1:
        return weight * (magnitude / torch.linalg.vector_norm(weight, dim=1))[:, None]
    parts = weight.view(len(magnitude), -1, weight.shape[1])
    return (parts * (magnitude / torch.linalg.vector_norm(parts, dim=1))[:, None]).view_as(weight)


def to_diffusers(pairs: Mapping[str, LoraPair]) -> dict[str, Tensor]:
    """Return the tensors by the keys that diffusers' `load_lora_weights` reads.

    Raises AdapterError for a bias, and for a DoRA of columns, which diffusers does not have.
    """
    state = {}
    for layer, pair in pairs.items():
        if pair.bias is not None or (pair.magnitude is not None and pair.magnitude.ndim > 1):
            raise AdapterError(f"{layer} has {'a DoRA of columns' if pair.bias is None else 'a bias'}: not written")
        published = transformer_module(layer)
        for name, b in published.split(pair.b).items():
            state[f"transformer.{name}.lora_A.weight"] = pair.a.clone()
            state[f"transformer.{name}.lora_B.weight"] = b.contiguous()
        if pair.magnitude is not None:  # one per row: split like B
            for name, length in published.split(pair.magnitude).items():
                state[f"transformer.{name}.lora_magnitude_vector"] = length.contiguous()
    return state


def to_comfyui(pairs: Mapping[str, LoraPair]) -> dict[str, Tensor]:
    """Return the tensors by the keys that ComfyUI reads, Black Forest Labs' names. Raises AdapterError for a DoRA."""
    state = {}
    for layer, pair in pairs.items():
        check_plain(layer, pair)
        state[f"diffusion_model.{layer}.lora_A.weight"] = pair.a
        state[f"diffusion_model.{layer}.lora_B.weight"] = pair.b
    return state


def to_kohya(pairs: Mapping[str, LoraPair]) -> dict[str, Tensor]:
    """Return the tensors by the keys of kohya's scripts, with alpha = rank. Raises AdapterError for a DoRA."""
    state = {}
    for layer, pair in pairs.items():
        check_plain(layer, pair)
        name = KOHYA + layer.replace(".", "_")
        state[f"{name}.lora_down.weight"] = pair.a
        state[f"{name}.lora_up.weight"] = pair.b
        state[f"{name}.alpha"] = torch.tensor(float(pair.a.shape[0]))
    return state


def check_plain(layer: str, pair: LoraPair) -> None:
    """Raise AdapterError for a DoRA and a bias. ComfyUI divides by the row lengths of W, PEFT by those of W + B A."""
    if pair.bias is not None:
        raise AdapterError(f"{layer} has a bias, which this format cannot hold")
    if pair.magnitude is not None:
        raise AdapterError(f"{layer} belongs to a DoRA, which this format cannot hold")
