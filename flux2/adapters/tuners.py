"""Attach a new adapter to a transformer, and detach it. PEFT computes each type; s = alpha / rank.

    LoRA    W + s B A                       rsLoRA: s = alpha / sqrt(rank)
    DoRA    the rows of W + s B A, each scaled to a trained length                          arxiv.org/abs/2402.09353
    PiSSA   W + s (B A - B0 A0), with s B0 A0 the best approximation of W of that rank      arxiv.org/abs/2404.02948
    LoHa    W + s (B1 A1) * (B2 A2), elementwise                                            arxiv.org/abs/2108.06098
    LoKr    W + s C (x) (B A), a Kronecker product                                          arxiv.org/abs/2309.14859
    OFT     W R, with R orthogonal in blocks                                                arxiv.org/abs/2306.07280

The base's weights never change, not even for PiSSA: PEFT subtracts B0 A0 from W, which is impossible for quantized
weights, rounds in bfloat16, and gives an adapter that needs that base. Here B0 A0 is a second adapter of PEFT, frozen,
with the opposite sign; `FusedLora` adds both such that nothing cancels:

    B A - B0 A0 = (B - B0) A + B0 (A - A0)

So a new adapter of any type changes nothing, bit for bit, in every precision, and `detach` returns the original base.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import peft
import torch
from peft.tuners.loha.layer import Linear as LohaLinear
from peft.tuners.lokr.layer import Linear as LokrLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.lycoris_utils import LycorisLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from flux2.adapters.formats import AdapterError
from flux2.adapters.settings import Targets, check_dropout, check_flag, check_integer, rank_arguments, target_layers
from flux2.layers.fused_lora import INITIAL, fuse_lora
from flux2.models.transformer import Transformer
from flux2.utils.text import listed

HOOK = "rank_schedule_hook"  # attribute of a transformer with a T-LoRA (flux2/adapters/tlora.py)


def layer_adapter_tensors(layer: Any) -> list[Tensor]:
    """Return the parameters and buffers of an adapted layer without those of its base layer."""
    base = layer.get_base_layer()
    base_ids = {id(tensor) for tensor in (*base.parameters(), *base.buffers())}
    return [tensor for tensor in (*layer.parameters(), *layer.buffers()) if id(tensor) not in base_ids]


def to_device(model: Transformer) -> None:
    """Move adapters to the device that computes; the layers of offloaded blocks themselves are in host memory."""
    for name, layer in adapter_layers(model).items():
        device = model.device_of(name)
        for tensor in layer_adapter_tensors(layer):
            if tensor.device != device:
                tensor.data = tensor.data.to(device)


class DrawFreeLoha(LohaLinear):
    """PEFT's LoHa layer without module dropout, which draws a random number at each call even if it is 0."""

    def train(self, mode: bool = True) -> DrawFreeLoha:
        return super().train(False)


class DrawFreeLokr(LokrLinear):
    """PEFT's LoKr layer without module dropout, like `DrawFreeLoha`; factors may have a first dimension of parts."""

    def train(self, mode: bool = True) -> DrawFreeLokr:
        return super().train(False)

    def get_delta_weight(self, adapter_name: str, *arguments: Any, **options: Any) -> Tensor:
        if adapter_name not in self.lokr_w1 or self.lokr_w1[adapter_name].ndim == 2:
            return super().get_delta_weight(adapter_name, *arguments, **options)
        w2 = self.lokr_w2.get(adapter_name)
        if w2 is None:
            w2 = self.lokr_w2_a[adapter_name] @ self.lokr_w2_b[adapter_name]
        products = [torch.kron(one, two) for one, two in zip(self.lokr_w1[adapter_name], w2, strict=True)]
        return torch.cat(products) * self.scaling[adapter_name]


def set_factors(layer: LokrLinear, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Give the adapter `name` of a LoKr layer these factors, of any shapes: PEFT creates only its own."""
    for side in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"):
        factors = getattr(layer, side)
        if name in factors:
            del factors[name]
        if side in tensors:
            factors[name] = nn.Parameter(tensors[side], requires_grad=False)


def disable_module_dropout(model: nn.Module) -> None:
    """Stop LoHa and LoKr layers from using the process's random numbers, in place."""
    draw_free: dict[type, type] = {LohaLinear: DrawFreeLoha, LokrLinear: DrawFreeLokr}
    for module in model.modules():
        if type(module) in draw_free:
            module.__class__ = draw_free[type(module)]
            module.train()


@torch.no_grad()
def initialize(layer: Any, name: str) -> None:
    """Draw the initial values again in float32: PEFT rounded them to the base's precision.

    The magnitudes of a DoRA are measured as the forward pass measures them, so that they divide to 1.
    """
    if isinstance(layer, LycorisLayer):
        layer.reset_adapter_parameters(name)
    if isinstance(layer, LoraLayer):
        layer.reset_lora_parameters(name, init_lora_weights=True)
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        if name in layer.lora_magnitude_vector:
            layer.lora_magnitude_vector[name].update_layer(
                base_layer=float_copy(layer, a.device), lora_A=a, lora_B=b, scaling=layer.scaling[name]
            )


def float_copy(layer: Any, device: torch.device) -> nn.Linear:
    """Return a layer with the base's weight in float32."""
    copy = nn.Linear(1, 1, bias=False, device="meta")
    copy.weight = nn.Parameter(layer.get_base_layer().weight.detach().float().to(device), requires_grad=False)
    return copy


def _attach(
    model: Transformer, config: peft.PeftConfig, seed: int, name: str, start: Callable[[Any, str], None] = initialize
) -> peft.PeftModel:
    """Wrap `model`, freeze it, and let `start` initialize each layer from `seed`."""
    trained = frozenset(key for key, parameter in model.named_parameters() if parameter.requires_grad)
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wrapped = peft.get_peft_model(model, config, adapter_name=name)
        for layer in adapter_layers(model).values():
            start(layer, name)
    vars(wrapped)["trained_before"] = trained
    fuse_lora(model)
    disable_module_dropout(model)
    to_device(model)
    return wrapped


def attach(
    model: Transformer,
    *,
    rank: int = 16,
    alpha: float | None = None,
    targets: Targets = "blocks",
    dropout: float = 0.0,
    rslora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    seed: int = 0,
    name: str = "default",
) -> peft.PeftModel:
    """Attach a new LoRA to `model`, in place; only its weights, in float32, require gradients.

    Return PEFT's wrapper around the same `model`; either can be used.

    Args:
        alpha: Scales the update by alpha / rank; by default the layer's rank, so that a learning rate means the same at
            every rank.
        targets: Presets (flux2/layers/selection.py) and regular expressions for whole layer names.
        dropout: Dropout of A's input.
        rslora: Whether to scale by alpha / sqrt(rank) instead.
        rank_pattern, alpha_pattern: Values for the layers that a target matches; each layer may match once.
        seed: Seed of A's initialization; B starts at zero, so a new adapter changes nothing, bit for bit.
    """
    ranks = rank_arguments(model, targets, rank, alpha, rank_pattern, alpha_pattern)
    return _attach(model, lora_config(ranks, dropout, rslora), seed, name)


def attach_dora(
    model: Transformer,
    *,
    rank: int = 16,
    alpha: float | None = None,
    targets: Targets = "blocks",
    dropout: float = 0.0,
    rslora: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    seed: int = 0,
    name: str = "default",
) -> peft.PeftModel:
    """Attach a new DoRA: a LoRA with a trained length for each row of the sum. Arguments and result as in `attach`."""
    ranks = rank_arguments(model, targets, rank, alpha, rank_pattern, alpha_pattern)
    return _attach(model, lora_config(ranks, dropout, rslora, use_dora=True), seed, name)


def lora_config(ranks: dict[str, Any], dropout: float = 0.0, rslora: bool = False, **settings: Any) -> peft.LoraConfig:
    """Return PEFT's configuration, which calls `alpha` `lora_alpha`."""
    settings |= {"lora_dropout": check_dropout("dropout", dropout), "use_rslora": check_flag("rslora", rslora)}
    return peft.LoraConfig(lora_alpha=ranks.pop("alpha"), **ranks, **settings)


def attach_pissa(
    model: Transformer,
    *,
    rank: int = 16,
    alpha: float | None = None,
    targets: Targets = "blocks",
    iterations: int | None = 16,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    seed: int = 0,
    name: str = "default",
) -> peft.PeftModel:
    """Attach a new PiSSA: a LoRA that starts at the weight's largest singular directions. The base does not change.

    It is saved as the equivalent plain LoRA of twice the rank.

    Args (others as in `attach`):
        iterations: Iterations of the randomized decomposition; null decomposes exactly, which takes minutes for large
            layers. Directions that are only nearly the largest cost little of the method's benefit.
    """
    if iterations is not None:
        check_integer("iterations", iterations)
    ranks = rank_arguments(model, targets, rank, alpha, rank_pattern, alpha_pattern)
    config = lora_config(ranks)
    method = "pissa" if iterations is None else f"pissa_niter_{iterations}"
    wrapped = _attach(model, config, seed, name, partial(init_pissa, method=method))
    with torch.random.fork_rng(devices=[]):
        wrapped.add_adapter(name + INITIAL, replace(config, target_modules=ranks["target_modules"]))
    for module in model.modules():
        if isinstance(module, LoraLayer):
            add_opposite(module, name)
    to_device(model)
    return wrapped


@torch.no_grad()
def init_pissa(layer: Any, name: str, method: str) -> None:
    """Run PEFT's initialization on a copy of the weight, which it would change."""
    initialize(layer, name)
    base = layer.base_layer
    if base.weight.is_meta:
        return
    layer.base_layer = float_copy(layer, layer.lora_A[name].weight.device)
    try:
        layer.pissa_init(name, method)
    finally:
        layer.base_layer = base


def add_opposite(layer: Any, name: str) -> None:
    """Make the second adapter of a PiSSA layer a frozen copy of the first with the opposite sign; both are active."""
    layer.scaling[name + INITIAL] = -layer.scaling[name]
    layer.set_adapter([name, name + INITIAL])
    for side in (layer.lora_A, layer.lora_B):
        side[name + INITIAL].weight.data = side[name].weight.detach().clone()
        side[name].requires_grad_(True)
        side[name + INITIAL].requires_grad_(False)


def attach_loha(
    model: Transformer,
    *,
    rank: int = 8,
    alpha: float | None = None,
    targets: Targets = "blocks",
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    seed: int = 0,
    name: str = "default",
) -> peft.PeftModel:
    """Attach a new LoHa: the elementwise product of two pairs, of up to `rank` squared. Arguments as in `attach`."""
    config = peft.LoHaConfig(**rank_arguments(model, targets, rank, alpha, rank_pattern, alpha_pattern))
    return _attach(model, config, seed, name)


def attach_lokr(
    model: Transformer,
    *,
    rank: int = 8,
    alpha: float | None = None,
    targets: Targets = "blocks",
    decompose_factor: int = -1,
    decompose_both: bool = False,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    seed: int = 0,
    name: str = "default",
) -> peft.PeftModel:
    """Attach a new LoKr: a Kronecker product of a small matrix and a larger one of low rank.

    Args (others as in `attach`):
        rank: Rank of the larger matrix, which is a full matrix from half of its longer side.
        decompose_factor: Largest side of the small matrix; -1: the divisor nearest to the square root of the layer's.
        decompose_both: Whether the small matrix has that rank too.
    """
    if decompose_factor != -1:
        check_integer("decompose_factor", decompose_factor, 2)
    config = peft.LoKrConfig(
        **rank_arguments(model, targets, rank, alpha, rank_pattern, alpha_pattern, any_rank=True),
        decompose_factor=decompose_factor,
        decompose_both=check_flag("decompose_both", decompose_both),
    )
    return _attach(model, config, seed, name)


def attach_oft(
    model: Transformer,
    *,
    block_size: int = 32,
    targets: Targets = "blocks",
    block_share: bool = False,
    exact: bool = False,
    seed: int = 0,
    name: str = "default",
) -> peft.PeftModel:
    """Attach a new OFT: each layer's input is rotated in blocks of `block_size` features.

    Args (others as in `attach`):
        block_size: Features per block; must divide the input features of every layer.
        block_share: Whether all blocks of a layer share one rotation.
        exact: Whether rotations come from a solved system (Cayley) instead of five terms of its series, which are
            nearly orthogonal.
    """
    check_integer("block_size", block_size, 2)
    layers = target_layers(model, targets)
    for layer in layers:
        width = model.get_submodule(layer).in_features
        if width % block_size:  # type: ignore[operator]
            raise AdapterError(
                f"adapter.block_size={block_size} does not divide the {width} input features of {layer}. Use a size "
                "that divides those of all layers in adapter.targets"
            )
    config = peft.OFTConfig(
        r=0,
        oft_block_size=block_size,
        target_modules=layers,
        block_share=check_flag("block_share", block_share),
        use_cayley_neumann=not check_flag("exact", exact),
    )
    return _attach(model, config, seed, name)


def adapter_layers(model: nn.Module) -> dict[str, Any]:
    """Return the layers of `model` that have adapters, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def adapter_tensors(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Return the weights of the adapter `name`, trained or not, by PEFT's keys without its prefix."""
    tensors = {}
    for layer, module in adapter_layers(model).items():
        for key, parameter in module.named_parameters():
            part = f".{key}.".replace(f".{name}.", ".", 1)
            if not key.startswith("base_layer.") and part != f".{key}.":
                part = part.rstrip(".").replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
                tensors[layer + part] = parameter
    return tensors


def kind_of(layer: Any) -> str:
    """Return the type of a layer's adapters; rsLoRA and PiSSA count as LoRA."""
    if getattr(layer, "rank_schedule", None) is not None:
        return "T-LoRA"
    if isinstance(layer, LoraLayer):
        return "DoRA" if len(layer.lora_magnitude_vector) else "LoRA"
    return "LoHa" if isinstance(layer, LohaLinear) else "LoKr" if isinstance(layer, LokrLinear) else "OFT"


def remove_adapters(model: nn.Module) -> None:
    """Replace layers that have adapters by the base's layers."""
    for name in adapter_layers(model):
        restore_layer(model, name)
    for strength in vars(model).pop("adapter_strengths", {}).values():  # flux2/adapters/strengths.py
        strength.close()
    if hasattr(model, "peft_config"):
        del model.peft_config
    if HOOK in vars(model):
        vars(model).pop(HOOK).remove()


def restore_layer(model: nn.Module, name: str) -> None:
    """Replace the layer `name`, which has adapters, by the base's layer."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, model.get_submodule(name).get_base_layer())  # type: ignore[operator]


def detach(wrapped: peft.PeftModel) -> Transformer:
    """Return the base in `wrapped` as it was before an adapter was attached: layers, bits, `requires_grad`.

    `wrapped` cannot be used afterwards. Offloaded blocks stay offloaded. Raises AdapterError, leaving `wrapped`
    unchanged, if an adapter was merged into the weights.
    """
    model = wrapped.get_base_model()
    assert isinstance(model, Transformer)
    if merged := [name for name, module in adapter_layers(model).items() if module.merged]:
        raise AdapterError(f"the base cannot be restored: an adapter is merged into {listed(merged)}")
    remove_adapters(model)
    trained = vars(wrapped).get("trained_before", frozenset())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return model
