"""Start a new adapter at the values of a saved one of any format that `load` reads, or train it next to that one.

`start_from` trains the saved one further. Both are of one type. The saved one may have less than the new one: fewer
layers, a smaller rank, another alpha. The first prediction is still that of the saved one: the change of scale is
folded into one factor, and where the rank grows, the factors keep their new initialization, in which one of two is
zero, so that the other gets a gradient. Only the products that a new LoHa and LoKr begin with are not zero, and one of
their factors is padded with zeros.

`attach_frozen` leaves a saved LoRA as it is, active next to the new one: the new one learns what is missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import xxhash
from torch import Tensor, nn

from flux2.adapters import peft_config, tlora
from flux2.adapters.files import adapter_parameters, find
from flux2.adapters.formats import AdapterError
from flux2.adapters.loading import LoadedAdapter, attach_pairs
from flux2.adapters.reading import StoredAdapter, read_adapter
from flux2.adapters.tuners import adapter_layers, adapter_tensors
from flux2.layers.fused_lora import FROZEN, INITIAL
from flux2.models.transformer import Transformer
from flux2.utils.text import listed

# factors of low-rank products by the dimension that has the rank
ROWS = ("lora_A.weight", "hada_w1_b", "hada_w2_b", "lokr_w1_b", "lokr_w2_b")  # (rank, ...)
COLUMNS = ("lora_B.weight", "hada_w1_a", "hada_w2_a", "lokr_w1_a", "lokr_w2_a")  # (..., rank)
ZEROS = ("hada_w1_a", "lokr_w2_a")  # the columns that are padded with zeros
SCALED = ("hada_w1_a", "lokr_w1", "lokr_w1_a")  # the factor that a difference of scales is folded into
LORAS = {"LoRA", "rsLoRA"}  # types that differ only in scale
SAME_SETTINGS = "Set the adapter's settings as they were"


@dataclass(frozen=True)
class WarmStart:
    """The saved adapter that a new one started from."""

    adapter: LoadedAdapter
    digest: str  # of its type, layers and values, whatever the format of its file
    new_layers: int  # number of trained layers that it does not have


def start_from(model: nn.Module, path: str | Path, name: str = "default") -> WarmStart:
    """Set the attached adapter `name` to the values of the saved adapter at `path`, which may be whatever `load` reads.

    On a model on the meta device it only checks. Raises AdapterError, leaving the adapter unchanged, if the saved one
    cannot be read, is of another type, or has layers or ranks that the attached one does not.
    """
    model = transformer_in(model)
    current, layers = adapter_tensors(model, name), adapter_layers(model)
    with named_errors(path):
        stored = read_stored(model, path)
        check_type(stored, model, name)
        check_layers(stored, layers)
        scaled = rescaled(stored, {layer: getattr(layers[layer], "scaling", {}).get(name) for layer in stored.layers})
        if other := scaled.keys() - current.keys():
            raise AdapterError(f"it has {listed(other)}, which the new adapter does not. {SAME_SETTINGS}")
        values = {key: padded(key, tensor, current[key].detach()) for key, tensor in scaled.items()}
    for key, value in values.items():
        current[key].data.copy_(value)
    return WarmStart(described(stored), digest(stored), len(layers) - len(stored.layers))


def attach_frozen(model: nn.Module, path: str | Path, name: str = "default") -> WarmStart:
    """Add the saved LoRA at `path` to a model with the attached LoRA `name`, active and frozen.

    Raises AdapterError, leaving the model unchanged, if it cannot be read, or if one of both is no plain LoRA.
    """
    model = transformer_in(model)
    with named_errors(path):
        stored = read_stored(model, path)
        kinds = {type_of(model, name), stored.kind}
        if not kinds <= LORAS:
            raise AdapterError(
                f"adapter.init_mode=frozen adds up two LoRAs, and not a {' and a '.join(sorted(kinds - LORAS))}. Use "
                "adapter=lora or rslora next to a saved LoRA"
            )
        check_no_bias(stored)
    trained = adapter_parameters(model)
    attach_pairs(model, stored.pairs, FROZEN)
    for parameter in trained:
        parameter.requires_grad_(True)
    return WarmStart(described(stored), digest(stored), 0)


def transformer_in(model: nn.Module) -> Transformer:
    model = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    assert isinstance(model, Transformer)
    return model


@contextmanager
def named_errors(path: str | Path) -> Iterator[None]:
    """Context manager that raises ValueErrors as AdapterErrors that name the setting."""
    try:
        yield
    except ValueError as error:
        text = str(error).removeprefix(f"adapter {str(path)!r}: ")
        raise AdapterError(f"adapter.init={str(path)!r}: {text}") from error


def read_stored(model: Transformer, path: str | Path) -> StoredAdapter:
    """Return the saved adapter, checked against names and shapes of `model`."""
    with torch.device("meta"):
        skeleton = Transformer(model.config)  # the shapes of the weights, also if those are sharded
    return read_adapter(find(path), skeleton)


def described(stored: StoredAdapter) -> LoadedAdapter:
    return LoadedAdapter(stored.kind, stored.layers, stored.ranks, stored.note)


def type_of(model: Any, name: str) -> str:
    """Return the type of the attached adapter `name`."""
    if tlora.schedule_of(model) is not None:
        return "T-LoRA"
    return "PiSSA" if name + INITIAL in model.peft_config else peft_config.type_name(model.peft_config[name])


def check_no_bias(stored: StoredAdapter) -> None:
    if biased := [layer for layer, pair in stored.pairs.items() if pair.bias is not None]:
        raise AdapterError(f"it has biases ({listed(biased)}), which are not trained here")


def check_type(stored: StoredAdapter, model: Any, name: str) -> None:
    """Raise AdapterError unless the saved adapter is of the type of the new one; LoRA and rsLoRA differ in scale."""
    config, kind = model.peft_config[name], type_of(model, name)
    if stored.kind != kind and not {kind, stored.kind} <= LORAS:
        remedy = "A PiSSA begins at directions of the base. Use adapter=lora, also for a saved PiSSA"
        if kind != "PiSSA":
            named = stored.kind.replace("-", "").lower()
            remedy = f"Set adapter={named}" if named.isalpha() else "Its type is not trained here"
        raise AdapterError(f"it is a {stored.kind}, and the new adapter is a {kind}. {remedy}")
    if stored.schedule != tlora.schedule_of(model):
        raise AdapterError(f"its min_rank and exponent are others. {SAME_SETTINGS}")
    check_no_bias(stored)
    for key in ("use_cayley_neumann", "num_cayley_neumann_terms", "coft") if kind == "OFT" else ():
        was, now = getattr(stored.config, key), getattr(config, key)
        if was != now:
            raise AdapterError(f"its {key} is {was}, and the new adapter's is {now}. {SAME_SETTINGS}")


def check_layers(stored: StoredAdapter, layers: Mapping[str, Any]) -> None:
    """Raise AdapterError unless all layers of the saved adapter are trained."""
    if others := [layer for layer in stored.layers if layer not in layers]:
        raise AdapterError(f"adapter.targets does not have {len(others)} of its layers, {listed(others)}. Add them")


def rescaled(stored: StoredAdapter, scales: Mapping[str, float | None]) -> dict[str, Tensor]:
    """Return the saved tensors by PEFT's keys, such that with these `scales` of layers the update is the saved one."""
    tensors: dict[str, Tensor] = {}
    for layer, pair in stored.pairs.items():
        tensors[f"{layer}.lora_A.weight"] = pair.a
        tensors[f"{layer}.lora_B.weight"] = pair.b.float() / (scales[layer] or 1.0)
        if pair.magnitude is not None:
            tensors[f"{layer}.lora_magnitude_vector"] = pair.magnitude
    for layer, found in {} if stored.pairs else stored.tensors.items():
        for key, tensor in found.items():
            ratio = peft_config.layer_scale(stored.config, layer) / (scales[layer] or 1.0) if key in SCALED else 1.0
            tensors[f"{layer}.{key}"] = tensor.float() * ratio
    return tensors


def padded(key: str, tensor: Tensor, current: Tensor) -> Tensor:
    """Return `tensor` in the shape of `current`, on its device: more rows and columns are those of `current`."""
    dim = 0 if key.endswith(ROWS) else 1 if key.endswith(COLUMNS) else None
    missing = 0 if dim is None or tensor.ndim != current.ndim else current.shape[dim] - tensor.shape[dim]
    shape = [size - missing if i == dim else size for i, size in enumerate(current.shape)]
    if missing < 0:
        raise AdapterError(
            f"its rank is {tensor.shape[dim or 0]} in {key}, and the new adapter's {current.shape[dim or 0]}. Set "
            f"adapter.rank={tensor.shape[dim or 0]} or more, or reduce it first with python -m flux2.export --rank"
        )
    if list(tensor.shape) != shape:
        raise AdapterError(
            f"its {key} has shape {tuple(tensor.shape)}, and the new adapter's {tuple(current.shape)}. {SAME_SETTINGS}"
        )
    value = tensor.to(current.device, current.dtype)
    if dim is None or not missing:
        return value
    rest = current.narrow(dim, value.shape[dim], missing)
    return torch.cat([value, torch.zeros_like(rest) if key.endswith(ZEROS) else rest], dim)


def digest(stored: StoredAdapter) -> str:
    """Return a digest of the type, layers and values of a saved adapter, with scales of 1."""
    hashed = xxhash.xxh3_128(stored.kind.encode())
    for key, tensor in sorted(rescaled(stored, dict.fromkeys(stored.layers)).items()):
        hashed.update(f"{key} {tuple(tensor.shape)}".encode())
        hashed.update(tensor.float().contiguous().numpy().data)
    return hashed.hexdigest()
