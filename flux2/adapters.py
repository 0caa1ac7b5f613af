"""LoRA adapters: attach, save and load them, in PEFT's form and in those of diffusers and ComfyUI.

PEFT is the adapter library; this module chooses the layers and speaks the file formats. Low-rank pairs are kept as

    delta W = scale * B A        A: (rank, in), B: (out, rank), scale = alpha / rank

A LoRA on a fused q, k, v projection is exactly three on the separate ones: the same A, and B cut in thirds. Three
separate ones fuse into one of rank 3r: the A stacked, the B on a block diagonal. The formats without an alpha get the
scale folded into B. Names of layers come from the table in `names`.
"""

from __future__ import annotations

import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flux2 import checks, peft_config
from flux2.layers import BLOCK_LINEARS, linear_names
from flux2.linear import fuse_lora
from flux2.model import Transformer
from flux2.names import listed, swap_halves, transformer_module
from flux2.quantised import QuantisedLinear

PEFT_FILE = "adapter_model.safetensors"
DIFFUSERS_FILE = "diffusers.safetensors"


class AdapterError(ValueError):
    """An adapter cannot be attached, or its file cannot be read or does not fit the model."""


@dataclass(frozen=True)
class Pair:
    """One layer's low-rank update with the scale folded into `b`: delta W = b @ a."""

    a: Tensor  # (rank, in)
    b: Tensor  # (out, rank)


# ------------------------------------------------------------------ attaching


def target_layers(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """Names of the linear layers that any of the regular expressions `targets` matches whole.

    Raises:
        AdapterError: a pattern is no regular expression, or matches no linear layer.
    """
    try:
        return linear_names(model, targets, "adapter.targets")
    except ValueError as error:
        raise AdapterError(str(error)) from error


def attach(
    model: Transformer,
    *,
    rank: int = 16,
    alpha: float | None = None,
    targets: Sequence[str] = BLOCK_LINEARS,
    dropout: float = 0.0,
    rslora: bool = False,
    seed: int = 0,
    name: str = "default",
) -> peft.PeftModel:
    """Attach a fresh LoRA to `model`, in place; its weights are float32 and alone require gradients.

    Args:
        rank: of every pair.
        alpha: the update is scaled by alpha / rank; `rank` by default, so that the learning rate means the same at
            every rank.
        targets: regular expressions for whole layer names.
        dropout: on the input of A.
        rslora: scale by alpha / sqrt(rank) instead.
        seed: of A's initialisation; B starts at zero, so a fresh adapter changes nothing, bit for bit.

    Returns:
        PEFT's wrapper around the same `model`; use either.
    """
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise AdapterError(f"adapter.rank={rank!r} must be a whole number from 1")
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise AdapterError(f"adapter.dropout={dropout!r} must be a number in [0, 1)")
    if alpha is not None and (
        isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < float("inf")
    ):
        raise AdapterError(f"adapter.alpha={alpha!r} must be a positive number, or null for the rank")
    if not isinstance(rslora, bool):
        raise AdapterError(f"adapter.rslora={rslora!r} must be true or false")
    if isinstance(targets, str):
        raise AdapterError(f"adapter.targets={targets!r} must be a list of regular expressions, got one string")
    if not isinstance(targets, Sequence) or not all(isinstance(target, str) for target in targets):
        raise AdapterError(f"adapter.targets={targets!r} must be a list of regular expressions")
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=rank if alpha is None else alpha,
        target_modules=target_layers(model, targets),
        lora_dropout=dropout,
        use_rslora=rslora,
    )
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        wrapped = peft.get_peft_model(model, config, adapter_name=name)
        for module in model.modules():
            if isinstance(module, LoraLayer):
                # PEFT rounds what it drew to the base's precision: draw again, so that all precisions start alike
                module.lora_A[name].float()
                module.lora_B[name].float()
                module.reset_lora_parameters(name, init_lora_weights=True)
    fuse_lora(model)
    return wrapped


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


# ------------------------------------------------------------------ formats


def to_diffusers(pairs: Mapping[str, Pair]) -> dict[str, Tensor]:
    """Our layers to the keys that diffusers' `load_lora_weights` reads."""
    state = {}
    for layer, pair in pairs.items():
        published = transformer_module(layer)
        for name, b in published.split(pair.b).items():
            state[f"transformer.{name}.lora_A.weight"] = pair.a.clone()
            state[f"transformer.{name}.lora_B.weight"] = b.contiguous()
    return state


def to_comfyui(pairs: Mapping[str, Pair]) -> dict[str, Tensor]:
    """Our layers to the keys that ComfyUI reads, which are Black Forest Labs' names."""
    state = {}
    for layer, pair in pairs.items():
        state[f"diffusion_model.{layer}.lora_A.weight"] = pair.a
        state[f"diffusion_model.{layer}.lora_B.weight"] = pair.b
    return state


def fuse(parts: Sequence[Pair]) -> Pair:
    """Pairs of separate q, k, v layers to one of the fused layer; the three of a split one come back as it was."""
    if all(torch.equal(part.a, parts[0].a) for part in parts):
        return Pair(parts[0].a, torch.cat([part.b for part in parts]))
    return Pair(torch.cat([part.a for part in parts]), torch.block_diag(*(part.b for part in parts)))


def whole_pair(name: str, a: Tensor, b: Tensor, alpha: Tensor | None) -> Pair:
    """The update of one layer. Raises AdapterError unless the shapes are (rank, in), (out, rank) and one number."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
        raise AdapterError(
            f"{name}: lora_A has shape {tuple(a.shape)} and lora_B {tuple(b.shape)}; (rank, in) and (out, rank) of one "
            "rank were expected"
        )
    if alpha is None:
        return Pair(a, b)
    if alpha.numel() != 1:
        raise AdapterError(f"{name}: alpha has shape {tuple(alpha.shape)}; one number was expected")
    return Pair(a, b * (alpha.item() / a.shape[0]))


def from_state(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Pair]:
    """Read the keys of diffusers or ComfyUI back into our layers.

    Args:
        state: `*.lora_A.weight`, `*.lora_B.weight` and, perhaps, `*.alpha`.
        model: whose layers the keys must name.

    Raises:
        AdapterError: a key is of neither format, a tensor has values that are not finite, a pair is incomplete or of
            two ranks, or a layer is not in the model or not of its shape.
    """
    if not state:
        raise AdapterError("it holds no tensors")
    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        match = re.fullmatch(r"(?:transformer\.|diffusion_model\.)?(.+?)\.(lora_A|lora_B|alpha)(?:\.weight)?", key)
        if not match:
            raise AdapterError(f"{key!r} is not a LoRA key of diffusers or ComfyUI")
        if not bool(torch.isfinite(tensor.float()).all()):
            raise AdapterError(f"{key} has NaN or infinite values: the training that made it failed")
        halves.setdefault(match[1], {})[match[2]] = tensor.float()

    def pair(name: str) -> Pair:
        half = halves.pop(name)
        if not {"lora_A", "lora_B"} <= half.keys():
            raise AdapterError(f"{name} has only {' and '.join(half)}: the file is incomplete")
        return whole_pair(name, half["lora_A"], half["lora_B"], half.get("alpha"))

    pairs = {}
    for layer, module in model.named_modules():
        if not isinstance(module, nn.Linear | LoraLayer) or ".lora_" in layer:
            continue
        rows, columns = module.out_features, module.in_features
        published = transformer_module(layer.removesuffix(".base_layer"))
        if layer in halves:
            found = pair(layer)
        elif any(name in halves for name in published.names):
            part_rows = rows // len(published.names)
            nothing = Pair(torch.zeros(0, columns), torch.zeros(part_rows, 0))
            parts = [pair(name) if name in halves else nothing for name in published.names]
            for name, part in zip(published.names, parts, strict=True):
                check_features(name, part, columns, part_rows)
            found = fuse(parts)
            if published.kind == "swapped":
                found = Pair(found.a, swap_halves(found.b))
        else:
            continue
        check_features(layer, found, columns, rows)
        pairs[layer] = found
    if halves:
        raise AdapterError(f"the adapter has layers that this model does not: {listed(halves)}")
    return pairs


def check_features(name: str, pair: Pair, columns: int, rows: int) -> None:
    """Raises AdapterError unless `pair` is for a layer of `columns` to `rows` features."""
    if pair.a.shape[1] != columns or pair.b.shape[0] != rows:
        raise AdapterError(
            f"{name}: the adapter is for a layer of {pair.a.shape[1]} to {pair.b.shape[0]} features, the "
            f"model's has {columns} to {rows}. It was trained on another model."
        )


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
