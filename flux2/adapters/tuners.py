"""Attach a fresh adapter to a transformer, and take it off again. PEFT computes each type; s = alpha / rank.

    LoRA    W + s B A                       rsLoRA: s = alpha / sqrt(rank)
    DoRA    the rows of W + s B A, each brought to a length of its own, which is trained    arxiv.org/abs/2402.09353
    PiSSA   W + s (B A - B0 A0), with s B0 A0 the best approximation of W of that rank      arxiv.org/abs/2404.02948
    LoHa    W + s (B1 A1) * (B2 A2), elementwise                                            arxiv.org/abs/2108.06098
    LoKr    W + s C (x) (B A), a Kronecker product                                          arxiv.org/abs/2309.14859
    OFT     W R, with R orthogonal in blocks                                                arxiv.org/abs/2306.07280

The base's weights are never changed, PiSSA's neither: PEFT subtracts B0 A0 from W, which no quantized weight can take,
which rounds in bfloat16, and which leaves an adapter that needs that base. Here B0 A0 is a second adapter of PEFT's,
frozen, with the opposite sign; `FusedLora` adds up both so that nothing cancels:

    B A - B0 A0 = (B - B0) A + B0 (A - A0)

So a fresh adapter of every type changes nothing, bit for bit, on every precision, and `detach` gives the base back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import peft
import torch
from peft.tuners.loha.layer import Linear as LohaLinear
from peft.tuners.lokr.layer import Linear as LokrLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from flux2.adapters.formats import AdapterError
from flux2.adapters.settings import Targets, check_dropout, check_flag, check_integer, rank_arguments, target_layers
from flux2.layers.fused_lora import INITIAL, fuse_lora
from flux2.models.transformer import Transformer
from flux2.utils.text import listed

Initializer = Callable[[Any, str], None]

# ------------------------------------------------------------------ attaching


def _attach(model: Transformer, config: peft.PeftConfig, start: Initializer, seed: int, name: str) -> peft.PeftModel:
    """Wrap `model`, freeze it, and let `start` draw each layer's beginning from `seed`."""
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


def layer_adapter_tensors(layer: Any) -> list[Tensor]:
    """What of a layer that carries adapters is theirs: its parameters and buffers without the base's."""
    base = layer.get_base_layer()
    within = {id(tensor) for tensor in (*base.parameters(), *base.buffers())}
    return [tensor for tensor in (*layer.parameters(), *layer.buffers()) if id(tensor) not in within]


def to_device(model: Transformer) -> None:
    """Bring adapters to where `model` computes: of blocks that stream the layers themselves lie in host memory."""
    device = model.img_in.weight.device
    for layer in adapter_layers(model).values():
        for tensor in layer_adapter_tensors(layer):
            if tensor.device != device:
                tensor.data = tensor.data.to(device)


class DrawFreeLoha(LohaLinear):
    """PEFT's LoHa layer without module dropout, for which it draws a number at each call, be it 0 or not."""

    def train(self, mode: bool = True) -> DrawFreeLoha:
        return super().train(False)


class DrawFreeLokr(LokrLinear):
    """PEFT's LoKr layer, likewise."""

    def train(self, mode: bool = True) -> DrawFreeLokr:
        return super().train(False)


def disable_module_dropout(model: nn.Module) -> None:
    """Let LoHa and LoKr layers take nothing from the process's random numbers, in place."""
    for module in model.modules():
        if type(module) is LohaLinear:
            module.__class__ = DrawFreeLoha
        elif type(module) is LokrLinear:
            module.__class__ = DrawFreeLokr
        if isinstance(module, DrawFreeLoha | DrawFreeLokr):
            module.train()


# PEFT rounds what it drew to the base's precision: these draw again, so that all precisions start alike


def init_lora(layer: Any, name: str) -> None:
    layer.lora_A[name].float()
    layer.lora_B[name].float()
    layer.reset_lora_parameters(name, init_lora_weights=True)


@torch.no_grad()
def init_dora(layer: Any, name: str) -> None:
    """As LoRA; the lengths are those of the base's rows, as the forward will measure them, so that they divide to 1."""
    init_lora(layer, name)
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    layer.lora_magnitude_vector[name].update_layer(
        base_layer=float_copy(layer, a.device), lora_A=a, lora_B=b, scaling=layer.scaling[name]
    )


def init_product(layer: Any, name: str) -> None:
    """LoHa and LoKr."""
    for kind in layer.adapter_layer_names:
        parameters = getattr(layer, kind)
        if name in parameters:
            parameters[name].data = parameters[name].data.float()
    layer.reset_adapter_parameters(name)


def init_oft(layer: Any, name: str) -> None:
    layer.oft_R[name].weight.data = layer.oft_R[name].weight.data.float()
    layer.reset_oft_parameters(name, True)


def float_copy(layer: Any, device: torch.device) -> nn.Linear:
    """A layer with the base's weight in float32."""
    copy = nn.Linear(1, 1, bias=False, device="meta")
    copy.weight = nn.Parameter(layer.get_base_layer().weight.detach().float().to(device), requires_grad=False)
    return copy


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
    """Attach a fresh LoRA to `model`, in place; its weights are float32 and alone require gradients.

    Args:
        rank: of every pair.
        alpha: the update is scaled by alpha / rank; the layer's rank by default, so that the learning rate means the
            same at every rank.
        targets: presets (flux2/layers/selection.py) and regular expressions for whole layer names.
        dropout: on the input of A.
        rslora: scale by alpha / sqrt(rank) instead.
        rank_pattern, alpha_pattern: targets to numbers that hold for their layers instead; each layer at most once.
        seed: of A's initialization; B starts at zero, so a fresh adapter changes nothing, bit for bit.

    Returns:
        PEFT's wrapper around the same `model`; use either.
    """
    return _lora(model, rank, alpha, targets, dropout, rank_pattern, alpha_pattern, seed, name, rslora=rslora)


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
    """Attach a fresh DoRA: a LoRA, and a length for each row of the sum. Arguments and result as in `attach`."""
    return _lora(model, rank, alpha, targets, dropout, rank_pattern, alpha_pattern, seed, name, rslora, dora=True)


def _lora(
    model: Transformer,
    rank: int,
    alpha: float | None,
    targets: Targets,
    dropout: float,
    rank_pattern: Mapping[str, int] | None,
    alpha_pattern: Mapping[str, float] | None,
    seed: int,
    name: str,
    rslora: bool,
    dora: bool = False,
) -> peft.PeftModel:
    check_dropout("dropout", dropout)
    check_flag("rslora", rslora)
    given = rank_arguments(model, targets, rank, alpha, rank_pattern, alpha_pattern)
    given["lora_alpha"] = given.pop("alpha")
    config = peft.LoraConfig(**given, lora_dropout=dropout, use_rslora=rslora, use_dora=dora)
    return _attach(model, config, init_dora if dora else init_lora, seed, name)


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
    """Attach a fresh PiSSA: a LoRA that starts at the weight's own largest directions. The base stays as it is.

    Args:
        iterations: of the randomized decomposition that finds them; null decomposes exactly, which takes minutes for
            large layers. Where they are only nearly the largest, nothing is lost but a little of the method's point.

    Others and the result as in `attach`. It is saved as the plain LoRA of twice the rank that it amounts to.
    """
    if iterations is not None:
        check_integer("iterations", iterations)
    given = rank_arguments(model, targets, rank, alpha, rank_pattern, alpha_pattern)
    layers = given["target_modules"]
    given["lora_alpha"] = given.pop("alpha")
    config = peft.LoraConfig(**given)
    method = "pissa" if iterations is None else f"pissa_niter_{iterations}"
    wrapped = _attach(model, config, lambda layer, name: init_pissa(layer, name, method), seed, name)
    with torch.random.fork_rng(devices=[]):
        wrapped.add_adapter(name + INITIAL, replace(config, target_modules=layers))
    for module in model.modules():
        if isinstance(module, LoraLayer):
            add_opposite(module, name)
    to_device(model)
    return wrapped


@torch.no_grad()
def init_pissa(layer: Any, name: str, method: str) -> None:
    """PEFT's initialization, against a copy of the weight: it would change the weight itself."""
    init_lora(layer, name)
    base, weight = layer.base_layer, layer.base_layer.weight
    if weight.is_meta:
        return
    layer.base_layer = float_copy(layer, layer.lora_A[name].weight.device)
    try:
        layer.pissa_init(name, method)
    finally:
        layer.base_layer = base


def add_opposite(layer: Any, name: str) -> None:
    """Let the second adapter of a PiSSA layer be what the first is now, frozen, with the opposite sign; both active."""
    for side in (layer.lora_A, layer.lora_B):
        side[name + INITIAL].weight.data = side[name].weight.detach().clone()
    layer.scaling[name + INITIAL] = -layer.scaling[name]
    layer.set_adapter([name, name + INITIAL])
    for side in (layer.lora_A, layer.lora_B):
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
    """Attach a fresh LoHa: the elementwise product of two pairs, of a rank of up to `rank` squared.

    Arguments and result as in `attach`.
    """
    config = peft.LoHaConfig(**rank_arguments(model, targets, rank, alpha, rank_pattern, alpha_pattern))
    return _attach(model, config, init_product, seed, name)


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
    """Attach a fresh LoKr: a Kronecker product of a small matrix and a larger one of low rank.

    Args:
        rank: of the larger matrix, which is whole from half of its longer side on.
        decompose_factor: sides of the small matrix at most; -1: as near to the square root of the layer's as divides.
        decompose_both: let the small matrix be of that rank too.

    Others and the result as in `attach`.
    """
    if decompose_factor != -1:
        check_integer("decompose_factor", decompose_factor, 2)
    config = peft.LoKrConfig(
        **rank_arguments(model, targets, rank, alpha, rank_pattern, alpha_pattern, any_rank=True),
        decompose_factor=decompose_factor,
        decompose_both=check_flag("decompose_both", decompose_both),
    )
    return _attach(model, config, init_product, seed, name)


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
    """Attach a fresh OFT: each layer's input is rotated in blocks of `block_size` features.

    Args:
        block_size: must divide the input features of every layer.
        block_share: one rotation for all blocks of a layer.
        exact: rotations by a solved system (Cayley) instead of five terms of its series, which are nearly orthogonal.

    Others and the result as in `attach`.
    """
    check_integer("block_size", block_size, 2)
    layers = target_layers(model, targets)
    for layer in layers:
        width = model.get_submodule(layer).in_features
        if width % block_size:  # type: ignore[operator]
            raise AdapterError(
                f"adapter.block_size={block_size} does not divide the {width} input features of {layer}: give a size "
                "that divides those of all layers in adapter.targets"
            )
    config = peft.OFTConfig(
        r=0,
        oft_block_size=block_size,
        target_modules=layers,
        block_share=check_flag("block_share", block_share),
        use_cayley_neumann=not check_flag("exact", exact),
    )
    return _attach(model, config, init_oft, seed, name)


# ------------------------------------------------------------------ taking off


def adapter_layers(model: nn.Module) -> dict[str, Any]:
    """The layers of `model` that carry adapters, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def remove_adapters(model: nn.Module) -> None:
    """Put the base's layers back in place of those that carry adapters."""
    for name, module in adapter_layers(model).items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


def detach(wrapped: peft.PeftModel) -> Transformer:
    """The base within `wrapped` as it was before an adapter was attached: its layers, their bits, what requires
    gradients. `wrapped` is of no use then. Blocks that stream go on streaming.

    Raises AdapterError if an adapter was merged into the weights; `wrapped` is then as it was.
    """
    model = wrapped.get_base_model()
    assert isinstance(model, Transformer)
    merged = [name for name, module in adapter_layers(model).items() if module.merged]
    if merged:
        raise AdapterError(f"the base cannot be given back: an adapter is merged into {listed(merged)}")
    remove_adapters(model)
    trained = vars(wrapped).get("trained_before", frozenset())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return model
