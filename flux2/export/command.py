"""Write adapters for other programs: the command `python -m flux2.export` (options in arguments.py)."""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from flux2.adapters import find
from flux2.adapters.files import PEFT_FILE
from flux2.adapters.formats import AdapterError, LoraPair, to_comfyui, to_diffusers, to_kohya
from flux2.adapters.loading import describe_ranks
from flux2.adapters.reading import from_state
from flux2.export import deltas, exact
from flux2.export.arguments import FULL, RANK, arguments
from flux2.export.deltas import AdapterDelta
from flux2.export.low_rank import decompose, distance, ratio, reduce_rank, rounding_bound, total_pair
from flux2.export.merge_checkpoint import NotReadError, merge
from flux2.models.transformer import Transformer
from flux2.quantization.precision import DTYPES
from flux2.utils import checks
from flux2.utils.cli import format_error, split_adapter
from flux2.utils.device import pick_device
from flux2.utils.files import NotWritten, atomic_write
from flux2.utils.images import check_target_file
from flux2.utils.signals import exit_code, sigterm_as_interrupt
from flux2.utils.terminal import show
from flux2.utils.text import listed
from flux2.weights import modelspec
from flux2.weights.loading import BaseWeights
from flux2.weights.safetensors_files import tensor_files
from flux2.weights.sources import model_source
from flux2.weights.streaming_writer import check_room, write_safetensors

FORMS = {"diffusers": to_diffusers, "comfyui": to_comfyui, "kohya": to_kohya}
# a length rounded to 8 bits would change the weight more than the update
KEPT_IN_FLOAT32 = (".alpha", ".dora_scale", ".lora_magnitude_vector")
EXACT = 1e-6  # relative error that reading back may have in addition to rounding to the dtype
COARSE = 0.1  # relative error from which a conversion is reported as coarse
# layers that diffusers 0.42 leaves out of kohya's keys, with only a warning, and that it reads wrongly from ComfyUI's
DROPPED = ("guidance_in", "double_stream_modulation", "single_stream_modulation", "final_layer.adaLN")


def say(text: str) -> None:
    show(text, sys.stderr)


def output_path(options: argparse.Namespace) -> Path:
    """Return the path that is written, and replaced if it exists."""
    return options.out / "transformer" if options.format == "full-diffusers" else options.out


def check_options(options: argparse.Namespace) -> None:
    """Raise ValueError for options that are wrong independently of the files."""
    if options.rank is not None:
        checks.integer("--rank", options.rank, 1)
    if options.max_error is not None and not 0 < options.max_error < 1:
        raise ValueError(f"--max-error {options.max_error:g} must be above 0 and below 1, for example 0.01 for 1 %")
    out, target = options.out, output_path(options)
    is_folder = options.format == "full-diffusers"
    if is_folder and (out.suffix == ".safetensors" or out.is_file()):
        raise ValueError(f"--out {out} must be a folder, in which transformer/ is written")
    if not is_folder and out.suffix != ".safetensors":
        raise ValueError(f"--out {out} must end in .safetensors")
    check_target_file((target / "config.json" if is_folder else target).absolute(), f"--out {out}")
    if target.exists() and not options.overwrite:
        raise ValueError(f"--out {target} exists. Choose another name, or replace it with --overwrite")


def check_apart(out: Path, inputs: Iterable[Path]) -> None:
    """Raise ValueError if writing `out` would replace one of the adapters or the base that are read."""
    for place in inputs:
        place = place.resolve()
        if out.resolve() in (place / PEFT_FILE, place, *place.parents):
            raise ValueError(f"--out {out} is an input, or contains one. Choose another name")


Errors = dict[str, tuple[float, float]]  # by layer: norms of the error of a conversion and of what is converted


def overall_error(errors: Errors) -> float:
    """Return the relative error over all layers."""
    error, size = (sum(norm**2 for norm in norms) ** 0.5 for norms in zip(*errors.values(), strict=True))
    return ratio(error, size)


def describe_errors(errors: Errors) -> str:
    relative = {layer: ratio(*norms) for layer, norms in errors.items()}
    worst = max(relative, key=lambda layer: relative[layer])
    return f"{overall_error(errors):.2g} over all {len(errors)} layers, {relative[worst]:.2g} in the worst, {worst}"


@torch.no_grad()
def low_rank(
    updates: Sequence[AdapterDelta], options: argparse.Namespace, base: Callable[[], BaseWeights], device: torch.device
) -> tuple[dict[str, LoraPair], Errors]:
    """Return the sum of adapters as one pair per layer, and the errors of the layers that were approximated."""
    layers = list(dict.fromkeys(layer for update in updates for layer in update.layers))
    is_explicit = options.rank is not None or options.max_error is not None
    if not is_explicit and len(updates) == 1 and updates[0].kind == "DoRA" and options.format == "diffusers":
        if updates[0].scale == 1:
            return dict(updates[0].pairs), {}
        say(f"a DoRA at scale {updates[0].scale:g} is not a DoRA that diffusers can hold: it is converted")
    by_layer = {layer: [update for update in updates if layer in update.layers] for layer in layers}
    converted = [layer for layer in layers if not all(update.is_plain for update in by_layer[layer])]
    pairs: dict[str, LoraPair] = {}
    errors: Errors = {}
    for layer in layers:
        if layer not in converted:
            pairs[layer] = total_pair([update.pair(layer) for update in by_layer[layer]])
            if is_explicit:
                pairs[layer], error, size = reduce_rank(pairs[layer], options.rank, options.max_error)
                errors[layer] = error, size
    rank = options.rank if is_explicit else RANK
    with tqdm(total=len(converted), unit="layer", leave=False, disable=None if converted else True) as bar:

        def convert(layer: str, weight: Tensor | None) -> None:
            delta = deltas.total_change(by_layer[layer], layer, weight, device)
            pairs[layer], error, size = decompose(delta, rank, options.max_error)
            errors[layer] = error, size
            bar.update()

        if any(update.needs_weights for update in updates):
            names = [f"{layer}.weight" for layer in converted]
            base().each(names, device, lambda name, stored: convert(name.removesuffix(".weight"), stored.float()))
        else:
            for layer in converted:
                convert(layer, None)
    if unchanged := sum(not pair.b.any() for pair in pairs.values()):
        where = "all layers" if unchanged == len(pairs) else f"{unchanged} of {len(pairs)} layers"
        say(f"note: nothing changes in {where}: the adapters are zero there, or cancel")
    return pairs, errors


def write_state(
    state: Mapping[str, Tensor],
    options: argparse.Namespace,
    metadata: Mapping[str, str],
    check: Callable[[dict[str, Tensor]], float],
) -> float:
    """Write an adapter's tensors in the requested dtype, read them back and return what `check` makes of them.

    Raises AdapterError for values that are not finite, ValueError if the disk has no room; `check` may raise
    NotReadError. OUT is then unchanged.
    """
    dtype = DTYPES[options.dtype or "fp32"]
    rounded = {
        key: tensor if key.endswith(KEPT_IN_FLOAT32) else tensor.to(dtype).contiguous() for key, tensor in state.items()
    }
    for key, tensor in rounded.items():
        if not bool(torch.isfinite(tensor).all()):
            raise AdapterError(f"{key} would get NaN or infinite values. Use a smaller scale, or another adapter")
    out = options.out
    check_room(out.parent, sum(tensor.nbytes for tensor in rounded.values()), f"--out {out}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(out) as place:
        write_safetensors(place, rounded, metadata)
        return check(load_file(place))


def write_pairs(
    pairs: Mapping[str, LoraPair], options: argparse.Namespace, model: Transformer, metadata: Mapping[str, str]
) -> float:
    """Write a LoRA as `write_state` does; return the largest relative error of a layer."""
    dtype = DTYPES[options.dtype or "fp32"]
    state = FORMS[options.format](pairs)
    return write_state(state, options, metadata, lambda found: compare(from_state(found, model), pairs, dtype))


def write_exact(
    update: AdapterDelta, options: argparse.Namespace, state: Mapping[str, Tensor], about: Mapping[str, Any]
) -> float:
    """Write a type other than LoRA unchanged, as `write_state` does; return the largest relative error of a tensor."""
    dtype = DTYPES[options.dtype or "fp32"]
    metadata = modelspec.metadata(**about) | ({modelspec.COMFY_DORA: "comfyui"} if update.kind == "DoRA" else {})
    return write_state(state, options, metadata, lambda found: compare_tensors(found, state, dtype))


def compare_tensors(written: Mapping[str, Tensor], wanted: Mapping[str, Tensor], dtype: torch.dtype) -> float:
    """Return the largest relative error of a tensor. Raises NotReadError if `dtype` does not explain it."""
    errors = {
        key: ratio(float((written[key].double() - tensor.double()).norm()), float(tensor.double().norm()))
        for key, tensor in wanted.items()
    }
    worst = max(errors, key=lambda key: errors[key])
    if written.keys() != wanted.keys() or errors[worst] > (0 if dtype == torch.float32 else torch.finfo(dtype).eps):
        raise NotReadError(f"{worst} differs after reading back by {errors[worst]:.2g}: nothing was written")
    return errors[worst]


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


def run(options: argparse.Namespace) -> Path:
    """Write the requested file or folder and return OUT. Raises ValueError for invalid options or files."""
    check_options(options)
    device = pick_device(options.device)
    adapters = [split_adapter(adapter) for adapter in options.adapter]
    if with_ranges := [option for option, (*_, ranges) in zip(options.adapter, adapters, strict=True) if ranges]:
        raise ValueError(
            f"{with_ranges[0]}: ranges are not exported, only flux2.generate has them. Give ADAPTER[:SCALE]"
        )
    places = [find(path) for path, *_ in adapters]
    variant, certain = deltas.variant_for(places, options.model)
    model = deltas.skeleton(variant.transformer)
    updates = [deltas.read(place, model, scale) for place, (_, scale, _) in zip(places, adapters, strict=True)]
    deltas.check_together(updates)
    for update in updates:
        say(f"{update.place}{'' if update.scale == 1 else f' at scale {update.scale:g}'}: {update.description()}")
    needed = options.format in FULL or any(update.needs_weights for update in updates)
    if needed and not certain:
        raise ValueError(
            f"the weights of the base are needed, and the adapter does not record it. Give --model {variant.name}, or "
            "another variant of these sizes"
        )
    if not certain:
        say(f"note: the adapter does not record its base; its layers fit {variant.name}. --model writes it to the file")
    source = model_source(variant.name, options.path)

    def base() -> BaseWeights:
        check_apart(output_path(options), [source.file("transformer") or source.folder("transformer")])
        return BaseWeights(model, tensor_files(source, "transformer"), f"the transformer of {variant.name}")

    check_apart(output_path(options), places)
    about: dict[str, Any] = {
        "base": (variant.repo or variant.name) if certain else "",  # what is guessed from sizes is not recorded
        "title": options.title or options.out.stem,
        "lora": options.format not in FULL,
        "diffusers": "diffusers" in options.format,
        "license": variant.license if certain else "",
        "resolution": f"{variant.resolution}x{variant.resolution}" if certain else "",
        "trigger_phrase": options.trigger,
        "usage_hint": f"Trigger word: {options.trigger}" if options.trigger else "",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }
    if options.format in FULL:
        about["merged_from"] = ", ".join([about["base"], *(str(update.place) for update in updates)])
        layout, metadata, dtype = FULL[options.format], modelspec.metadata(**about), DTYPES.get(options.dtype)
        with name_output_in_errors(options.out):
            merged = merge(updates, base(), source, options.out, layout, metadata, dtype, device)
        say(f"merged into {merged}. Read back and compared: equal bit for bit")
        if options.format == "full-diffusers":
            say("this is only the transformer: autoencoder, text encoder and the rest are those of the base")
        return options.out
    is_explicit = options.rank is not None or options.max_error is not None
    if not is_explicit and (reason := exact.obstacle(updates, options.format)) is None:
        with name_output_in_errors(options.out):
            worst = write_exact(updates[0], options, exact.tensors(updates[0], options.format, base, device), about)
        kind, layers = updates[0].kind, updates[0].layers
        readers, others = exact.READERS[kind, options.format]
        if others:
            say(f"note: only {readers} can read this {kind}; for {others}, --rank {RANK} writes a nearly equal LoRA")
        else:
            warn_of_layers(layers, options.format)
        say(f"read back and compared: {kind} on {len(layers)} layers, largest relative error of a tensor {worst:.1e}")
        return options.out
    if not is_explicit and reason:
        say(reason)
    pairs, errors = low_rank(updates, options, base, device)
    if errors:
        kinds = " and ".join(sorted({update.kind for update in updates}))
        action = "brought to" if all(update.is_plain for update in updates) else "converted to a LoRA of"
        size = describe_ranks(pair.a.shape[0] for pair in pairs.values())
        about["description"] = f"{kinds} {action} {size}: relative error {describe_errors(errors)}"
        say(about["description"])
        if overall_error(errors) > COARSE:
            say(f"note: this is coarse, and images will differ: use a larger --rank, or --max-error {COARSE / 10}")
    with name_output_in_errors(options.out):
        worst = write_pairs(pairs, options, model, modelspec.metadata(**about))
    warn_of_layers(list(pairs), options.format)
    say(f"read back and compared: {len(pairs)} layers, largest relative error {worst:.1e}")
    return options.out


@contextmanager
def name_output_in_errors(out: Path) -> Iterator[None]:
    """Context manager that turns `NotWritten`, as for a full disk, into a ValueError that names the option."""
    try:
        yield
    except NotWritten as error:
        raise ValueError(f"--out {error} Nothing was left") from error


def main() -> int:
    try:
        with sigterm_as_interrupt():
            print(run(arguments()))
    except (ValueError, TypeError, OSError) as error:
        say(f"error: {format_error(error)}")
        return 2
    except KeyboardInterrupt as stop:
        say("interrupted")
        return exit_code(stop)
    return 0
