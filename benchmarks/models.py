"""Transformers with random weights at any shape, ours and diffusers', that compute the same: what the benchmarks share.

Every weight is drawn by its name, so two models of one configuration hold the same weights whatever their precision,
and one of 64 GB in bfloat16 is quantized layer by layer without ever being whole.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping
from typing import Any

import bitsandbytes
import peft
import torch
from diffusers import Flux2Transformer2DModel
from torch import Tensor, nn

from flux2 import adapters
from flux2.models.transformer import Transformer
from flux2.models.variants import DEV, KLEIN_4B, KLEIN_9B, TransformerConfig
from flux2.quantization.base import QuantizedLinear
from flux2.quantization.precision import Matmul, Precision, Storage, convert
from flux2.weights.key_names import transformer_tensor

SMALL = TransformerConfig(heads=2, head_dim=64, double_blocks=1, single_blocks=2, text_width=64, guidance=False,
                          rope_axes=(16, 16, 16, 16))  # fmt: skip
MODELS = {"dev": DEV, "klein_base_9b": KLEIN_9B, "klein_base_4b": KLEIN_4B, "small": SMALL}
DIFFUSERS_TARGETS = (
    r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|ff(_context)?\.linear_(in|out))"
    r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
)
DIFFUSERS_BLOCKS = ("transformer_blocks.", "single_transformer_blocks.")


def precision_of(storage: Storage | None, in_fp8: bool, both: bool = False) -> Precision:
    """bfloat16, with the linears of the blocks in `storage`.

    Args:
        in_fp8: whether FP8 layers multiply in FP8.
        both: whether they keep their weights transposed too.
    """
    matmul: Matmul = "auto" if storage != "fp8" else "fp8" if in_fp8 else "dequantized"
    return Precision(torch.bfloat16, storage, matmul=matmul, cache_transposed_weights=both)


def drawn(name: str, shape: torch.Size, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The weight of this name, the same in every model: random, of a scale that keeps activations near one."""
    if len(shape) == 1:
        return torch.ones(shape, device=device, dtype=dtype)
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator, device=device, dtype=dtype) * shape[1] ** -0.5


def random_transformer(
    config: TransformerConfig, precision: Precision, device: torch.device, host: Collection[str] = ()
) -> Transformer:
    """Our transformer. One layer at a time is there in two precisions.

    Args:
        host: blocks whose weights are to wait in host memory; they are drawn on the device too.
    """
    with torch.device("meta"):
        model = Transformer(config).to(precision.dtype)
    convert(model, precision, device)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            sizes = torch.Size((module.out_features, module.in_features))
            module.store(drawn(f"{name}.weight", sizes, device, precision.dtype))
        else:
            for leaf, old in list(module.named_parameters(recurse=False)):
                weight = drawn(f"{name}.{leaf}", old.shape, device, precision.dtype)
                setattr(module, leaf, nn.Parameter(weight, requires_grad=False))
        is_leaf = next(module.children(), None) is None
        if is_leaf and any(name.startswith(f"{block}.") for block in host):
            module.to("cpu")
    return model


def adapt(model: Transformer, rank: int) -> None:
    """Attach a LoRA to the linears of the blocks, of which neither factor is zero."""
    adapters.attach(model, rank=rank)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = 0.1 * drawn(name, parameter.shape, parameter.device, torch.float32)


def diffusers_transformer(
    config: TransformerConfig, weights: Mapping[str, Tensor] | None, device: torch.device, dtype: torch.dtype
) -> Any:
    """diffusers' transformer, frozen, with `weights` (by our names), or those that `random_transformer` draws."""
    with torch.device("meta"):
        names = {name: tensor.shape for name, tensor in Transformer(config).state_dict().items()}
        other = Flux2Transformer2DModel(
            in_channels=config.channels,
            num_layers=config.double_blocks,
            num_single_layers=config.single_blocks,
            attention_head_dim=config.head_dim,
            num_attention_heads=config.heads,
            joint_attention_dim=config.text_width,
            axes_dims_rope=config.rope_axes,
            guidance_embeds=config.guidance,
        )
    state: dict[str, Tensor] = {}
    for name, shape in names.items():
        weight = drawn(name, shape, device, dtype) if weights is None else weights[name]
        parts = transformer_tensor(name).split(weight)
        state |= {key: tensor.contiguous() for key, tensor in parts.items()}
    other.load_state_dict(state, assign=True)
    return other.requires_grad_(False)


def adapt_with_peft(other: Any, rank: int) -> None:
    """The same LoRA by PEFT alone, on q, k and v apart, in float32; every block is recomputed in its backward."""
    other.enable_gradient_checkpointing()
    other.add_adapter(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=DIFFUSERS_TARGETS))
    for parameter in other.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def to_four_bits(other: nn.Module, device: torch.device) -> None:
    """The block linears of diffusers' model as bitsandbytes' NF4 with double quantization, in place."""
    for name, module in list(other.named_modules()):
        if isinstance(module, nn.Linear) and name.startswith(DIFFUSERS_BLOCKS):
            layer = bitsandbytes.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4",
                device="meta",
            )  # fmt: skip
            layer.weight = bitsandbytes.nn.Params4bit(
                module.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
            ).to(device)
            parent, _, child = name.rpartition(".")
            setattr(other.get_submodule(parent), child, layer)
    other.is_loaded_in_4bit = True  # type: ignore[assignment]
