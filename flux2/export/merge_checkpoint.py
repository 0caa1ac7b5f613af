"""Merge adapters into a full checkpoint, in Black Forest Labs' or diffusers' layout, tensor by tensor.

Each weight is read, the changes are added in float32, and the sum is rounded once, to the dtype that is written. The
files are read back and compared before they get their names.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import torch
from torch import Tensor
from tqdm import tqdm

from flux2.adapters.formats import AdapterError
from flux2.export.deltas import AdapterDelta, total_change
from flux2.export.low_rank import norm, ratio, total_pair
from flux2.models.transformer import Transformer
from flux2.models.variants import TransformerConfig
from flux2.utils.files import atomic_write, name_write_errors, write_text
from flux2.weights.key_names import PublishedTensor, transformer_tensor
from flux2.weights.loading import BaseWeights
from flux2.weights.parallel_reader import checksum
from flux2.weights.safetensors_files import TensorFiles, part_files
from flux2.weights.sources import ModelSource
from flux2.weights.streaming_writer import Plan, check_room, nbytes, raw_bytes, safetensors_writer

INDEX = "diffusion_pytorch_model.safetensors.index.json"
SHARD = "10GB"  # largest file, as in diffusers
PATTERN = "diffusion_pytorch_model{suffix}.safetensors"


@dataclass(frozen=True)
class MergeSummary:
    """Relative sizes (Frobenius norms) of the change of the weights, and of its loss by rounding."""

    layers: int
    changed: float
    lost: float

    def __str__(self) -> str:
        lost = f"rounding loses {self.lost:.2g} of the change" if self.changed else "the adapters are zero, or cancel"
        return f"{self.layers} layers, which change by {self.changed:.2g} of themselves; {lost}"


class NotReadError(AdapterError):
    """A file that was read back differs from what was written."""


def published_tensor(name: str, layout: str) -> PublishedTensor:
    """Return where one of our tensors is in a checkpoint: under the same name for `bfl`."""
    return transformer_tensor(name) if layout == "diffusers" else PublishedTensor((name,))


def plan(base: BaseWeights, layout: str, dtype: torch.dtype | None) -> tuple[list[str], Plan]:
    """Return our tensors in the order of writing, and the checkpoint's tensors."""
    shapes = {name: tensor.shape for name, tensor in base.model.state_dict().items()}
    dtypes = {name: base.weights[name].dtype if dtype is None else dtype for name in shapes}
    # large elements first: the format requires a tensor to start at a multiple of its element size
    order = sorted(shapes, key=lambda name: -dtypes[name].itemsize)
    checkpoint: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name in order:
        parts = published_tensor(name, layout).split(torch.empty(shapes[name], device="meta"))
        checkpoint |= {key: (dtypes[name], tuple(part.shape)) for key, part in parts.items()}
    return order, checkpoint


def shards(folder: Path, whole: Plan) -> tuple[dict[Path, Plan], dict[str, object] | None]:
    """Return the files of a folder in diffusers' layout, and its index; None if one file holds everything."""
    empty = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, shape) in whole.items()}
    split = huggingface_hub.split_torch_state_dict_into_shards(empty, filename_pattern=PATTERN, max_shard_size=SHARD)
    names_in = split.filename_to_tensors.items()
    files: dict[Path, Plan] = {folder / file: {name: whole[name] for name in names} for file, names in names_in}
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    return files, index if split.is_sharded else None


def diffusers_config(source: ModelSource) -> bytes:
    """Return `config.json` of diffusers' transformer: the base's if it exists."""
    if source.file("transformer") is None and (kept := source.folder("transformer") / "config.json").exists():
        return kept.read_bytes()
    sizes: TransformerConfig = source.variant.transformer
    config = {
        "_class_name": "Flux2Transformer2DModel",
        "patch_size": 1,
        "in_channels": sizes.channels,
        "out_channels": None,
        "num_layers": sizes.double_blocks,
        "num_single_layers": sizes.single_blocks,
        "attention_head_dim": sizes.head_dim,
        "num_attention_heads": sizes.heads,
        "joint_attention_dim": sizes.text_width,
        "timestep_guidance_channels": sizes.time_width,
        "mlp_ratio": sizes.mlp_ratio,
        "axes_dims_rope": list(sizes.rope_axes),
        "rope_theta": sizes.rope_theta,
        "eps": sizes.eps,
        "guidance_embeds": sizes.guidance,
    }
    return json.dumps(config, indent=2).encode()


def merge(
    updates: Sequence[AdapterDelta],
    base: BaseWeights,
    source: ModelSource,
    out: Path,
    layout: str,
    metadata: Mapping[str, str],
    dtype: torch.dtype | None,
    device: torch.device,
) -> MergeSummary:
    """Write the transformer `base` of `source` with `updates` added on `device`.

    Args:
        out: The file for `bfl`; for `diffusers` the folder, in which `transformer/` is written.
        dtype: Dtype of all tensors; None: as in the base.

    Raises ValueError if the disk has no room, NotReadError if it holds something else than what was written; `out` is
    then unchanged.
    """
    order, whole = plan(base, layout, dtype)
    target = out / "transformer" if layout == "diffusers" else out
    check_room(target.parent, nbytes(whole), f"--out {out}")
    created = [folder for folder in (target.parent, *target.parent.parents) if not folder.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with atomic_write(target) as place:
            files: dict[Path, Plan] = {place: whole}
            if layout == "diffusers":
                place.mkdir()
                with name_write_errors(place / "config.json"):
                    (place / "config.json").write_bytes(diffusers_config(source))
                files, index = shards(place, whole)
                if index is not None:
                    write_text(place / INDEX, json.dumps(index, indent=2, sort_keys=True))
            with safetensors_writer(files, metadata) as write:
                sums, merged = write_tensors(write, updates, base, order, layout, whole, device)
            compare(part_files(place) if layout == "diffusers" else TensorFiles([place]), base.model, sums)
    except BaseException:
        for folder in created:
            if folder.exists() and not any(folder.iterdir()):
                folder.rmdir()
        raise
    return merged


def write_tensors(
    write: Callable[[str, Tensor], None],
    updates: Sequence[AdapterDelta],
    base: BaseWeights,
    order: Sequence[str],
    layout: str,
    whole: Plan,
    device: torch.device,
) -> tuple[dict[str, str], MergeSummary]:
    """Write all tensors; return their checksums by our names, and a summary."""
    sums: dict[str, str] = {}
    layers = {layer for update in updates for layer in update.layers}
    weights, changes, losses = 0.0, 0.0, 0.0  # squares

    def use(name: str, stored: Tensor) -> None:
        nonlocal weights, changes, losses
        layer, entry = name.removesuffix(".weight"), published_tensor(name, layout)
        wanted = whole[entry.names[0]][0]
        if layer in layers:
            weight = stored.float()
            change, size = merged_weight(updates, layer, weight, device)
            tensor = change.to(wanted)
            if not bool(torch.isfinite(tensor).all()):
                raise AdapterError(
                    f"{layer} would get NaN or infinite weights, because the base has them or the adapters change it "
                    f"by {size:.2g}. Nothing was written. Use a smaller scale, or another adapter"
                )
            weights += float(weight.norm()) ** 2
            changes += size**2
            losses += float((tensor.float() - change).norm()) ** 2
        else:
            tensor = stored.to(wanted)
        sums[name] = checksum(raw_bytes(tensor))
        for key, part in entry.split(tensor).items():
            write(key, part)
        bar.update()

    with tqdm(total=len(order), unit="tensor", leave=False, disable=None) as bar:
        base.each(order, device, use)
    return sums, MergeSummary(len(layers), ratio(changes**0.5, weights**0.5), ratio(losses**0.5, changes**0.5))


def merged_weight(
    updates: Sequence[AdapterDelta], layer: str, weight: Tensor, device: torch.device
) -> tuple[Tensor, float]:
    """Return the weight with all changes in float32, and the norm of the changes."""
    of_layer = [update for update in updates if layer in update.layers]
    if all(update.is_plain for update in of_layer):
        pair = total_pair([update.pair(layer) for update in of_layer])
        return torch.addmm(weight, pair.b.to(device), pair.a.to(device)), norm(pair)
    change = total_change(of_layer, layer, weight, device)
    return weight + change, float(change.norm())


def compare(files: TensorFiles, model: Transformer, sums: Mapping[str, str]) -> None:
    """Raise NotReadError unless the tensors in `files`, read as a checkpoint, have these checksums."""
    wrong = []

    def use(name: str, tensor: Tensor) -> None:
        if checksum(raw_bytes(tensor)) != sums[name]:
            wrong.append(name)

    BaseWeights(model, files, "what was written").each(sums, torch.device("cpu"), use)
    if wrong:
        raise NotReadError(
            f"{len(wrong)} tensors that were read back differ from what was written, the first is {wrong[0]}: the disk "
            "or the memory is faulty. Nothing was written. Try another disk"
        )
