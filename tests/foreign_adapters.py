"""Adapter files as other programs write them, and what each adds to the weights, in plain arithmetic.

Names of layers are written out here: nothing is taken from the code under test.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

QKV, LINEAR1 = "double_blocks.1.img_attn.qkv", "single_blocks.0.linear1"
MLP, MODULATION = "double_blocks.0.txt_mlp.2", "final_layer.adaLN_modulation.1"
RANKS = {QKV: 3, LINEAR1: 2, MLP: 4, MODULATION: 2}
DIFFUSERS = {
    QKV: ("transformer_blocks.1.attn.to_q", "transformer_blocks.1.attn.to_k", "transformer_blocks.1.attn.to_v"),
    LINEAR1: ("single_transformer_blocks.0.attn.to_qkv_mlp_proj",),
    MLP: ("transformer_blocks.0.ff_context.linear_out",),
    MODULATION: ("norm_out.linear",),
}
BFL = {layer: (layer,) for layer in DIFFUSERS}
MUSUBI = {
    QKV: ("double_blocks.1.img_attn_qkv",),
    LINEAR1: ("single_blocks.0.linear1",),
    MLP: ("double_blocks.0.txt_mlp.2",),
}
MUSUBI |= {MODULATION: ("final.layer.adaLN.modulation.1",)}


@dataclass(frozen=True)
class Writer:
    """A program: its names of layers, its prefix and spelling, and where it writes a strength.

    `strength` is "alpha" (a tensor next to the factors), "config" (adapter_config.json) or "header".
    """

    names: Mapping[str, tuple[str, ...]]
    prefix: str
    strength: str
    types: tuple[str, ...]
    down: str = "lora_A"
    up: str = "lora_B"
    adapter: str = ""  # its name inside the keys
    length: str = "lora_magnitude_vector"
    underscores: bool = False
    file: str = "lora.safetensors"


PAIRS = ("lora", "dora")
EACH = ("lora", "loha", "lokr", "lokr_both", "lokr_whole")
KOHYA = {"down": "lora_down", "up": "lora_up", "length": "dora_scale"}
PEFT_FILE = "adapter_model.safetensors"
WRITERS = {
    "diffusers": Writer(DIFFUSERS, "transformer.", "header", PAIRS),
    "diffusers model": Writer(DIFFUSERS, "", "header", PAIRS),
    "diffusers folder": Writer(DIFFUSERS, "transformer.", "header", PAIRS, file="pytorch_lora_weights.safetensors"),
    "diffusers before PEFT": Writer(DIFFUSERS, "transformer.", "alpha", ("lora",), down="lora.down", up="lora.up"),
    "PEFT": Writer(BFL, "base_model.model.", "config", (*PAIRS, "loha", "lokr"), file=PEFT_FILE),
    "PEFT on diffusers": Writer(DIFFUSERS, "base_model.model.", "config", (*PAIRS, *EACH[1:]), file=PEFT_FILE),
    "PEFT renamed": Writer(DIFFUSERS, "base_model.model.", "config", (*PAIRS, *EACH[1:])),
    "PEFT in a prefix": Writer(BFL, "transformer.base_model.model.", "alpha", ("lora",), adapter="mystyle"),
    "DiffSynth": Writer(DIFFUSERS, "", "alpha", ("lora",), adapter="default"),
    "ai-toolkit": Writer(BFL, "diffusion_model.", "alpha", (*PAIRS, "lokr_whole"), length="magnitude"),
    "ComfyUI": Writer(BFL, "model.diffusion_model.", "alpha", (*EACH, "dora", "columns"), **KOHYA),
    "musubi": Writer(BFL, "lora_unet_", "alpha", EACH, **KOHYA, underscores=True),
    "musubi other": Writer(MUSUBI, "diffusion_model.", "alpha", ("lora",), adapter="mystyle"),
    "OneTrainer": Writer(DIFFUSERS, "transformer.", "alpha", (*EACH, "dora", "columns"), **KOHYA),
    "OneTrainer legacy": Writer(
        DIFFUSERS, "lora_transformer_", "alpha", ("lora", "columns"), **KOHYA, underscores=True
    ),
    "LyCORIS": Writer(DIFFUSERS, "lycoris_", "alpha", EACH, **KOHYA, underscores=True),
    "SimpleTuner": Writer(DIFFUSERS, "", "alpha", ("loha", "lokr", "lokr_both", "lokr_whole")),
}
STRENGTHS = (
    "none",
    "number",
    "pattern",
    "rslora",
)  # alpha = rank, one alpha, an alpha of one layer, alpha / sqrt(rank)


def strengths_of(writer: Writer, kind: str) -> list[str]:
    """Return the conventions that a program has for a type."""
    if writer.strength == "alpha":
        return list(STRENGTHS[:2])
    return list(STRENGTHS if kind in PAIRS else STRENGTHS[:3])


def factors(kind: str, rows: int, columns: int, rank: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Random factors of one layer by LyCORIS' or PEFT's names."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    if kind in (*PAIRS, "columns"):
        found = {"A": draw(rank, columns), "B": draw(rows, rank)}
        lengths = {"dora": (rows,), "columns": (1, columns)}.get(kind)
        return found | ({"length": draw(*lengths).abs() + 0.5} if lengths else {})
    if kind == "loha":
        return {
            f"hada_w{i}_{side}": draw(*((rows, rank) if side == "a" else (rank, columns)))
            for i in (1, 2)
            for side in "ab"
        }
    found = {"lokr_w1_a": draw(4, rank), "lokr_w1_b": draw(rank, 4)} if kind == "lokr_both" else {"lokr_w1": draw(4, 4)}
    if kind == "lokr_whole":
        return found | {"lokr_w2": draw(rows // 4, columns // 4)}
    return found | {"lokr_w2_a": draw(rows // 4, rank), "lokr_w2_b": draw(rank, columns // 4)}


def change(tensors: Mapping[str, Tensor], scale: float, weight: Tensor) -> Tensor:
    """What one layer's factors add to its weight, in float64."""
    found, weight = {key: tensor.double() for key, tensor in tensors.items()}, weight.double()
    if "A" in found:
        total = weight + scale * found["B"] @ found["A"]
        if "length" in found:
            rows = found["length"].ndim == 1 or found["length"].shape[1] == 1
            length = found["length"].reshape(-1, 1) if rows else found["length"]
            total = total * length / total.norm(dim=1 if rows else 0, keepdim=True)
        return total - weight
    if "hada_w1_a" in found:
        one, two = (found[f"hada_w{i}_a"] @ found[f"hada_w{i}_b"] for i in (1, 2))
        return scale * one * two
    w1, w2 = (found.get(f"lokr_w{i}", found.get(f"lokr_w{i}_a")) for i in (1, 2))
    w1 = w1 @ found["lokr_w1_b"] if "lokr_w1_b" in found else w1  # type: ignore[operator]
    w2 = w2 @ found["lokr_w2_b"] if "lokr_w2_b" in found else w2  # type: ignore[operator]
    return scale * torch.kron(w1, w2)  # type: ignore[arg-type]


def key_of(writer: Writer, name: str, side: str) -> str:
    """The key of a factor, as the program spells it."""
    adapter = f".{writer.adapter}" if writer.adapter else ""
    name = writer.prefix + (name.replace(".", "_") if writer.underscores else name)
    if side in "AB":
        return f"{name}.{writer.down if side == 'A' else writer.up}{adapter}.weight"
    return f"{name}.{writer.length if side == 'length' else side}"


def settings(writer: Writer, kind: str, strength: str) -> dict[str, Any]:
    """PEFT's configuration, whose patterns name layers as the program does: by whole names, ends and expressions."""
    alpha = "lora_alpha" if kind in PAIRS else "alpha"
    names = writer.names
    qkv = r"^.*\.1\.img_attn\.qkv" if names is BFL else r"attn.to_[qkv]"
    ranks = {names[LINEAR1][0].rpartition(".")[2]: 2, names[MLP][0]: 4, names[MODULATION][0].replace(".", r"\."): 2}
    config: dict[str, Any] = {"peft_type": "LORA" if kind in PAIRS else kind[:4].upper(), "r": 3, "rank_pattern": ranks}
    config[alpha] = {"none": 3, "number": 6, "pattern": 3, "rslora": 6}[strength]
    config["target_modules"] = [name for parts in names.values() for name in parts]
    if strength == "none":
        config["alpha_pattern"] = ranks
    if strength == "pattern":
        config["alpha_pattern"] = {qkv: 12}
    if kind in PAIRS:
        config |= {"use_rslora": strength == "rslora", "use_dora": kind == "dora"}
    return config | ({"decompose_factor": 4, "decompose_both": kind == "lokr_both"} if kind.startswith("lokr") else {})


def scale_of(writer: Writer, kind: str, strength: str, layer: str, w2: Tensor | None) -> float:
    rank = RANKS[layer]
    if kind == "lokr_whole" and writer.strength == "alpha":  # alpha has no rank to be divided by
        return 6 / max(w2.shape) if w2 is not None and writer is WRITERS["musubi"] and strength == "number" else 1.0
    alpha = {"none": rank, "number": 6, "pattern": 12 if layer == QKV else 3, "rslora": 6}[strength]
    return alpha / (rank**0.5 if strength == "rslora" else rank)


def write(
    writer: Writer, kind: str, strength: str, dtype: torch.dtype, folder: Path, model: nn.Module
) -> dict[str, Tensor]:
    """Write an adapter for `model` to `folder`, and return what it adds to each weight."""
    generator = torch.Generator().manual_seed(5)
    state: dict[str, Tensor] = {}
    changes: dict[str, Tensor] = {}
    for layer, names in writer.names.items():
        weight = model.get_parameter(f"{layer}.weight").detach()
        if names == DIFFUSERS[MODULATION]:
            weight = torch.cat(weight.chunk(2)[::-1])
        parts = []
        for name, part in zip(names, weight.chunk(len(names)), strict=True):
            found = {key: one.to(dtype) for key, one in factors(kind, *part.shape, RANKS[layer], generator).items()}
            if writer.length == "dora_scale" and kind == "dora":
                found["length"] = found["length"][:, None]
            state |= {key_of(writer, name, side): tensor.contiguous() for side, tensor in found.items()}
            if writer.strength == "alpha" and strength == "number":
                whole_ai_toolkit = kind == "lokr_whole" and writer.length == "magnitude"  # infinite in float16
                state[key_of(writer, name, "alpha")] = torch.tensor(1e10 if whole_ai_toolkit else 6.0).to(dtype)
            parts.append(change(found, scale_of(writer, kind, strength, layer, found.get("lokr_w2")), part))
        changes[layer] = torch.cat(parts)
        if names == DIFFUSERS[MODULATION]:
            changes[layer] = torch.cat(changes[layer].chunk(2)[::-1])
    header = {"format": "pt"}
    config = settings(writer, kind, strength)
    if writer.strength == "header":
        prefix = "transformer." if writer.prefix else ""
        header["lora_adapter_metadata"] = json.dumps({prefix + key: value for key, value in config.items()})
    if writer.strength == "config":
        (folder / "adapter_config.json").write_text(json.dumps(config))
    if writer is WRITERS["musubi"] and kind.startswith("lokr"):
        state["lokr_factor"] = torch.tensor(4)
    save_file(state, folder / writer.file, header)
    return changes
