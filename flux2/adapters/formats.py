"""The file formats of low-rank adapters: our layers in the keys of diffusers, ComfyUI and kohya's scripts, and back.

Low-rank pairs are kept as

    delta W = scale * B A        A: (rank, in), B: (out, rank), scale = alpha / rank

A LoRA on a fused q, k, v projection is exactly three on the separate ones: the same A, and B cut in thirds. Three
separate ones fuse into one of rank 3r: the A stacked, the B on a block diagonal. The scale is folded into B, each layer
its own; kohya's alpha is then the rank. Names of layers come from the table in `names`.
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
# how a key begins, and whose it is then; OneTrainer writes diffusers' names in kohya's manner
FAMILIES = {
    "transformer.": "diffusers",
    "diffusion_model.": "ComfyUI",
    KOHYA: "kohya",
    "lora_transformer_": "OneTrainer",
}
TEXT = ("lora_te", "text_encoder")  # how keys of text encoders begin, in kohya's and in diffusers' files
SIDES = {"lora_down": "lora_A", "lora_up": "lora_B"}
KEY = re.compile(
    rf"(?P<prefix>{'|'.join(map(re.escape, FAMILIES))})?(?P<layer>.+?)"
    r"\.(?P<side>lora_[AB]|lora_down|lora_up|alpha|lora_magnitude_vector)(\.default)?(\.weight)?"
)
# parts of keys that are of adapters which are not read from single files
FOREIGN = {
    "dora_scale": "a DoRA in the keys of LyCORIS",
    "hada_": "a LoHa",
    "lokr_": "a LoKr",
    "oft_": "an OFT",
}


class AdapterError(ValueError):
    """An adapter cannot be attached, or its file cannot be read or does not fit the model."""


@dataclass(frozen=True)
class LoraPair:
    """One layer's low-rank update with the scale folded into `b`: delta W = b @ a.

    With `magnitude` it is a DoRA: W + delta W = (W + b @ a) with each row brought to the length that is given.
    """

    a: Tensor  # (rank, in)
    b: Tensor  # (out, rank)
    magnitude: Tensor | None = None  # (out,)


def to_diffusers(pairs: Mapping[str, LoraPair]) -> dict[str, Tensor]:
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


def to_comfyui(pairs: Mapping[str, LoraPair]) -> dict[str, Tensor]:
    """Our layers to the keys that ComfyUI reads, which are Black Forest Labs' names. Raises AdapterError for a DoRA."""
    state = {}
    for layer, pair in pairs.items():
        check_plain(layer, pair)
        state[f"diffusion_model.{layer}.lora_A.weight"] = pair.a
        state[f"diffusion_model.{layer}.lora_B.weight"] = pair.b
    return state


def to_kohya(pairs: Mapping[str, LoraPair]) -> dict[str, Tensor]:
    """Our layers to the keys of kohya's scripts, with alpha = rank. Raises AdapterError for a DoRA."""
    state = {}
    for layer, pair in pairs.items():
        check_plain(layer, pair)
        name = KOHYA + layer.replace(".", "_")
        state[f"{name}.lora_down.weight"] = pair.a
        state[f"{name}.lora_up.weight"] = pair.b
        state[f"{name}.alpha"] = torch.tensor(float(pair.a.shape[0]))
    return state


def check_plain(layer: str, pair: LoraPair) -> None:
    """Raises AdapterError for a DoRA. ComfyUI divides by the lengths of W's rows, PEFT by those of W + B A's."""
    if pair.magnitude is not None:
        raise AdapterError(f"{layer} is of a DoRA, which this form cannot hold")


def fuse(parts: Sequence[LoraPair]) -> LoraPair:
    """Pairs of separate q, k, v layers to one of the fused layer; the three of a split one come back as it was."""
    lengths = [part.magnitude for part in parts if part.magnitude is not None]
    magnitude = torch.cat(lengths) if lengths else None
    if all(torch.equal(part.a, parts[0].a) for part in parts):
        return LoraPair(parts[0].a, torch.cat([part.b for part in parts]), magnitude)
    return LoraPair(torch.cat([part.a for part in parts]), torch.block_diag(*(part.b for part in parts)), magnitude)


def pair_from_tensors(name: str, found: Mapping[str, Tensor]) -> LoraPair:
    """The update of one layer from its tensors in a file.

    Raises AdapterError unless there are A (rank, in) and B (out, rank), of alpha one number, of lengths (out,).
    """
    if not {"lora_A", "lora_B"} <= found.keys():
        raise AdapterError(f"{name} has only {' and '.join(found)}: the file is incomplete")
    a, b, alpha = found["lora_A"], found["lora_B"], found.get("alpha")
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
        raise AdapterError(
            f"{name}: lora_A has shape {tuple(a.shape)} and lora_B {tuple(b.shape)}; (rank, in) and (out, rank) of one "
            "rank were expected"
        )
    magnitude = found.get("lora_magnitude_vector")
    if magnitude is not None and magnitude.shape != b.shape[:1]:
        raise AdapterError(
            f"{name}: lora_magnitude_vector has shape {tuple(magnitude.shape)}, not {tuple(b.shape[:1])}"
        )
    if alpha is None:
        return LoraPair(a, b, magnitude)
    if alpha.numel() != 1:
        raise AdapterError(f"{name}: alpha has shape {tuple(alpha.shape)}; one number was expected")
    return LoraPair(a, b * (alpha.item() / a.shape[0]), magnitude)


def parse_keys(state: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, dict[str, Tensor]]:
    """The tensors of a file by layer, as the file calls it with dots, and by side: lora_A, lora_B, alpha.

    Args:
        names: with dots, by the names with underscores that kohya makes of them.

    Raises AdapterError for keys of no format, of several, or that say one thing twice, and for values not finite.
    """
    if of_text := [key for key in state if key.startswith(TEXT)]:
        raise AdapterError(f"it is for the text encoder too, which is not adapted here: {listed(of_text, 2)}")
    matches = {key: KEY.fullmatch(key) for key in state}
    if unknown := [key for key, match in matches.items() if match is None]:
        kind = next((kind for part, kind in FOREIGN.items() if any(part in key for key in unknown)), "")
        raise AdapterError(
            f"{len(unknown)} of its {len(state)} keys are no LoRA keys of diffusers, ComfyUI or kohya: "
            f"{listed(unknown, 3)}" + (f". It is {kind}, which is read from a folder of PEFT's alone" if kind else "")
        )
    families = {FAMILIES.get(match["prefix"], "no prefix"): key for key, match in reversed(matches.items()) if match}
    if len(families) > 1:
        examples = ", ".join(f"{key} ({family})" for family, key in sorted(families.items()))
        raise AdapterError(f"it mixes keys of several formats, of which one was expected: {examples}")
    found: dict[str, dict[str, Tensor]] = {}
    for key, match in matches.items():
        assert match is not None
        prefix, side = match["prefix"] or "", SIDES.get(match["side"], match["side"])
        layer = names.get(match["layer"], prefix + match["layer"]) if prefix.endswith("_") else match["layer"]
        if not bool(torch.isfinite(state[key].float()).all()):
            raise AdapterError(f"{key} has NaN or infinite values: the training that made it failed")
        if side in found.setdefault(layer, {}):
            raise AdapterError(f"{key} says again what {side} of {layer} is: it is in the file twice")
        found[layer][side] = state[key].float()
    return found


def from_state(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, LoraPair]:
    """Read the keys of diffusers, ComfyUI or kohya back into our layers.

    Args:
        state: `*.lora_A.weight` and `*.lora_B.weight`, or `lora_down` and `lora_up`, and perhaps `*.alpha` and
            `*.lora_magnitude_vector`.
        model: whose layers the keys must name; may be on the meta device.

    Raises:
        AdapterError: a key is of no format or of another than the rest, a tensor has values that are not finite, a pair
            is incomplete or of two ranks, a layer is not in the model or not of its shape, or some layers are of a DoRA
            and others are not.
    """
    if not state:
        raise AdapterError("it holds no tensors")
    layers = {
        layer: (transformer_module(layer.removesuffix(".base_layer")), module)
        for layer, module in model.named_modules()
        if isinstance(module, nn.Linear | LoraLayer) and ".lora_" not in layer
    }
    known = [name for layer, (published, _) in layers.items() for name in (layer, *published.names)]
    halves = parse_keys(state, {name.replace(".", "_"): name for name in known})
    pairs = {}
    for layer, (published, module) in layers.items():
        rows, columns = module.out_features, module.in_features
        if layer in halves:
            found = pair_from_tensors(layer, halves.pop(layer))
        elif there := {name: pair_from_tensors(name, halves.pop(name)) for name in published.names if name in halves}:
            part_rows = rows // len(published.names)
            for name, part in there.items():
                check_features(name, part, columns, part_rows)
            doras = [name for name, part in there.items() if part.magnitude is not None]
            if 0 < len(doras) < len(published.names):
                raise AdapterError(
                    f"it is a DoRA of {listed(doras)} alone: {listed(published.names)} are one layer here, of which "
                    "all rows have lengths or none"
                )
            nothing = LoraPair(torch.zeros(0, columns), torch.zeros(part_rows, 0))
            found = fuse([there.get(name, nothing) for name in published.names])
            if published.kind == "swapped":
                length = None if found.magnitude is None else swap_halves(found.magnitude)
                found = LoraPair(found.a, swap_halves(found.b), length)
        else:
            continue
        check_features(layer, found, columns, rows)
        pairs[layer] = found
    if halves:
        raise AdapterError(f"the adapter has layers that this model does not: {listed(halves)}")
    doras = [layer for layer, pair in pairs.items() if pair.magnitude is not None]
    if doras and len(doras) < len(pairs):
        raise AdapterError(f"some of its layers are of a DoRA ({listed(doras, 3)}), and others of a plain LoRA")
    return pairs


def check_features(name: str, pair: LoraPair, columns: int, rows: int) -> None:
    """Raises AdapterError unless `pair` is for a layer of `columns` to `rows` features."""
    if pair.a.shape[1] != columns or pair.b.shape[0] != rows:
        raise AdapterError(
            f"{name}: the adapter is for a layer of {pair.a.shape[1]} to {pair.b.shape[0]} features, the "
            f"model's has {columns} to {rows}. It was trained on another model."
        )
