"""Load saved adapters into a transformer for inference, in addition to those that it has.

Low-rank pairs (`attach_pairs`) add up, each with its scale. The other types are computed by PEFT (`insert`);
`check_compatible` knows which of them add up.
"""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import peft
import torch
import torch.nn.functional as F
from peft.tuners.lokr.layer import Linear as LokrLinear
from peft.tuners.lora.dora import DoraLinearLayer
from torch import Tensor, nn

from flux2.adapters import peft_config
from flux2.adapters.formats import AdapterError, LoraPair, rescale
from flux2.adapters.keys import check_dtype
from flux2.adapters.peft_config import PEFT_CONFIG
from flux2.adapters.strengths import AdapterStrength, Ranges, strengths
from flux2.adapters.tuners import (
    adapter_layers,
    adapter_tensors,
    disable_module_dropout,
    kind_of,
    remove_adapters,
    restore_layer,
    set_factors,
    to_device,
)
from flux2.layers.fused_lora import FROZEN, fuse_lora
from flux2.layers.selection import layer_kinds
from flux2.models.transformer import Transformer
from flux2.models.variants import TransformerConfig
from flux2.utils.text import listed

SAME_LAYERS = {"rsLoRA": "LoRA", "column DoRA": "DoRA", "split LoKr": "LoKr"}  # types, and those of their layers
NO_RANGES = Ranges()
PARTS = {"double_blocks": "in double blocks", "single_blocks": "in single blocks"}


@dataclass(frozen=True)
class LoadedAdapter:
    """Type, layers and ranks of an adapter that was loaded into the model."""

    kind: str
    layers: tuple[str, ...]
    ranks: tuple[int, ...] = ()
    note: str = ""  # what is not certain
    name: str = ""  # in the model
    path: str = ""  # as it was given
    scale: float = 1.0
    ranges: str = ""  # factors on the scale (flux2/adapters/strengths.py)

    def __str__(self) -> str:
        size = f" of {describe_ranks(self.ranks)}" if self.ranks else ""
        parts = Counter(PARTS.get(layer.partition(".")[0], "outside of blocks") for layer in self.layers)
        spread = ", ".join(f"{count} {part}" for part, count in parts.items())
        note = f"; {self.note}" if self.note else ""
        return f"{self.kind}{size} on {len(self.layers)} layers ({spread}){note}"

    def listing(self) -> str:
        """Return its layers, with block numbers replaced by N."""
        return layer_kinds(self.layers)


def describe_ranks(ranks: Iterable[int]) -> str:
    ordered = sorted(ranks)
    return f"rank {ordered[0]}" if ordered[0] == ordered[-1] else f"ranks {ordered[0]} to {ordered[-1]}"


def check_compatible(model: nn.Module, kind: str) -> None:
    """Raise AdapterError unless an adapter of type `kind` adds up with those that `model` has.

    Low-rank pairs add up, and so do LoHas, and LoKrs. A DoRA divides by row lengths and an OFT rotates the input, so
    with other adapters the result would depend on the order; different types cannot share layers in PEFT.
    """
    present = {kind_of(module) for module in adapter_layers(model).values()}
    kind = SAME_LAYERS.get(kind, kind)
    if present and (present != {kind} or kind in ("DoRA", "OFT", "T-LoRA")):
        raise AdapterError(
            f"a {kind} adapter cannot be combined with the loaded {' and '.join(sorted(present))}: only several LoRAs "
            "(rsLoRA and PiSSA included), several LoHas or several LoKrs add up. Merge the first into the base, or "
            "load only one"
        )


def attach_pairs(
    model: Transformer, pairs: Mapping[str, LoraPair], name: str, scale: float = 1.0, ranges: Ranges = NO_RANGES
) -> None:
    """Add an adapter of these pairs to `model`, in place, active and frozen."""
    insert(model, *to_peft(pairs), name, scale, ranges)


def to_peft(pairs: Mapping[str, LoraPair]) -> tuple[peft.LoraConfig, dict[str, Tensor]]:
    """Return PEFT's configuration and tensors, without its prefix, of pairs whose scales are folded into B."""
    ranks = {layer: pair.a.shape[0] for layer, pair in pairs.items()}
    config = peft.LoraConfig(
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),
        target_modules=list(ranks),
        rank_pattern={re.escape(layer): rank for layer, rank in ranks.items()},
        alpha_pattern={re.escape(layer): rank for layer, rank in ranks.items()},
        use_dora=any(pair.magnitude is not None for pair in pairs.values()),
        lora_bias=any(pair.bias is not None for pair in pairs.values()),
    )
    state: dict[str, Tensor] = {}
    for layer, pair in pairs.items():
        state |= {f"{layer}.lora_A.weight": pair.a, f"{layer}.lora_B.weight": pair.b}
        if pair.magnitude is not None:
            state[f"{layer}.lora_magnitude_vector"] = pair.magnitude
        if config.lora_bias:
            state[f"{layer}.lora_B.bias"] = torch.zeros(len(pair.b)) if pair.bias is None else pair.bias
    return config, state


def insert(
    model: Transformer,
    config: peft.PeftConfig,
    state: Mapping[str, Tensor],
    name: str,
    scale: float,
    ranges: Ranges = NO_RANGES,
) -> None:
    """Add an adapter with the tensors `state`, by PEFT's keys without its prefix, in place, active and frozen."""
    inject(model, config, name)
    device = model.img_in.weight.device  # not the layer's own: offloaded blocks are in host memory
    fill_adapter(model, name, state, device)
    for module in adapter_layers(model).values():
        if name in getattr(module, "lora_magnitude_vector", {}):
            magnitude = module.lora_magnitude_vector[name]
            magnitude.__class__ = ScaledDora if magnitude.weight.ndim == 1 else ColumnDora
    strengths(model)[name] = AdapterStrength(model, name, scale, ranges)
    fuse_lora(model)
    to_device(model)
    activate_all(model)


def activate_all(model: nn.Module) -> None:
    """Make all adapters of each layer active, in the order in which they were added, and frozen."""
    for module in adapter_layers(model).values():
        module.set_adapter(sorted(module._get_available_adapters(), key=list(module.r).index))
    model.requires_grad_(False)


def unload(model: Transformer, name: str) -> None:
    """Remove a loaded adapter, in place. Layers without another one are those of the base again."""
    strengths(model).pop(name).close()
    if list(model.peft_config) == [name]:  # type: ignore[arg-type]
        remove_adapters(model)
        return
    del model.peft_config[name]  # type: ignore[operator, union-attr]
    for layer, module in adapter_layers(model).items():
        if module._get_available_adapters() == {name}:
            restore_layer(model, layer)
        elif name in module._get_available_adapters():
            module.delete_adapter(name)
    activate_all(model)


def fill_adapter(model: nn.Module, name: str, state: Mapping[str, Tensor], device: torch.device) -> None:
    """Put tensors by PEFT's keys into the adapter `name` that PEFT created, in place."""
    for layer, module in adapter_layers(model).items():
        if isinstance(module, LokrLinear) and name in module.r:
            set_factors(module, name, {key.removeprefix(f"{layer}."): tensor for key, tensor in state.items()})
    for key, parameter in adapter_tensors(model, name).items():
        parameter.data = state[key].to(device, torch.float32)
    disable_module_dropout(model)


def inject(model: nn.Module, config: peft.PeftConfig, name: str) -> None:
    """Let PEFT create the layers, without its random numbers and its warning about a second adapter."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        warnings.filterwarnings("ignore", message=".*lora_bias=True")  # that it cannot be merged is said when merging
        peft.inject_adapter_in_model(config, model, adapter_name=name)


class ScaledDora(DoraLinearLayer):
    """PEFT's DoRA with its change of the layer's output, including the magnitude's, multiplied by `strength`."""

    strength = 1.0

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(*args, **kwargs) * self.strength


class ColumnDora(ScaledDora):
    """A DoRA whose magnitudes are the lengths of the columns of each part of the layer (`formats.rescale`)."""

    def forward(self, x: Tensor, **given: Any) -> Tensor:
        weight = given["base_layer"].weight.float()
        delta = given["scaling"] * (given["lora_B"].weight @ given["lora_A"].weight)
        changed = rescale(weight + delta, self.weight)
        return F.linear(x, (changed - weight).to(x.dtype)) * self.strength


@contextmanager
def scaled(model: nn.Module, scale: float) -> Iterator[None]:
    """Context manager in which the updates of the adapters of `model`, but not a frozen one, are multiplied by `scale`.

    Raise AdapterError for an adapter without scale.
    """
    layers = adapter_layers(model).values()
    for kind in sorted({kind_of(module) for module in layers}):
        check_scale(kind, scale)
    names = dict.fromkeys(name for module in layers for name in getattr(module, "scaling", {}) if name != FROZEN)
    vectors = [vector for module in layers for vector in getattr(module, "lora_magnitude_vector", {}).values()]
    trained = [vector for vector in vectors if type(vector) is DoraLinearLayer]
    for vector in trained:
        vector.__class__ = ScaledDora
    held = [AdapterStrength(model, name, 1.0, NO_RANGES) for name in names]
    try:
        for one in held:
            one.scale = scale
            one.apply()
        yield
    finally:
        for one in held:
            one.scale = 1.0
            one.apply()
        for vector in trained:
            vector.__class__ = DoraLinearLayer


def check_scale(kind: str, scale: float, ranges: str = "") -> None:
    """Raise AdapterError for a scale other than 1, or ranges, of a type without scale."""
    if kind == "OFT" and (scale != 1 or ranges):
        what = f"ranges={ranges}" if ranges else f"scale={scale:g}"
        raise AdapterError(f"{what}: an OFT adapter rotates the layers' inputs and has no scale. Use 1")


def check_saved(
    sizes: TransformerConfig, config: peft.PeftConfig, state: Mapping[str, Tensor]
) -> tuple[peft.PeftConfig, dict[str, dict[str, Tensor]]]:
    """Return a new configuration for the adapter in a PEFT folder, and its tensors by layer and the rest of the key.

    Raises AdapterError if a tensor has non-finite values, belongs to no layer of a model of these `sizes`, has another
    shape than the layer and the configuration give, or is missing or unknown.
    """
    kind, name = peft_config.type_name(config), "default"
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        check_dtype(key, tensor)
        if not bool(torch.isfinite(tensor.float()).all()):
            raise AdapterError(f"{key} has NaN or infinite values: its training failed")
        layer = re.sub(r"\.(lora|hada|lokr|oft)_\w+(\.weight)?$", "", key)
        layers.setdefault(layer, {})[key.removeprefix(f"{layer}.")] = tensor
    with torch.device("meta"):
        skeleton = Transformer(sizes)
    linears = {layer for layer, module in skeleton.named_modules() if isinstance(module, nn.Linear)}
    if not layers:
        raise AdapterError("it holds no tensors")
    if unknown := layers.keys() - linears:
        raise AdapterError(f"the adapter has layers that this model does not: {listed(unknown)}")
    clean = peft_config.minimal_config(config, list(layers))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # PEFT changes sizes that do not fit, and warns
            inject(skeleton, clean, name)
    except (ValueError, TypeError, RuntimeError, UserWarning) as error:
        raise AdapterError(f"PEFT cannot create the {kind} that its {PEFT_CONFIG} describes ({error})") from error
    wanted = adapter_tensors(skeleton, name)
    if wanted.keys() != state.keys():
        kinds = {"missing": wanted.keys() - state.keys(), "unknown": state.keys() - wanted.keys()}
        text = "; ".join(f"{word} {listed(keys)}" for word, keys in kinds.items() if keys)
        raise AdapterError(f"its tensors are not those of the {kind} that its {PEFT_CONFIG} describes: {text}")
    for key, tensor in state.items():
        if tensor.shape != wanted[key].shape:
            raise AdapterError(
                f"{key} has shape {tuple(tensor.shape)} instead of {tuple(wanted[key].shape)}, which follows from the "
                f"model and its {PEFT_CONFIG}. Use the base it was trained on, and files of one adapter"
            )
    return clean, layers
