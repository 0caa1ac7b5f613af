"""Adapters: what they are in a model, and their files, in PEFT's form and in those of diffusers and ComfyUI.

PEFT is the adapter library. The types are attached in `adapter_types`, `adapter_formats` speaks the other formats, and
this module saves, loads, merges and restores. LoRA, rsLoRA and PiSSA are low-rank pairs, which all formats hold; a DoRA
is a pair and lengths, which PEFT and diffusers hold; LoHa, LoKr and OFT are PEFT's alone.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import peft
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from flux2 import checks, peft_config
from flux2.adapter_formats import AdapterError, Pair, from_state, to_comfyui, to_diffusers
from flux2.adapter_types import attach, detach, target_layers
from flux2.layers import BLOCK_LINEARS
from flux2.linear import fuse_lora
from flux2.model import Transformer
from flux2.names import listed
from flux2.quantised import QuantisedLinear

__all__ = [
    "BLOCK_LINEARS",
    "AdapterError",
    "Pair",
    "adapter_parameters",
    "attach",
    "attach_pairs",
    "detach",
    "disabled",
    "find",
    "from_state",
    "layer_pairs",
    "load",
    "merge",
    "restore",
    "save",
    "target_layers",
    "to_comfyui",
    "to_diffusers",
]

PEFT_FILE = "adapter_model.safetensors"
DIFFUSERS_FILE = "diffusers.safetensors"

# ------------------------------------------------------------------ in a model


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that training moves."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Within this context `model` computes as if it had no adapters, bit for bit."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    before = [(layer, layer._disable_adapters) for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, value in before:
            layer._disable_adapters = value


def layer_pairs(model: nn.Module, name: str = "default") -> dict[str, Pair]:
    """The adapter called `name`, layer by layer under our names, in float32 on the CPU."""
    pairs = {}
    for layer, module in model.named_modules():
        if isinstance(module, LoraLayer) and name in module.lora_A:
            a, b = module.lora_A[name].weight, module.lora_B[name].weight
            pairs[layer] = Pair(a.detach().float().cpu(), b.detach().float().cpu() * module.scaling[name])
    return pairs


# ------------------------------------------------------------------ files


def save(wrapped: peft.PeftModel, folder: Path, *, base: str, licence: str = "", name: str = "default") -> None:
    """Write the adapter in PEFT's form (adapter_model.safetensors, adapter_config.json) and diffusers.safetensors.

    Args:
        folder: made if absent; each file is complete or absent, never half written, and where adapter_model.safetensors
            is, the others are too.
        base: the model that the adapter was trained on: a variant's name.
        licence: of the base model where it restricts the use of the adapter; kept in the file's metadata.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wrapped.peft_config[name].base_model_name_or_path = base
    metadata = {"format": "pt", "base_model": base} | ({"base_model_license": licence} if licence else {})
    with tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as scratch:
        # without the False, PEFT would look the base model up on the Hub to see whether embeddings were resized
        wrapped.save_pretrained(scratch, selected_adapters=[name], save_embedding_layers=False)
        written = Path(scratch) if name == "default" else Path(scratch) / name  # PEFT's own choice
        (written / "README.md").write_text(adapter_card(base, licence))  # in place of PEFT's empty form
        save_file(to_diffusers(layer_pairs(wrapped.get_base_model(), name)), written / DIFFUSERS_FILE, metadata)
        (folder / PEFT_FILE).unlink(missing_ok=True)  # of an earlier adapter: while it is there, all files are its own
        files = [path for path in written.iterdir() if path.is_file()]
        readable = (written / "README.md").stat().st_mode  # as the umask says; safetensors writes for the owner alone
        for file in files:
            file.chmod(readable)
        for file in sorted(files, key=lambda path: path.name == PEFT_FILE):
            file.replace(folder / file.name)


def adapter_card(base: str, licence: str) -> str:
    """The README.md of a saved adapter, with the metadata that the Hub reads."""
    hub = f"base_model: {base}\n" if "/" in base else ""
    terms = f"\nThe base model's licence, {licence}, applies to what is made with this adapter.\n" if licence else ""
    return (
        f"---\n{hub}tags:\n- lora\n- flux2\n---\n# LoRA for {base}\n{terms}\n"
        f"- `{PEFT_FILE}`, `adapter_config.json`: PEFT, layers named as Black Forest Labs names them\n"
        f'- `{DIFFUSERS_FILE}`: for diffusers\' `pipeline.load_lora_weights(folder, weight_name="{DIFFUSERS_FILE}")`\n'
        "\n`python -m flux2.generate --prompt ... --adapter FOLDER` makes pictures with it.\n"
    )


def find(path: str | Path) -> Path:
    """What to load for `path`: a safetensors file, a PEFT folder, or a run folder or checkpoint with one inside."""
    place = Path(path).expanduser()
    if place.is_file():  # PEFT's own file says nothing without the configuration beside it
        return place.parent if place.name == PEFT_FILE else place
    candidates = [place, place / "adapter", *sorted(place.glob("checkpoints/step_*/adapter"), reverse=True)]
    for candidate in candidates:
        if (candidate / PEFT_FILE).exists():
            return candidate
    raise AdapterError(
        f"adapter {str(path)!r}: "
        + ("no adapter was found in this folder" if place.exists() else "does not exist")
        + "; give an adapter folder (adapter_model.safetensors), a run folder, or a .safetensors file"
    )


def read(place: Path, model: nn.Module) -> dict[str, Pair]:
    """The pairs in a file of diffusers or ComfyUI keys, or in a PEFT folder, checked against `model`.

    Raises:
        AdapterError: unreadable, not a plain LoRA, of other ranks than its configuration says, or trained on another
            model.
    """
    file = place / PEFT_FILE if place.is_dir() else place
    try:
        state = load_file(file)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"adapter {file} cannot be read ({error}): it is damaged or incomplete") from error
    try:
        if not place.is_dir():
            return from_state(state, model)
        config = peft_config.plain_lora(place)
        state = {key.removeprefix("base_model.model."): tensor for key, tensor in state.items()}
        peft_config.check_ranks(config, state)
        pairs = from_state(state, model)
        return {layer: Pair(pair.a, pair.b * peft_config.scale(config, layer)) for layer, pair in pairs.items()}
    except ValueError as error:
        raise AdapterError(f"adapter {place}: {error}") from error


def attach_pairs(model: Transformer, pairs: Mapping[str, Pair], name: str, scale: float = 1.0) -> None:
    """Add an adapter of given updates beside those that `model` carries, in place, active and frozen."""
    ranks = {layer: pair.a.shape[0] for layer, pair in pairs.items()}
    config = peft.LoraConfig(
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),
        target_modules=list(pairs),
        rank_pattern={re.escape(layer): rank for layer, rank in ranks.items()},
        alpha_pattern={re.escape(layer): rank for layer, rank in ranks.items()},
    )
    # PEFT draws an initialisation that is then overwritten, and warns of the second adapter that is wanted
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        peft.inject_adapter_in_model(config, model, adapter_name=name)
    device = model.img_in.weight.device  # where the model computes; the layer itself may lie in host memory
    for layer, pair in pairs.items():
        module = model.get_submodule(layer)
        assert isinstance(module, LoraLayer)
        for side, value in ((module.lora_A[name], pair.a), (module.lora_B[name], pair.b)):
            side.weight.data = value.to(device, torch.float32)
        module.scaling[name] = scale
    fuse_lora(model)
    activate(model)


def activate(model: nn.Module) -> None:
    """Make every adapter that `model` carries active at once, and freeze them all."""
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.set_adapter(list(module.lora_A))
    model.requires_grad_(False)


def load(model: Transformer, path: str | Path, *, name: str = "default", scale: float = 1.0) -> None:
    """Attach the adapter at `path` to `model` for inference, in place, its update multiplied by `scale`.

    `path` is a PEFT folder, a run folder or checkpoint that holds one, or a .safetensors file with the keys of
    diffusers or ComfyUI. Adapters that the model carries already stay active. Raises AdapterError, `model` being as it
    was, for an adapter that cannot be used, TypeError or ValueError for a scale that is no finite number.
    """
    scale = checks.number("scale", scale)
    attach_pairs(model, read(find(path), model), name, scale)


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Add the active adapters to the weights of `model`, in place, and take all adapters off.

    The sum is made in float32 and rounded once, to the dtype of the weight. A bfloat16 weight does not take up a change
    below 0.2 to 0.4 % of itself, and a quantised one none at all in a useful sense: it is refused.

    Raises:
        AdapterError: a layer is quantised, blocks of the model stream, or an adapter is not a plain LoRA; the model is
            then as it was.
    """
    if isinstance(model, peft.PeftModel):
        model = model.get_base_model()
    if isinstance(model, Transformer) and model.streams:
        raise AdapterError(
            "cannot merge while blocks stream from host memory, as what is on the device would not follow: load the "
            "model without streaming (memory.stream_blocks=0)"
        )
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    for name, module in layers.items():
        base = module.get_base_layer()
        if isinstance(base, QuantisedLinear):
            raise AdapterError(f"cannot merge into {name}: {base.refusal}")
        if module.merged or module.lora_variant or any(module.lora_bias.values()):
            raise AdapterError(f"cannot merge into {name}: its adapter is merged already, or is not a plain LoRA")
    for name, module in layers.items():
        base = module.get_base_layer()
        weight = base.weight.float()
        for adapter in module.active_adapters:
            if adapter in module.lora_A:
                a, b = module.lora_A[adapter].weight.float(), module.lora_B[adapter].weight.float()
                weight = weight + module.scaling[adapter] * (b @ a)
        base.weight.data = weight.to(base.weight.dtype)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, base)
    if hasattr(model, "peft_config"):
        del model.peft_config


def restore(wrapped: peft.PeftModel, folder: Path, name: str = "default") -> None:
    """Put the weights saved in `folder` into the attached adapter, to go on training it; the layers must be equal."""
    state = load_file(folder / PEFT_FILE)
    have = peft.get_peft_model_state_dict(wrapped, adapter_name=name)
    if have.keys() != state.keys():
        raise AdapterError(
            f"{folder} holds an adapter of other layers than adapter.targets gives: "
            f"{listed(have.keys() ^ state.keys())}"
        )
    for key, tensor in state.items():
        if tensor.shape != have[key].shape:
            raise AdapterError(
                f"{folder}: {key} has shape {tuple(tensor.shape)}, the adapter that was asked for "
                f"{tuple(have[key].shape)}: it belongs to another model or another adapter.rank"
            )
        have[key].data.copy_(tensor)
