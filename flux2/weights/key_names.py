"""Tensor names: ours, which are those of Black Forest Labs, and those of diffusers.

The table from our names to diffusers' names is written once, here, and serves loading, export and adapters: one of our
tensors is one published tensor, three stacked ones (q, k, v), or one with its halves swapped.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class PublishedTensor:
    """How one of our tensors is stored under diffusers' names."""

    names: tuple[str, ...]
    kind: Literal["same", "stacked", "swapped", "pointwise"] = "same"

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return our tensor from the published tensors, in the order of `names`."""
        if self.kind == "stacked":
            return torch.cat(list(tensors))
        (tensor,) = tensors
        if self.kind == "swapped":
            return swap_halves(tensor)
        return tensor[:, :, None, None] if self.kind == "pointwise" and tensor.ndim == 2 else tensor

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """Return the published tensors by name: the inverse of `join`."""
        if self.kind == "stacked":
            return dict(zip(self.names, tensor.chunk(len(self.names)), strict=True))
        if self.kind == "swapped":
            tensor = swap_halves(tensor)
        elif self.kind == "pointwise" and tensor.ndim == 4:
            tensor = tensor[:, :, 0, 0]
        return {self.names[0]: tensor}


def swap_halves(tensor: Tensor) -> Tensor:
    """Swap (shift, scale) and (scale, shift) along the first dimension."""
    return torch.cat(tensor.chunk(2)[::-1])


_SINGLE = {
    "linear1": "attn.to_qkv_mlp_proj",
    "linear2": "attn.to_out",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
}
_DOUBLE = {
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out",
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
    "img_mlp.0": "ff.linear_in",
    "img_mlp.2": "ff.linear_out",
    "txt_mlp.0": "ff_context.linear_in",
    "txt_mlp.2": "ff_context.linear_out",
}
_QKV = {
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
}
_OUTER = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
    "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}


def transformer_module(name: str) -> PublishedTensor:
    """Return diffusers' names of one of our transformer's modules. Raises KeyError for an unknown name."""
    if match := re.fullmatch(r"(double|single)_blocks\.(\d+)\.(.+)", name):
        kind, index, inner = match.groups()
        if kind == "single":
            return PublishedTensor((f"single_transformer_blocks.{index}.{_SINGLE[inner]}",))
        parts = _QKV.get(inner) or (_DOUBLE[inner],)
        names = tuple(f"transformer_blocks.{index}.{part}" for part in parts)
        return PublishedTensor(names, "stacked" if inner in _QKV else "same")
    return PublishedTensor((_OUTER[name],), "swapped" if name == "final_layer.adaLN_modulation.1" else "same")


def transformer_tensor(name: str) -> PublishedTensor:
    """Return diffusers' names of one of our transformer's parameters."""
    module, _, leaf = name.rpartition(".")
    published = transformer_module(module)
    leaf = "weight" if leaf == "scale" else leaf
    return PublishedTensor(tuple(f"{part}.{leaf}" for part in published.names), published.kind)


_AUTOENCODER = (
    (r"^(en|de)coder\.(post_)?quant_conv", r"\2quant_conv"),
    (r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.up\.(\d+)\.block\.", r".up_blocks.\1.resnets."),
    (r"\.up\.(\d+)\.upsample\.", r".up_blocks.\1.upsamplers.0."),
    (r"\.mid\.block_1\.", r".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", r".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", r".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", r".mid_block.attentions.0.to_out.0."),
    (r"\.nin_shortcut\.", r".conv_shortcut."),
    (r"coder\.norm_out\.", r"coder.conv_norm_out."),
)


def autoencoder_tensor(name: str, levels: int) -> PublishedTensor:
    """Return diffusers' name of one of our autoencoder's tensors; `levels` is the number of resolutions."""
    pointwise = re.search(r"\.attn_1\.(q|k|v|proj_out)\.weight$", name)
    for pattern, replacement in _AUTOENCODER:
        name = re.sub(pattern, replacement, name)
    # our up.0 is the level of full resolution, as in the published file; diffusers counts from the smallest
    name = re.sub(r"\.up_blocks\.(\d+)\.", lambda match: f".up_blocks.{levels - 1 - int(match[1])}.", name)
    return PublishedTensor((name,), "pointwise" if pointwise else "same")
