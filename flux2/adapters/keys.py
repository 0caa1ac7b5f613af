"""Keys of adapter files: which layer and which factor a tensor is, in the spellings of all programs.

    prefix  layer  .side [.adapter name] [.weight]

Layers are found by their names with underscores, because programs differ in where they write dots: kohya writes
underscores alone, musubi's converter mixes both. `known_layers` has every name of every layer, ours and diffusers'.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flux2.adapters.formats import AdapterError
from flux2.utils.text import listed
from flux2.weights.key_names import transformer_module

TENSORS = 20_000  # in a file; an adapter of every layer of the largest model has at most 1,500
KEY_LENGTH = 400
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)
DOTTED = r"(?:(?:base_model|model|diffusion_model|transformer)\.)*"
UNDERSCORES = ("lora_unet_", "lora_transformer_", "lycoris_")
FAMILIES = {  # prefixes, and the program they belong to; others are named as they are
    "": "no prefix",
    "transformer.": "diffusers",
    "diffusion_model.": "ComfyUI",
    "base_model.model.": "PEFT",
    "lora_unet_": "kohya",
    "lora_transformer_": "OneTrainer",
    "lycoris_": "LyCORIS",
}
SIDES = {
    "lora_down": "lora_A",
    "lora_up": "lora_B",
    "lora.down": "lora_A",  # diffusers, before PEFT
    "lora.up": "lora_B",
    "lora.alpha": "alpha",
    "magnitude": "lora_magnitude_vector",
}
KEY = re.compile(
    rf"(?P<prefix>{DOTTED}(?:{'|'.join(UNDERSCORES)})?)(?P<layer>.+?)"
    r"\.(?P<side>lora_[AB]|lora[._](?:down|up)|lora_magnitude_vector|magnitude|dora_scale|(?:lora\.)?alpha"
    r"|hada_w[12]_[ab]|lokr_w[12](?:_[ab])?)"
    r"(?:\.(?!weight(?:_|$)|bias$)(?P<adapter>[^.]+))?(?:\.(?P<leaf>weight|bias))?"
)
IGNORED = ("lokr_factor",)  # musubi's note of the size of factors, which their shapes have too
# what is not read, by a part of its keys
TEXT = re.compile(r"(base_model\.model\.)?(lora_te|text_|te\d?[._]|t5|clip|conditioner|cond_stage|qwen|mistral)")
NOT_READ = {
    r"^bundle_emb": "embeddings of the text encoder",
    r"\.(diff|diff_b|set_weight|reshape_weight)$": "full layers (.diff)",
    r"\.(w_norm|b_norm)$|norm(_added)?_[qkv]\b|(query|key)_norm\b|\bnorm\d*\b": "norm layers",
    r"oft_|boft_": "an OFT, which only PEFT folders hold",
    r"\.(lokr_t2|hada_t[12]|lora_mid)\b": "convolutions (Tucker factors)",
    r"\.(a1|a2|b1|b2)\.weight$|glora": "a GLoRA",
    r"\.on_input$|ia3": "an IA3",
    r"vera_|randlora_": "an adapter with shared random factors (VeRA)",
    r"\.scalar$": "factors with a trained scalar",
    r"(weight_scale|scale_weight|weight_scale_inv|comfy_quant|absmax|quant_state|scaled_fp8)": "a quantized adapter",
    r"_lora\.(down|up)\.": "attention processors of old diffusers versions",
    r"\.bias$": "biases of layers",
    r"^(?!(?i:.*lora)).*\.weight$": "whole layers instead of an adapter",
}


@dataclass(frozen=True)
class Place:
    """Where the layer of a file is in a layer of ours: `rows` of its output features from `start`."""

    layer: str
    start: int
    rows: int
    columns: int
    total: int  # output features of our layer
    parts: tuple[str, ...] = ()  # names of all parts of the layer in the file's program
    is_swapped: bool = False

    @property
    def is_whole(self) -> bool:
        return self.rows == self.total


@dataclass(frozen=True)
class FileLayer:
    """One layer of a file: its name there, with dots if the file has some, and its tensors by side."""

    name: str
    place: Place
    tensors: Mapping[str, Tensor]


def known_layers(model: nn.Module) -> dict[str, Place]:
    """Return the places of all layers of `model`, which may have adapters, by all their names with underscores."""
    places: dict[str, Place] = {}
    for name, module in model.named_modules():
        layer = name.removesuffix(".base_layer")
        if not isinstance(module, nn.Linear) or ".lora_" in name:
            continue
        published, rows, columns = transformer_module(layer), module.out_features, module.in_features
        size = rows // len(published.names)
        found = {layer: Place(layer, 0, rows, columns, rows)}
        for i, part in enumerate(published.names):
            swapped = published.kind == "swapped"
            found[part] = Place(layer, i * size, size, columns, rows, published.names, swapped)
        if published.kind == "stacked":  # diffusers' names of the fused projections
            added = "added_" if layer.startswith("double") and ".txt_" in layer else ""
            found[f"{part.rpartition('.')[0]}.to_{added}qkv"] = found[layer]
        if layer.endswith(".linear1"):  # ComfyUI's name of a slice
            found[f"{layer}_qkv"] = Place(layer, 0, 3 * columns, columns, rows, (f"{layer}_qkv",))
        places |= {key.replace(".", "_"): place for key, place in found.items()}
    return places


def check_dtype(key: str, tensor: Tensor) -> None:
    """Raise AdapterError unless the tensor holds floats: integers are quantized, and mean nothing without a scale."""
    is_number = key.endswith((".alpha", *IGNORED)) and not tensor.is_complex() and tensor.dtype != torch.bool
    if tensor.dtype not in FLOATS and not is_number:
        raise AdapterError(
            f"{key} has dtype {str(tensor.dtype).removeprefix('torch.')}, so the adapter is quantized, which is not "
            "read. Give it in float32, bfloat16 or float16"
        )


def check_keys(keys: Iterable[str]) -> None:
    """Raise AdapterError unless number and lengths of the keys are those of an adapter."""
    keys = list(keys)
    if not keys:
        raise AdapterError("it holds no tensors")
    if len(keys) > TENSORS:
        raise AdapterError(f"it holds {len(keys)} tensors, more than the {TENSORS} that an adapter may have")
    if long := next((key for key in keys if len(key) > KEY_LENGTH), None):
        raise AdapterError(f"the key {long[:60]}... has {len(long)} characters: the file is no adapter, or damaged")


def match_key(key: str) -> re.Match[str] | None:
    """Return the parts of a key that has a meaning here; only B may have a bias."""
    match = KEY.fullmatch(key)
    return match if match and (match["leaf"] != "bias" or SIDES.get(match["side"], match["side"]) == "lora_B") else None


def check_known(keys: Iterable[str]) -> None:
    """Raise AdapterError, with what they are, if any of the keys has no meaning here."""
    keys = [key for key in keys if key not in IGNORED]
    if of_text := [key for key in keys if TEXT.match(key)]:
        raise AdapterError(
            f"it also adapts the text encoder ({len(of_text)} of its {len(keys)} keys are of text-encoder layers), "
            f"which is not supported: {listed(of_text, 2)}"
        )
    if unknown := [key for key in keys if match_key(key) is None]:
        by_kind = {kind: [key for key in unknown if re.search(part, key)] for part, kind in NOT_READ.items()}
        other_case = re.compile(KEY.pattern, re.IGNORECASE)
        by_kind["spelled in another case than lora_A or lora_down"] = [
            key for key in unknown if other_case.fullmatch(key)
        ]
        kind, found = max(by_kind.items(), key=lambda item: len(item[1]))
        if found:
            raise AdapterError(
                f"{len(found)} of its {len(keys)} keys are {kind}, which are not read: {listed(found, 3)}"
            )
        raise AdapterError(
            f"{len(unknown)} of its {len(keys)} keys are not LoRA keys of diffusers, ComfyUI or kohya: "
            f"{listed(unknown, 3)}"
        )


def parse(state: Mapping[str, Tensor], model: nn.Module) -> list[FileLayer]:
    """Return the layers of a file with their tensors in float32, by side: lora_A, lora_B, alpha, hada_w1_a, ...

    Raises AdapterError for keys of no format, of several formats or adapters or with the same meaning, for layers that
    `model` does not have, and for values that are not finite floats.
    """
    check_keys(state)
    check_known(state)
    places = known_layers(model)
    matches = {key: match for key in state if (match := match_key(key))}
    families = {match["prefix"]: key for key, match in reversed(matches.items())}
    if len(families) > 1:
        named = ((key, FAMILIES.get(prefix, prefix)) for prefix, key in families.items())
        examples = ", ".join(f"{key} ({family})" for key, family in sorted(named, key=lambda item: item[::-1]))
        raise AdapterError(f"it mixes keys of several formats instead of one: {examples}")
    if len(names := {match["adapter"] for match in matches.values() if not match["side"].endswith("alpha")}) > 1:
        given = ["one without a name" if name is None else name for name in names]
        raise AdapterError(f"it holds several adapters, {listed(given)}. Save each to its own file")
    if stray := [key for key, match in matches.items() if match["adapter"] not in {None, *names}]:
        raise AdapterError(f"{stray[0]} is of another adapter than the layers of the file")
    by_layer: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, match in matches.items():
        name = re.sub(r"^sformer_blocks\.", "transformer_blocks.", match["layer"])  # as some exports cut the prefix
        if name.replace(".", "_") not in places:
            unknown.append(match["prefix"] + name if match["prefix"].endswith("_") else name)
            continue
        side = SIDES.get(match["side"], match["side"]) + (".bias" if match["leaf"] == "bias" else "")
        check_dtype(key, state[key])
        if side in by_layer.setdefault(name, {}):
            raise AdapterError(f"{key} repeats {side} of {name}, which is already in the file")
        by_layer[name][side] = state[key].float()
        if side != "alpha" and not bool(torch.isfinite(by_layer[name][side]).all()):
            raise AdapterError(f"{key} has NaN or infinite values: its training failed")
    if unknown:
        raise AdapterError(f"the adapter has layers that this model does not: {listed(set(unknown))}")
    return [FileLayer(name, places[name.replace(".", "_")], tensors) for name, tensors in by_layer.items()]
