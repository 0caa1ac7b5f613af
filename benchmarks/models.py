"""Random transformers of any shape, ours and diffusers', with equal weights, and random inputs for a training step.

Each weight is drawn from a seed given by its name, so all models of one configuration have the same weights in every
precision. A model of 64 GB in bfloat16 is quantized layer by layer and never exists as a whole.
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
from flux2.models.positions import image_positions, text_positions
from flux2.models.transformer import Transformer
from flux2.models.variants import DEV, KLEIN_4B, KLEIN_9B, TransformerConfig
from flux2.quantization.base import QuantizedLinear
from flux2.quantization.precision import Matmul, Precision, Storage, convert
from flux2.weights.key_names import transformer_tensor
from flux2.weights.loading import device_chooser

SMALL = TransformerConfig(heads=2, head_dim=64, double_blocks=1, single_blocks=2, text_width=64, guidance=False,
                          rope_axes=(16, 16, 16, 16))  # fmt: skip
MODELS = {"dev": DEV, "klein_base_9b": KLEIN_9B, "klein_base_4b": KLEIN_4B, "small": SMALL}
DIFFUSERS_TARGETS = (
    r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)|ff(_context)?\.linear_(in|out))"
    r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
)
DIFFUSERS_BLOCKS = ("transformer_blocks.", "single_transformer_blocks.")


def make_precision(storage: Storage | None, in_fp8: bool, cache_transposed: bool = False) -> Precision:
    """Return bfloat16 with the linear layers of the blocks in `storage`.

    Args:
        storage: Storage of the block linears; None keeps bfloat16.
        in_fp8: Whether FP8 layers multiply in FP8; INT8 layers always multiply in INT8.
        cache_transposed: Whether layers in 8 bits also keep their weights transposed.
    """
    matmul: Matmul = "auto" if storage != "fp8" else "fp8" if in_fp8 else "dequantized"
    return Precision(torch.bfloat16, storage, matmul=matmul, cache_transposed_weights=cache_transposed)


def random_weight(name: str, shape: torch.Size, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the weight of this name, scaled so that activations stay near one; vectors are ones."""
    if len(shape) == 1:
        return torch.ones(shape, device=device, dtype=dtype)
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator, device=device, dtype=dtype) * shape[1] ** -0.5


def random_transformer(
    config: TransformerConfig,
    precision: Precision,
    device: torch.device,
    host: Collection[str] = (),
    devices: Mapping[str, torch.device] | None = None,
) -> Transformer:
    """Return our transformer. At most one layer at a time exists both in full precision and quantized.

    Args:
        config: Sizes of the transformer.
        precision: Precision of its weights.
        device: Device on which the weights are drawn.
        host: Names of the blocks whose weights are moved to host memory.
        devices: Devices of the modules that are not on `device`.
    """
    device_of = device_chooser((), device, devices)
    with torch.device("meta"):
        model = Transformer(config).to(precision.dtype)
    convert(model, precision, device)
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            sizes = torch.Size((module.out_features, module.in_features))
            module.store(random_weight(f"{name}.weight", sizes, device_of(f"{name}."), precision.dtype))
        else:
            for leaf, old in list(module.named_parameters(recurse=False)):
                weight = random_weight(f"{name}.{leaf}", old.shape, device_of(f"{name}."), precision.dtype)
                setattr(module, leaf, nn.Parameter(weight, requires_grad=False))
        is_leaf = next(module.children(), None) is None
        if is_leaf and any(name.startswith(f"{block}.") for block in host):
            module.to("cpu")
    return model


def attach_adapter(model: Transformer, rank: int) -> None:
    """Attach a LoRA to the linear layers of the blocks, with neither factor zero."""
    adapters.attach(model, rank=rank)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = 0.1 * random_weight(name, parameter.shape, parameter.device, torch.float32)


def diffusers_transformer(
    config: TransformerConfig, weights: Mapping[str, Tensor] | None, device: torch.device, dtype: torch.dtype
) -> Any:
    """Return diffusers' transformer, frozen, with `weights` (by our names) or those of `random_transformer`."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Transformer(config).state_dict().items()}
        peer = Flux2Transformer2DModel(
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
    for name, shape in shapes.items():
        weight = random_weight(name, shape, device, dtype) if weights is None else weights[name]
        parts = transformer_tensor(name).split(weight)
        state |= {key: tensor.contiguous() for key, tensor in parts.items()}
    peer.load_state_dict(state, assign=True)
    return peer.requires_grad_(False)


def attach_peft_adapter(peer: Any, rank: int) -> None:
    """Attach the same LoRA with PEFT, in float32, q, k and v separate, and recompute every block in the backward."""
    peer.enable_gradient_checkpointing()
    peer.add_adapter(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=DIFFUSERS_TARGETS))
    for parameter in peer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def quantize_to_nf4(peer: nn.Module, device: torch.device) -> None:
    """Replace the block linears of diffusers' model by bitsandbytes' NF4 layers with double quantization."""
    for name, module in list(peer.named_modules()):
        if isinstance(module, nn.Linear) and name.startswith(DIFFUSERS_BLOCKS):
            layer = bitsandbytes.nn.Linear4bit(
                module.in_features, module.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4",
                device="meta",
            )  # fmt: skip
            layer.weight = bitsandbytes.nn.Params4bit(
                module.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
            ).to(device)
            parent, _, child = name.rpartition(".")
            setattr(peer.get_submodule(parent), child, layer)
    peer.is_loaded_in_4bit = True  # type: ignore[assignment]


class Inputs:
    """A random batch of one image, equal for equal shapes, and the step of either model on it.

    Args:
        config: Sizes of the transformer.
        side: Height and width of the latent grid.
        text: Number of prompt tokens.
        device: Device of the batch.
        dtype: dtype of the step: bfloat16 runs under autocast, float32 does not.
    """

    def __init__(
        self,
        config: TransformerConfig,
        side: int,
        text: int,
        device: torch.device,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        generator = torch.Generator().manual_seed(1)
        self.dtype = dtype
        self.tokens = torch.randn(1, side**2, config.channels, generator=generator).to(device)
        self.text = torch.randn(1, text, config.text_width, generator=generator).to(device)
        self.target = torch.randn(self.tokens.shape, generator=generator).to(device)
        self.timestep = torch.tensor([0.5], device=device)
        self.guidance = torch.ones(1, device=device) if config.guidance else None
        self.positions = image_positions(side, side, device=device)
        self.text_positions = text_positions(text, device)

    def predict(self, model: Any, is_peer: bool) -> Tensor:
        """Return the prediction of our model or, if `is_peer`, of diffusers'."""
        if not is_peer:
            return model(self.tokens, self.positions, self.text, self.text_positions, self.timestep, self.guidance)
        return model(
            hidden_states=self.tokens.to(self.dtype),
            encoder_hidden_states=self.text.to(self.dtype),
            timestep=self.timestep,
            img_ids=self.positions[None],
            txt_ids=self.text_positions[None],
            guidance=self.guidance,
            return_dict=False,
        )[0]

    def backward(self, model: Any, is_peer: bool = False) -> Tensor:
        """Run forward and backward, and return the loss."""
        with torch.autocast(self.tokens.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            loss = (self.predict(model, is_peer).float() - self.target).square().mean()
        loss.backward()
        return loss.detach()
