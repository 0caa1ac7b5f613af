"""Write adapters for other programs: the command `python -m flux2.export` (options in arguments.py)."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from flux2.adapters import find
from flux2.adapters.files import PEFT_FILE
from flux2.adapters.formats import LoraPair, from_state, to_comfyui, to_diffusers, to_kohya
from flux2.export import deltas
from flux2.export.arguments import FULL, RANK, arguments
from flux2.export.deltas import AdapterDelta
from flux2.export.low_rank import decompose, distance, ratio, reduce_rank, rounding_bound, sum_pairs
from flux2.export.merge_checkpoint import NotReadError, merge
from flux2.models.transformer import Transformer
from flux2.utils import checks
from flux2.utils.cli import format_error, split_adapter
from flux2.utils.device import pick_device
from flux2.utils.files import atomic_write
from flux2.utils.signals import exit_code, sigterm_as_interrupt
from flux2.utils.text import listed
from flux2.weights import modelspec
from flux2.weights.safetensors_files import tensor_files
from flux2.weights.sources import ModelSource, model_source
from flux2.weights.streaming_writer import check_room
from flux2.weights.transformer_tensors import BaseWeights

FORMS: dict[str, Callable[[Mapping[str, LoraPair]], dict[str, Tensor]]] = {
    "diffusers": to_diffusers,
    "comfyui": to_comfyui,
    "kohya": to_kohya,
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
EXACT = 1e-6  # relative error that reading back may have in addition to rounding to the dtype
COARSE = 0.1  # relative error from which a conversion is reported as coarse
# layers that diffusers 0.42 leaves out of kohya's keys, with only a warning, and that it reads wrongly from ComfyUI's
DROPPED = ("guidance_in", "double_stream_modulation", "single_stream_modulation", "final_layer.adaLN")


def say(text: str) -> None:
    print(text, file=sys.stderr)


# ------------------------------------------------------------------ checks


def output_path(options: argparse.Namespace) -> Path:
    """Return the path that is written, and replaced if it exists."""
    return options.out / "transformer" if options.format == "full-diffusers" else options.out


def check_options(options: argparse.Namespace) -> None:
    """Raise ValueError for options that are wrong independently of the files."""
    if options.rank is not None:
        checks.integer("--rank", options.rank, 1)
    if options.max_error is not None and not 0 < options.max_error < 1:
        raise ValueError(f"--max-error {options.max_error:g} must be above 0 and below 1, for example 0.01 for 1 %")
    out = options.out
    if options.format != "full-diffusers":
        if out.suffix != ".safetensors":
            raise ValueError(f"--out {out} must end in .safetensors")
        if out.is_dir():
            raise ValueError(f"--out {out} is a folder. Give a file")
    elif out.suffix == ".safetensors" or out.is_file():
        raise ValueError(f"--out {out} must be a folder, in which transformer/ is written")
    target = output_path(options)
    if target.exists() and not options.overwrite:
        raise ValueError(f"--out {target} exists. Choose another name, or replace it with --overwrite")
    parent = next(place for place in target.absolute().parents if place.exists())
    if not parent.is_dir() or (options.format == "full-diffusers" and target.is_file()):
        file = parent if not parent.is_dir() else target
        raise ValueError(f"--out {out} cannot be written: {file} is a file, not a folder. Choose another path")
    if not os.access(parent, os.W_OK):
        raise ValueError(f"--out {out} cannot be written: {parent} is read-only. Choose another path")


def check_apart(out: Path, places: Sequence[Path], source: ModelSource | None) -> None:
    """Raise ValueError if writing `out` would replace an adapter or the base that is read."""
    inputs = [place.resolve() for place in places]
    inputs += [place / PEFT_FILE for place in inputs if place.is_dir()]
    if source is not None:
        inputs.append((source.file("transformer") or source.folder("transformer")).resolve())
    target = out.resolve()
    if any(target in (place, *place.parents) for place in inputs):
        raise ValueError(f"--out {out} is an input, or contains one. Choose another name")


# ------------------------------------------------------------------ low-rank files


@dataclass
class ConversionErrors:
    """Relative errors of converted layers."""

    errors: dict[str, float]
    lost: float = 0.0  # sum of squared errors
    whole: float = 0.0  # sum of squared norms

    def add(self, layer: str, error: float, size: float) -> None:
        self.errors[layer] = ratio(error, size)
        self.lost += error**2
        self.whole += size**2

    @property
    def overall(self) -> float:
        return ratio(self.lost**0.5, self.whole**0.5)

    def __str__(self) -> str:
        worst = max(self.errors, key=lambda layer: self.errors[layer])
        return f"{self.overall:.2g} over all {len(self.errors)} layers, {self.errors[worst]:.2g} in the worst, {worst}"


def low_rank(
    updates: Sequence[AdapterDelta],
    options: argparse.Namespace,
    base: Callable[[], BaseWeights],
    device: torch.device,
) -> tuple[dict[str, LoraPair], ConversionErrors | None]:
    """Return the sum of adapters as one pair per layer, and the errors; None if nothing was approximated."""
    layers = list(dict.fromkeys(layer for update in updates for layer in update.layers))
    is_explicit = options.rank is not None or options.max_error is not None
    if not is_explicit and len(updates) == 1 and updates[0].kind == "DoRA" and options.format == "diffusers":
        if updates[0].scale == 1:
            return dict(updates[0].pairs), None
        say(f"a DoRA at scale {updates[0].scale:g} is not a DoRA that diffusers can hold: it is converted")
    by_layer = {layer: [update for update in updates if layer in update.layers] for layer in layers}
    converted = [layer for layer in layers if not all(update.is_plain for update in by_layer[layer])]
    pairs: dict[str, LoraPair] = {}
    errors = ConversionErrors({})
    for layer in layers:
        if layer not in converted:
            pairs[layer] = sum_pairs([update.pair(layer) for update in by_layer[layer]])
            if is_explicit:
                pairs[layer], error, size = reduce_rank(pairs[layer], options.rank, options.max_error)
                errors.add(layer, error, size)
    rank = options.rank if is_explicit else RANK
    with tqdm(total=len(converted), unit="layer", leave=False, disable=None if converted else True) as bar:

        def convert(layer: str, weight: Tensor | None) -> None:
            delta = by_layer[layer][0].change(layer, weight, device)
            for update in by_layer[layer][1:]:
                delta += update.change(layer, weight, device)
            pairs[layer], error, size = decompose(delta, rank, options.max_error)
            errors.add(layer, error, size)
            bar.update()

        with torch.no_grad():
            if any(update.needs_weights for update in updates):
                names = [f"{layer}.weight" for layer in converted]
                base().each(names, device, lambda name, stored: convert(name.removesuffix(".weight"), stored.float()))
            else:
                for layer in converted:
                    convert(layer, None)
    return {layer: pairs[layer] for layer in layers}, errors if errors.errors else None


def write_pairs(
    pairs: Mapping[str, LoraPair], options: argparse.Namespace, model: Transformer, metadata: Mapping[str, str]
) -> float:
    """Write a LoRA, read it back and compare; return the largest relative error of a layer.

    Raises ValueError if the disk has no room, NotReadError if the file differs from what was written. OUT is then
    unchanged.
    """
    dtype = DTYPES[options.dtype or "fp32"]
    state = {
        key: tensor if key.endswith(".alpha") else tensor.to(dtype).contiguous()
        for key, tensor in FORMS[options.format](pairs).items()
    }
    out = options.out
    check_room(out.parent, sum(tensor.nbytes for tensor in state.values()), f"--out {out}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out) as place:
        place.touch()
        readable = place.stat().st_mode  # follows the umask; safetensors writes for the owner only
        save_file(state, place, {**metadata, modelspec.HASH: modelspec.content_hash(state)})
        worst = compare(from_state(load_file(place), model), pairs, dtype)
        place.chmod(readable)
    return worst


def compare(written: Mapping[str, LoraPair], wanted: Mapping[str, LoraPair], dtype: torch.dtype) -> float:
    """Return the largest relative error of a layer's update. Raises NotReadError if `dtype` does not explain it."""
    if written.keys() != wanted.keys():
        raise NotReadError(f"the file that was written has other layers: {listed(written.keys() ^ wanted.keys())}")
    worst = 0.0
    for layer, pair in wanted.items():
        allowed = EXACT + (rounding_bound(pair, dtype) if dtype != torch.float32 else 0)
        errors = [distance(written[layer], pair)]
        if pair.magnitude is not None:
            length = written[layer].magnitude
            assert length is not None
            errors.append(float((length - pair.magnitude).norm() / pair.magnitude.norm()))
            allowed = max(allowed, EXACT + torch.finfo(dtype).eps / 2)
        if max(errors) > allowed:
            raise NotReadError(
                f"{layer} differs after reading back by {max(errors):.2g}, of which rounding explains {allowed:.2g}: "
                "nothing was written"
            )
        worst = max(worst, *errors)
    return worst


def warn_of_layers(layers: Sequence[str], form: str) -> None:
    """Warn about layers that other programs ignore."""
    lost = [layer for layer in layers if layer.startswith(DROPPED)]
    if form == "kohya" and lost:
        say(f"note: diffusers leaves out {listed(lost)} when it reads kohya's keys; ComfyUI reads them")
    swapped = [layer for layer in layers if layer.startswith("final_layer.adaLN")]
    if form == "comfyui" and swapped:
        say(f"note: diffusers reads {listed(swapped)} from ComfyUI's keys with its halves in the wrong order")


# ------------------------------------------------------------------ the command


def run(options: argparse.Namespace) -> Path:
    """Write the requested file or folder and return OUT. Raises ValueError for invalid options or files."""
    check_options(options)
    device = pick_device(options.device)
    adapters = [split_adapter(adapter) for adapter in options.adapter]
    places = [find(path) for path, _ in adapters]
    variant, certain = deltas.variant_for(places, options.model)
    model = deltas.skeleton(variant.transformer)
    updates = [deltas.read(place, model, scale) for place, (_, scale) in zip(places, adapters, strict=True)]
    deltas.check_together(updates)
    for update in updates:
        say(f"{update.place}{'' if update.scale == 1 else f' at scale {update.scale:g}'}: {update.description()}")
    needed = options.format in FULL or any(update.needs_weights for update in updates)
    if needed and not certain:
        raise ValueError(
            f"the weights of the base are needed, and the adapter does not record it. Give --model {variant.name}, or "
            "another variant of these sizes"
        )
    source = model_source(variant.name, options.path)

    def base() -> BaseWeights:
        check_apart(output_path(options), [], source)
        return BaseWeights(model, tensor_files(source, "transformer"), f"the transformer of {variant.name}")

    check_apart(output_path(options), places, None)
    about: dict[str, Any] = {
        "base": variant.repo or variant.name,
        "title": options.title or options.out.stem,
        "lora": options.format not in FULL,
        "names": "diffusers" if "diffusers" in options.format else "bfl",
        "license": variant.license,
        "resolution": variant.resolution,
        "trigger": options.trigger,
        "dated": True,
    }
    kinds = " and ".join(sorted({update.kind for update in updates}))
    if options.format in FULL:
        with name_output_in_errors(options.out):
            write_checkpoint(updates, base(), source, model, options, device, about)
        return options.out
    pairs, errors = low_rank(updates, options, base, device)
    if errors is not None:
        ranks = sorted({pair.a.shape[0] for pair in pairs.values()})
        size = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        converted = any(not update.is_plain for update in updates)
        summary = f"{kinds} {'converted to a LoRA of' if converted else 'brought to'} {size}: relative error {errors}"
        about["description"] = summary
        say(summary)
        if errors.overall > COARSE:
            say(f"note: this is coarse, and images will differ: use a larger --rank, or --max-error {COARSE / 10}")
    with name_output_in_errors(options.out):
        worst = write_pairs(pairs, options, model, modelspec.metadata(**about))
    warn_of_layers(list(pairs), options.format)
    say(f"read back and compared: {len(pairs)} layers, largest relative error {worst:.1e}")
    return options.out


@contextmanager
def name_output_in_errors(out: Path) -> Iterator[None]:
    """Context manager that turns errors of a full disk, which name no file, into a ValueError that names `out`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if getattr(error, "filename", None) is not None:
            raise
        raise ValueError(
            f"--out {out} could not be written ({error}), and nothing was left: make room there, or choose another path"
        ) from error


def write_checkpoint(
    updates: Sequence[AdapterDelta],
    base: BaseWeights,
    source: ModelSource,
    model: Transformer,
    options: argparse.Namespace,
    device: torch.device,
    about: dict[str, Any],
) -> None:
    """Write a full checkpoint and report the change."""
    about["merged_from"] = ", ".join([str(about["base"]), *(str(update.place) for update in updates)])
    with tqdm(total=len(base.weights), unit="tensor", leave=False, disable=None) as bar:
        merged = merge(
            updates,
            base,
            source,
            model,
            options.out,
            layout=FULL[options.format],
            metadata=modelspec.metadata(**about),
            dtype=DTYPES.get(options.dtype),
            device=device,
            progress=lambda _: bar.update(),
        )
    say(
        f"merged into {merged.layers} layers, which change by {merged.changed:.2g} of themselves; rounding loses "
        f"{merged.lost:.2g} of the change. Read back and compared: equal bit for bit"
    )
    if options.format == "full-diffusers":
        say("this is only the transformer: autoencoder, text encoder and the rest are those of the base")


def main() -> int:
    try:
        with sigterm_as_interrupt():
            print(run(arguments()))
    except (ValueError, TypeError, OSError) as error:
        print("error:", format_error(error), file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        print("interrupted", file=sys.stderr)
        return exit_code(stop)
    return 0
