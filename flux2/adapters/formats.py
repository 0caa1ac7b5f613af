"""File formats of low-rank adapters: convert our layers to the keys of diffusers, ComfyUI and kohya's scripts, and
back.

A low-rank pair is

    delta W = scale * B A        A: (rank, in), B: (out, rank), scale = alpha / rank

A LoRA on a fused q, k, v projection equals three on the separate ones: the same A, and B cut in thirds. Three separate
ones fuse into one of rank 3r: A stacked, B block-diagonal. The scale of each layer is folded into B; kohya's alpha is
then the rank. flux2/weights/key_names.py has the names of layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from flux2.utils.text import listed
from flux2.weights.key_names import swap_halves, transformer_module

KOHYA = "lora_unet_"
# prefixes of keys, and the program they belong to; OneTrainer writes diffusers' names in kohya's style
FAMILIES = {
    "transformer.": "diffusers",
    "diffusion_model.": "ComfyUI",
    KOHYA: "kohya",
    "lora_transformer_": "OneTrainer",
}
TEXT = ("lora_te", "text_encoder")  # prefixes of keys of text encoders, in kohya's and in diffusers' files
SIDES = {"lora_down": "lora_A", "lora_up": "lora_B"}
KEY = re.compile(
    rf"(?P<prefix>{'|'.join(map(re.escape, FAMILIES))})?(?P<layer>.+?)"
    r"\.(?P<side>lora_[AB]|lora_down|lora_up|alpha|lora_magnitude_vector)(\.default)?(\.weight)?"
)
# parts of keys that belong to adapters which are not read from single files
FOREIGN = {"dora_scale": "a DoRA in the keys of LyCORIS", "hada_": "a LoHa", "lokr_": "a LoKr", "oft_": "an OFT"}


class AdapterError(ValueError):
    """An adapter cannot be attached, or its file cannot be read or does not fit the model."""


@dataclass(frozen=True)
class LoraPair:
    """One layer's low-rank update with the scale folded into `b`: delta W = b @ a.

    With `magnitude` it is a DoRA: W + b @ a with each row scaled to the given length.
    """

    a: Tensor  # (rank, in)
    b: Tensor  # (out, rank)
    magnitude: Tensor | None = None  # (out,)


def to_diffusers(pairs: Mapping[str, LoraPair]) -> dict[str, Tensor]:
    """Return the tensors by the keys that diffusers' `load_lora_weights` reads."""
    state = {}
    for layer, pair in pairs.items():
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
    """Raise AdapterError for a DoRA. ComfyUI divides by the row lengths of W, PEFT by those of W + B A."""
    if pair.magnitude is not None:
        raise AdapterError(f"{layer} belongs to a DoRA, which this format cannot hold")


def fuse(parts: Sequence[LoraPair]) -> LoraPair:
    """Fuse pairs of separate q, k, v layers into one; the three parts of a split one give the original."""
    lengths = [part.magnitude for part in parts if part.magnitude is not None]
    magnitude = torch.cat(lengths) if lengths else None
    if all(torch.equal(part.a, parts[0].a) for part in parts):
        return LoraPair(parts[0].a, torch.cat([part.b for part in parts]), magnitude)
    return LoraPair(torch.cat([part.a for part in parts]), torch.block_diag(*(part.b for part in parts)), magnitude)


def pair_from_tensors(name: str, tensors: Mapping[str, Tensor]) -> LoraPair:
    """Return the update of one layer from its tensors in a file.

    Raises AdapterError unless A is (rank, in), B (out, rank), alpha one number and the magnitude (out,).
    """
    if not {"lora_A", "lora_B"} <= tensors.keys():
        raise AdapterError(f"{name} has only {' and '.join(tensors)}: the file is incomplete")
    a, b, alpha = tensors["lora_A"], tensors["lora_B"], tensors.get("alpha")
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
        raise AdapterError(
            f"{name}: lora_A has shape {tuple(a.shape)} and lora_B {tuple(b.shape)}, not (rank, in) and (out, rank)"
        )
    magnitude = tensors.get("lora_magnitude_vector")
    if magnitude is not None and magnitude.shape != b.shape[:1]:
        raise AdapterError(
            f"{name}: lora_magnitude_vector has shape {tuple(magnitude.shape)}, not {tuple(b.shape[:1])}"
        )
    if alpha is None:
        return LoraPair(a, b, magnitude)
    if alpha.numel() != 1:
        raise AdapterError(f"{name}: alpha has shape {tuple(alpha.shape)} and must be one number")
    return LoraPair(a, b * (alpha.item() / a.shape[0]), magnitude)


def parse_keys(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of a file by layer, as the file names it with dots, and by side: lora_A, lora_B, alpha.

    `names` maps the names with underscores that kohya derives to those with dots. Raises AdapterError for keys of no
    format, of several formats or with the same meaning, and for non-finite values.
    """
    if of_text := [key for key in state if key.startswith(TEXT)]:
        raise AdapterError(f"it also adapts the text encoder, which is not supported: {listed(of_text, 2)}")
    matches = {key: KEY.fullmatch(key) for key in state}
    if unknown := [key for key, match in matches.items() if match is None]:
        kind = next((kind for part, kind in FOREIGN.items() if any(part in key for key in unknown)), "")
        raise AdapterError(
            f"{len(unknown)} of its {len(state)} keys are not LoRA keys of diffusers, ComfyUI or kohya: "
            f"{listed(unknown, 3)}" + (f". It is {kind}, which can only be read from a PEFT folder" if kind else "")
        )
    families = {FAMILIES.get(match["prefix"], "no prefix"): key for key, match in reversed(matches.items()) if match}
    if len(families) > 1:
        examples = ", ".join(f"{key} ({family})" for family, key in sorted(families.items()))
        raise AdapterError(f"it mixes keys of several formats instead of one: {examples}")
    by_layer: dict[str, dict[str, Tensor]] = {}
    for key, match in matches.items():
        assert match is not None
        prefix, side = match["prefix"] or "", SIDES.get(match["side"], match["side"])
        layer = names.get(match["layer"], prefix + match["layer"]) if prefix.endswith("_") else match["layer"]
        if not bool(torch.isfinite(state[key].float()).all()):
            raise AdapterError(f"{key} has NaN or infinite values: its training failed")
        if side in by_layer.setdefault(layer, {}):
            raise AdapterError(f"{key} repeats {side} of {layer}, which is already in the file")
        by_layer[layer][side] = state[key].float()
    return by_layer


def from_state(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, LoraPair]:
    """Return the pairs of the layers of `model`, which may be on the meta device, from a file's tensors.

    These are `*.lora_A.weight` and `*.lora_B.weight`, or `lora_down` and `lora_up`, and optionally `*.alpha` and
    `*.lora_magnitude_vector`. Raises AdapterError if a key has no format or another than the rest, a tensor has
    non-finite values, a pair is incomplete or has two ranks, a layer is not in the model or has another shape, or only
    some layers belong to a DoRA.
    """
    if not state:
        raise AdapterError("it holds no tensors")
    layers = {
        layer: (transformer_module(layer.removesuffix(".base_layer")), module)
        for layer, module in model.named_modules()
        if isinstance(module, nn.Linear | LoraLayer) and ".lora_" not in layer
    }
    known = [name for layer, (published, _) in layers.items() for name in (layer, *published.names)]
    by_layer = parse_keys(state, {name.replace(".", "_"): name for name in known})
    pairs = {}
    for layer, (published, module) in layers.items():
        rows, columns = module.out_features, module.in_features
        if layer in by_layer:
            fused = pair_from_tensors(layer, by_layer.pop(layer))
        elif parts := {
            name: pair_from_tensors(name, by_layer.pop(name)) for name in published.names if name in by_layer
        }:
            part_rows = rows // len(published.names)
            for name, part in parts.items():
                check_features(name, part, columns, part_rows)
            doras = [name for name, part in parts.items() if part.magnitude is not None]
            if doras and len(doras) < len(published.names):
                raise AdapterError(
                    f"only {listed(doras)} have a DoRA magnitude, but {listed(published.names)} are one layer here and "
                    "must have all or none"
                )
            nothing = LoraPair(torch.zeros(0, columns), torch.zeros(part_rows, 0))
            fused = fuse([parts.get(name, nothing) for name in published.names])
            if published.kind == "swapped":
                length = None if fused.magnitude is None else swap_halves(fused.magnitude)
                fused = LoraPair(fused.a, swap_halves(fused.b), length)
        else:
            continue
        check_features(layer, fused, columns, rows)
        pairs[layer] = fused
    if by_layer:
        raise AdapterError(f"the adapter has layers that this model does not: {listed(by_layer)}")
    doras = [layer for layer, pair in pairs.items() if pair.magnitude is not None]
    if doras and len(doras) < len(pairs):
        raise AdapterError(f"some of its layers belong to a DoRA ({listed(doras, 3)}), others to a plain LoRA")
    return pairs


def check_features(name: str, pair: LoraPair, columns: int, rows: int) -> None:
    """Raise AdapterError unless `pair` is for a layer of `columns` input and `rows` output features."""
    if pair.a.shape[1] != columns or pair.b.shape[0] != rows:
        raise AdapterError(
            f"{name}: the adapter is for a layer of {pair.a.shape[1]} to {pair.b.shape[0]} features, but the model's "
            f"has {columns} to {rows}. It was trained on another model."
        )
