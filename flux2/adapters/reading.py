"""Read an adapter from its file or folder, without a model's weights: what `load` attaches and `flux2.export` converts.

The strength is in PEFT's configuration (next to the file, or in the header that diffusers writes) or in the file's
alphas, by the names of the layers in the file: it is applied before layers are renamed and joined.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from flux2.adapters import peft_config
from flux2.adapters.checksums import verify
from flux2.adapters.factors import LohaFactors, LokrFactors, Strength, Update, join, read_update
from flux2.adapters.formats import AdapterError, LoraPair
from flux2.adapters.keys import FileLayer, check_dtype, check_keys, check_known, known_layers, match_key, parse
from flux2.adapters.loading import check_saved
from flux2.adapters.peft_config import PEFT_CONFIG
from flux2.adapters.tlora import read_schedule
from flux2.layers.rank_schedule import RankSchedule
from flux2.models.transformer import Transformer
from flux2.utils.text import listed
from flux2.weights.key_names import transformer_module
from flux2.weights.modelspec import COMFY_DORA
from flux2.weights.safetensors_files import other_kind

PEFT_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."  # prefix of the keys in PEFT's files
OURS = r"flux[\W_]*2(?!\d)|klein"
FOREIGN_BASES = r"flux[\W_]?1(?!\d)|stable[\W_]?diffusion|sdxl|(qwen|z)[\W_]?image|hunyuan|\bwan[\W_]?2|chroma1"
LYCORIS_TYPES = {LohaFactors: "LoHa", LokrFactors: "LoKr"}
NO_STRENGTH = f"its strength was in {PEFT_CONFIG}, which is not next to it: read as alpha = rank"


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter by our layers: `pairs` of a LoRA or DoRA; `config` and `tensors`, by PEFT's keys, of another type, and
    of a DoRA from a PEFT folder.
    """

    kind: str
    pairs: Mapping[str, LoraPair] = field(default_factory=dict)
    config: peft.PeftConfig | None = None
    tensors: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    note: str = ""  # what is not certain
    schedule: RankSchedule | None = None  # of a T-LoRA

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(self.pairs or self.tensors)

    @property
    def ranks(self) -> tuple[int, ...]:
        """Return the rank of each layer, for types that have one."""
        if self.pairs:
            return tuple(pair.a.shape[0] for pair in self.pairs.values())
        config: Any = self.config
        if isinstance(config, peft.OFTConfig):
            return ()
        return tuple(peft_config.pattern_value(config.r, config.rank_pattern, layer) for layer in self.tensors)


def rank_of(tensors: Mapping[str, Tensor]) -> int:
    """Return the rank of a LoHa, or of the larger factor of a LoKr."""
    for side in ("hada_w1_b", "lokr_w2_b"):
        if side in tensors:
            return tensors[side].shape[-2]
    return min(tensors["lokr_w2"].shape[-2:])


def read_tensors(place: Path) -> dict[str, Tensor]:
    """Return the tensors of the file `place`, or of PEFT's file in that folder, without its prefix.

    Raises AdapterError if the file is unreadable, or holds what no adapter holds.
    """
    return read_file(place)[0]


def read_file(place: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of the file `place`, or of PEFT's file in that folder without its prefix, and its header."""
    file, prefix = (place / PEFT_FILE, PREFIX) if place.is_dir() else (place, "")
    if not file.is_file():  # a pipe would block
        raise AdapterError(f"adapter {file} {'is not a file' if file.exists() else 'does not exist'}")
    try:
        with safe_open(file, "pt") as opened:
            keys = list(opened.keys())
            check_keys(keys)
            if not place.is_dir():  # before anything is read: it may be a whole model. Folders have a configuration
                check_known(keys)
            state = {peft_config.unwrapped(key.removeprefix(prefix)): opened.get_tensor(key) for key in keys}
            metadata = opened.metadata() or {}
            if COMFY_DORA in metadata:
                raise AdapterError(
                    "it is a DoRA for ComfyUI only: its dora_scale holds other lengths than a trainer's. Give the run, "
                    "checkpoint or folder from which it was exported"
                )
    except AdapterError as error:
        raise AdapterError(f"adapter {file}: {error}") from error
    except (SafetensorError, OSError, ValueError, RuntimeError, AttributeError) as error:
        raise unreadable(file, error) from error
    verify(file)
    if len(state) < len(keys):
        raise AdapterError(f"adapter {file}: some of its keys differ in nothing but a prefix such as {PREFIX}")
    return state, metadata


def unreadable(file: Path, error: Exception) -> AdapterError:
    """Return the error for a file that safetensors cannot read."""
    other = other_kind(file) if isinstance(error, SafetensorError) else None
    reason = f"is {other}" if other else f"cannot be read ({error}): it is damaged or incomplete"
    return AdapterError(f"adapter {file} {reason}")


def recorded_base(place: Path) -> str:
    """Return the base that the adapter at `place` records; empty if it records none. Raises ValueError."""
    try:
        if place.is_dir():
            return str(peft_config.read_config(place).base_model_name_or_path or "")
        with safe_open(place, "pt") as file:
            return str((file.metadata() or {}).get("base_model", ""))
    except ValueError as error:
        raise AdapterError(f"adapter {place}: {error}") from error
    except (SafetensorError, OSError) as error:
        raise unreadable(place, error) from error


def check_architecture(metadata: Mapping[str, str], config: peft.PeftConfig | None) -> None:
    """Raise AdapterError if header or configuration name another model family: its layers may fit by their sizes."""
    base = str(getattr(config, "base_model_name_or_path", None) or metadata.get("base_model", ""))
    for key in ("modelspec.architecture", "ss_base_model_version"):
        name = metadata.get(key, "")
        is_own = name == f"{base}/lora"  # written here, for a base that ModelSpec has no name of
        if name.lower() not in ("", "unknown", "none") and not is_own and not re.search(OURS, name, re.IGNORECASE):
            raise AdapterError(f"it is for another model: its header has {key}={name[:100]}. Give an adapter of FLUX.2")
    if re.search(FOREIGN_BASES, base, re.IGNORECASE) and not re.search(OURS, base, re.IGNORECASE):
        raise AdapterError(f"it is for another model: its recorded base is {base[:100]}. Give an adapter of FLUX.2")


def find_config(
    place: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> tuple[peft.PeftConfig | None, str]:
    """Return PEFT's configuration of the adapter and what its place is called; None if it has none.

    It is next to PEFT's file, which may have another name: its keys tell. Raises ValueError if it is invalid, or if
    there are two.
    """
    header = peft_config.read_header(metadata)
    is_renamed = not place.is_dir() and all(key.startswith(PREFIX) for key in state)
    if place.is_dir() or (is_renamed and (place.parent / PEFT_CONFIG).exists()):
        if header is not None:
            raise AdapterError(f"its strength is given twice: in {PEFT_CONFIG} and in its header. Remove one of them")
        return peft_config.read_config(place if place.is_dir() else place.parent), PEFT_CONFIG
    return header, f"its header ({peft_config.HEADER})"


def read_adapter(place: Path, model: Transformer) -> StoredAdapter:
    """Return the adapter at `place`, which `files.find` returned, checked against names and shapes of `model`.

    Raises ValueError if it is damaged, for another model, or cannot be used.
    """
    if place.is_dir():
        peft_config.read_config(place)  # before the tensors, which may be those of a whole model
    state, metadata = read_file(place)
    config, where = find_config(place, state, metadata)
    check_architecture(metadata, config)
    for key, tensor in state.items():
        check_dtype(key, tensor)
    if config is not None and not peft_config.is_plain(config) and place.is_dir() and has_our_names(state, model):
        clean, tensors = check_saved(model.config, config, state)
        found = StoredAdapter(peft_config.type_name(config), config=clean, tensors=tensors)
        if not isinstance(config, peft.LoraConfig):
            return found
        return replace(
            found, pairs=stored_adapter(read_updates(state, model, Strength(config, where)), config, "").pairs
        )
    is_musubi = "lokr_factor" in state or "networks.lokr" in metadata.get("ss_network_module", "")
    updates = read_updates(state, model, Strength(config, where, is_musubi))
    found = stored_adapter(updates, config, NO_STRENGTH if is_without_strength(state, config) else "")
    if (schedule := read_schedule(metadata)) is None:
        return found
    if found.kind != "LoRA" or schedule.min_rank >= min(found.ranks):
        raise AdapterError(f"its header has a schedule of ranks that does not fit its {found.kind}")
    return replace(found, kind="T-LoRA", schedule=schedule)


def is_without_strength(state: Mapping[str, Tensor], config: peft.PeftConfig | None) -> bool:
    """Whether the file is PEFT's, whose strength is in another file, and that is not at hand."""
    keys = state.keys()
    return config is None and all(key.startswith(PREFIX) and not key.endswith(".alpha") for key in keys)


def has_our_names(state: Mapping[str, Tensor], model: Transformer) -> bool:
    """Whether the keys of a PEFT folder name no layer in diffusers' or another spelling."""
    places = known_layers(model)
    for match in map(match_key, state):
        place = places.get(match["layer"].replace(".", "_")) if match else None
        if match and place and (match["prefix"] or place.layer != match["layer"]):
            return False
    return True


def read_updates(state: Mapping[str, Tensor], model: Transformer, strength: Strength) -> dict[str, Update]:
    """Return the updates in a file by our layers, in the order of the model."""
    by_layer: dict[str, list[tuple[str, int, object]]] = {}
    places = {}
    layers = parse(state, model)
    check_patterns(strength, layers)
    for layer in layers:
        update = read_update(layer, strength)
        by_layer.setdefault(layer.place.layer, []).append((layer.name, layer.place.start, update))
        places[layer.name] = layer.place
    updates: dict[str, Update] = {}
    for name in dict.fromkeys(place.layer for place in known_layers(model).values()):
        if name in by_layer:
            found = sorted(by_layer[name], key=lambda part: part[1])
            updates[name] = join([(places[part], update) for part, _, update in found], [part for part, *_ in found])
    return updates


def check_patterns(strength: Strength, layers: Sequence[FileLayer]) -> None:
    """Raise AdapterError if a pattern names layers of the file in another program's spelling than its keys.

    By the keys it would match nothing, and the strength would be another one than that of who wrote it.
    """
    if strength.config is None:
        return
    others = {name for layer in layers for name in (layer.place.layer, *transformer_module(layer.place.layer).names)}
    for key in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(strength.config, key, {}):
            match = peft_config.compiled(pattern).match
            if not any(match(strength.name(layer)) for layer in layers) and any(map(match, others)):
                raise AdapterError(
                    f"{strength.where}: {key} has {pattern!r}, which names layers in another spelling than the "
                    f"tensors, such as {layers[0].name}. Name them alike"
                )


def from_state(state: Mapping[str, Tensor], model: Transformer) -> dict[str, LoraPair]:
    """Return the pairs of the layers of `model`, which may be on the meta device, from the tensors of a LoRA or DoRA.

    Raises AdapterError if a key has no format or another than the rest, a tensor has non-finite values, a pair is
    incomplete or has two ranks, a layer is not in the model or has another shape, or only some layers belong to a DoRA.
    """
    return dict(stored_adapter(read_updates(state, model, Strength()), None, "").pairs)


def stored_adapter(updates: Mapping[str, Update], config: peft.PeftConfig | None, note: str) -> StoredAdapter:
    """Return the adapter with these updates. Raises AdapterError if they are of types that do not go together."""
    kinds = {LYCORIS_TYPES.get(type(update), "LoRA") for update in updates.values()}
    pairs = {layer: update for layer, update in updates.items() if isinstance(update, LoraPair)}
    doras = [layer for layer, pair in pairs.items() if pair.magnitude is not None]
    if doras and len(doras) < len(updates):
        raise AdapterError(f"some of its layers belong to a DoRA ({listed(doras, 3)}), others to a plain LoRA")
    if config is not None and kinds != {wanted := peft_config.TYPES[config.peft_type]}:
        raise AdapterError(f"its tensors are those of a {' and '.join(sorted(kinds))}, its configuration a {wanted}'s")
    if kinds == {"LoRA"}:
        kind = "rsLoRA" if config is not None and peft_config.is_rslora(config) else "LoRA"
        if doras:
            by_rows = {pair.magnitude.ndim == 1 for pair in pairs.values() if pair.magnitude is not None}
            kind = "DoRA" if by_rows == {True} else "column DoRA"
        return StoredAdapter(kind, pairs, note=note)
    if kinds == {"LoKr", "LoRA"} and not any(
        pair.bias is not None for pair in pairs.values()
    ):  # a LoRA is [[1]] (x) B A
        one = torch.ones(1, 1)
        updates = dict(updates) | {layer: LokrFactors(one, pair.b, pair.a) for layer, pair in pairs.items()}
        kinds = {"LoKr"}
    if len(kinds) > 1:
        raise AdapterError(f"its layers are of several types, {' and '.join(sorted(kinds))}, which do not add up")
    tensors = {layer: lycoris_tensors(update) for layer, update in updates.items()}
    ranks = {layer: rank_of(found) for layer, found in tensors.items()}
    (kind,) = kinds
    config = lycoris_config(kind, ranks)
    if any(tensor.ndim > 2 for found in tensors.values() for tensor in found.values()):
        kind = "split LoKr"  # of separate q, k and v, which no other program has for our fused layer
    return StoredAdapter(kind, config=config, tensors=tensors, note=note)


def lycoris_tensors(update: Update) -> dict[str, Tensor]:
    """Return the factors of a LoHa or LoKr by PEFT's names."""
    if isinstance(update, LohaFactors):
        return {f"hada_{side}": tensor.contiguous() for side, tensor in vars(update).items()}
    assert isinstance(update, LokrFactors)
    if update.w2_b is None:
        return {"lokr_w1": update.w1.contiguous(), "lokr_w2": update.w2_a.contiguous()}
    return {f"lokr_{side}": tensor.contiguous() for side, tensor in vars(update).items()}


def lycoris_config(kind: str, ranks: Mapping[str, int]) -> peft.PeftConfig:
    """Return PEFT's configuration of factors whose scale is folded in: alpha = rank in every layer."""
    most = max(ranks.values())
    patterns = {re.escape(layer): rank for layer, rank in ranks.items() if rank != most}
    config = peft.LoHaConfig if kind == "LoHa" else peft.LoKrConfig
    layers: Sequence[str] = list(ranks)
    return config(r=most, alpha=most, rank_pattern=patterns, alpha_pattern=dict(patterns), target_modules=list(layers))
