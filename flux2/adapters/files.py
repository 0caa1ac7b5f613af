"""Save, load, merge and restore adapters, in PEFT's format and in those of diffusers, ComfyUI and kohya.

PEFT is the adapter library. `tuners` attaches the types, `formats` converts to and from the other formats. LoRA, rsLoRA
and PiSSA are low-rank pairs, which all formats hold; a DoRA is a pair and magnitudes, which PEFT and diffusers hold;
LoHa, LoKr and OFT are PEFT's only.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flux2.adapters import peft_config, tlora
from flux2.adapters.checksums import config_hash
from flux2.adapters.formats import AdapterError, LoraPair, rescale, to_diffusers
from flux2.adapters.keys import check_dtype
from flux2.adapters.loading import LoadedAdapter, attach_pairs, check_compatible, check_scale, insert, to_peft
from flux2.adapters.reading import PEFT_FILE, PREFIX, read_adapter, read_file, read_tensors, recorded_base
from flux2.adapters.strengths import parse_ranges, strengths
from flux2.adapters.tuners import adapter_layers, adapter_tensors, float_copy, kind_of, remove_adapters
from flux2.layers.fused_lora import INITIAL, subtract_initial
from flux2.models.transformer import Transformer
from flux2.models.variants import find_variant
from flux2.quantization.base import QuantizedLinear
from flux2.utils import checks
from flux2.utils.files import move, name_write_errors, user_path, write_text
from flux2.utils.text import listed
from flux2.weights.modelspec import metadata
from flux2.weights.streaming_writer import write_safetensors

DIFFUSERS_FILE = "diffusers.safetensors"
DIFFUSERS_FOLDER_FILE = "pytorch_lora_weights.safetensors"  # what diffusers itself writes to a folder
PISSA_FILE = "pissa.safetensors"
UNFINISHED_FILE = ".unfinished"  # in a run folder from the start of the run until all that its end writes is there
CHECKPOINT = re.compile(r"step_\d+", re.ASCII)  # name of a checkpoint's folder
PEFT_ALONE = ("LoHa", "LoKr", "OFT", "T-LoRA")  # types that no other format holds


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that are trained."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Context manager in which `model` computes as if it had no adapters, bit for bit."""
    before = {layer: layer._disable_adapters for layer in adapter_layers(model).values()}
    try:
        for layer in before:
            layer._disable_adapters = True
        yield
    finally:
        for layer, value in before.items():
            layer._disable_adapters = value


def layer_pairs(model: nn.Module, name: str = "default") -> dict[str, LoraPair]:
    """Return the adapter `name` as pairs by our layer names, in float32 on the CPU.

    Raises AdapterError for a type that is not a low-rank pair (LoHa, LoKr, OFT).
    """
    pairs = {}
    for layer, module in adapter_layers(model).items():
        if not isinstance(module, LoraLayer):
            raise AdapterError(f"{layer}: a {kind_of(module)} adapter is not a low-rank pair")
        if name in module.lora_A:
            a, b = module.lora_A[name].weight.detach(), module.lora_B[name].weight.detach()
            if name + INITIAL in module.lora_A:
                first_a, first_b = module.lora_A[name + INITIAL].weight, module.lora_B[name + INITIAL].weight
                a, b = subtract_initial(a, b, first_a, first_b)
            pairs[layer] = LoraPair(a.float().cpu(), b.float().cpu() * module.scaling[name])
            if name in module.lora_magnitude_vector:
                magnitude = module.lora_magnitude_vector[name].weight.detach().float().cpu()
                pairs[layer] = replace(pairs[layer], magnitude=magnitude)
    return pairs


def save(wrapped: peft.PeftModel, folder: Path, *, base: str, license: str = "", name: str = "default") -> None:
    """Write the adapter in PEFT's format (adapter_model.safetensors, adapter_config.json), and diffusers.safetensors if
    diffusers has a format for its type.

    A PiSSA is written as the equivalent plain LoRA of twice the rank; pissa.safetensors holds what resuming its
    training needs.

    Args:
        folder: Created if absent. Each file is complete or absent, and if adapter_model.safetensors exists, the other
            files belong to it.
        base: The variant that the adapter was trained on.
        license: License of the base model if it restricts the use of the adapter; kept in the file's metadata.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = wrapped.get_base_model()
    wrapped.peft_config[name].base_model_name_or_path = base
    scheduled = tlora.header(model)
    kind = "PiSSA" if name + INITIAL in wrapped.peft_config else peft_config.type_name(wrapped.peft_config[name])
    kind = "T-LoRA" if scheduled else kind
    with (
        tempfile.TemporaryDirectory(dir=folder, prefix=".saving-") as scratch,
        name_write_errors(folder, Path(scratch)),
    ):
        written = Path(scratch)
        if kind == "PiSSA":
            save_pissa(model, written, base, name)
        else:
            # save_embedding_layers=False: PEFT would query the Hub to see whether embeddings were resized
            with name_write_errors(written / PEFT_FILE):
                wrapped.save_pretrained(scratch, selected_adapters=[name], save_embedding_layers=False)
            written = written if name == "default" else written / name  # PEFT writes other names to a subfolder
        # PEFT's file again, with checksums in its header; the first is renamed, because its tensors are mapped from it
        unsealed = written / f".{PEFT_FILE}"
        move(written / PEFT_FILE, unsealed)
        peft_config.sort_layers(written)
        write_safetensors(
            written / PEFT_FILE, load_file(unsealed), {"format": "pt", **config_hash(written), **scheduled}
        )
        unsealed.unlink()
        write_text(written / "README.md", adapter_card(base, license, kind))  # replaces PEFT's empty template
        if kind not in PEFT_ALONE:
            state = to_diffusers(layer_pairs(model, name))
            about = metadata(base=base, title=f"{kind} for {base}", lora=True, diffusers=True, license=license)
            write_safetensors(written / DIFFUSERS_FILE, state, about)
        (folder / PEFT_FILE).unlink(missing_ok=True)  # its presence means that all files are those of one adapter
        files = [path for path in written.iterdir() if path.is_file()]
        for stale in {DIFFUSERS_FILE, PISSA_FILE} - {file.name for file in files}:
            (folder / stale).unlink(missing_ok=True)
        readable = (written / "README.md").stat().st_mode  # follows the umask; PEFT's file was for the owner only
        for file in files:
            file.chmod(readable)
        for file in sorted(files, key=lambda path: path.name == PEFT_FILE):
            move(file, folder / file.name)


def save_pissa(model: nn.Module, folder: Path, base: str, name: str) -> None:
    """Write PEFT's two files of the plain LoRA, and the trained weights with their initial values."""
    config, state = to_peft(layer_pairs(model, name))
    config.base_model_name_or_path, config.inference_mode = base, True
    config.save_pretrained(str(folder))
    with name_write_errors(folder / PEFT_FILE):
        save_file({PREFIX + key: tensor for key, tensor in state.items()}, folder / PEFT_FILE)
    both = {key: tensor.detach().cpu().contiguous() for key, tensor in pissa_tensors(model, name).items()}
    write_safetensors(folder / PISSA_FILE, both, {"format": "pt"})


def pissa_tensors(model: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """Return the trained weights of a PiSSA and their initial values, by the keys of pissa.safetensors."""
    began = {f"began.{key}": tensor for key, tensor in adapter_tensors(model, name + INITIAL).items()}
    return adapter_tensors(model, name) | began


def adapter_card(base: str, license: str, kind: str = "LoRA") -> str:
    """Return the README.md of a saved adapter, with the metadata that the Hub reads."""
    hub = f"base_model: {base}\n" if "/" in base else ""
    terms = f"\nThe base model's license, {license}, applies to what is made with this adapter.\n" if license else ""
    files = f"- `{PEFT_FILE}`, `adapter_config.json`: PEFT, layers named as Black Forest Labs names them\n"
    if kind == "PiSSA":
        files += f"- `{PISSA_FILE}`: only for resuming its training; the other files are a plain LoRA\n"
    if kind not in PEFT_ALONE:
        weights = f'weight_name="{DIFFUSERS_FILE}"'
        files += f"- `{DIFFUSERS_FILE}`: for diffusers' `pipeline.load_lora_weights(folder, {weights})`\n"
    convert = ", and `python -m flux2.export FOLDER --format comfyui --out FILE` converts it"
    if kind == "T-LoRA":
        files += "\nOther programs would use all of its directions at every timestep, which is another adapter.\n"
        convert = ""
    return (
        f"---\n{hub}tags:\n- lora\n- flux2\n---\n# {kind} for {base}\n{terms}\n{files}"
        f"\n`python -m flux2.generate --prompt ... --adapter FOLDER` generates images with it{convert}.\n"
    )


def format_notes(folder: Path) -> str:
    """Return one line on which programs cannot read the adapter in `folder`; empty if all can."""
    kind = peft_config.type_name(peft_config.read_config(folder))
    if tlora.read_schedule(read_file(folder)[1]) is not None:
        return "only flux2.generate reads this T-LoRA: other programs would use all directions at every timestep"
    if kind not in (*PEFT_ALONE, "DoRA"):
        return ""
    own = "PEFT, flux2.generate and diffusers" if kind == "DoRA" else "PEFT and flux2.generate"
    exact = {"DoRA": "ComfyUI", "LoHa": "ComfyUI", "LoKr": "ComfyUI and diffusers"}.get(kind)
    musubi = "" if kind == "DoRA" else ", and with `--format kohya` for musubi-tuner"
    others = {"DoRA": "kohya", "LoKr": "", "LoHa": "diffusers"}.get(kind, "diffusers, ComfyUI and kohya")
    command = f"`python -m flux2.export {folder} --format"
    unchanged = f"; {command} comfyui --out FILE` writes it unchanged for {exact}{musubi}" if exact else ""
    converted = f"; {command} ... --out FILE` converts it to a nearly equal LoRA for {others}" if others else ""
    return f"only {own} read this {kind}{unchanged}{converted}"


def find(path: str | Path) -> Path:
    """Return what to load for `path`: a safetensors file, or a PEFT folder, possibly inside a run or checkpoint.

    A run stands for its adapter, or its newest checkpoint, also if it has not ended and its adapter is older, from
    before it was made longer. A folder of diffusers stands for its pytorch_lora_weights.safetensors.
    """
    place = user_path(path)
    if place.is_file():  # PEFT's file is of no use without the configuration next to it
        return place.parent if place.name == PEFT_FILE else place
    steps = [step for step in place.glob("checkpoints/step_*") if CHECKPOINT.fullmatch(step.name)]
    saved = [step / "adapter" for step in sorted(steps, key=lambda step: int(step.name[5:]), reverse=True)]
    found = [folder for folder in (place, place / "adapter", *saved) if (folder / PEFT_FILE).exists()]
    if (place / UNFINISHED_FILE).exists() and found[:1] == [place / "adapter"] and len(found) > 1:
        return max(found[:2], key=lambda folder: (folder / PEFT_FILE).stat().st_mtime_ns)
    if found:
        return found[0]
    if (place / DIFFUSERS_FOLDER_FILE).is_file():
        return place / DIFFUSERS_FOLDER_FILE
    what = "no adapter was found in this folder" if place.exists() else "does not exist"
    if files := [file.name for file in place.glob("*.safetensors")]:
        what += f", but files that may be one ({listed(files)})"
    raise AdapterError(
        f"adapter {str(path)!r}: {what}. Give an adapter folder (adapter_model.safetensors), a run folder, or a "
        ".safetensors file"
    )


def base_hint(place: Path, model: Transformer) -> str:
    """Return a sentence about the recorded base if its sizes differ from `model`, otherwise an empty string."""
    try:
        base = find_variant(recorded_base(place))
    except ValueError:
        return ""
    return "" if base is None or base.transformer == model.config else f" Its recorded base is {base.name}."


def load(
    model: Transformer, path: str | Path, *, name: str = "default", scale: float = 1.0, ranges: str = ""
) -> LoadedAdapter:
    """Attach the adapter at `path` to `model` for inference, in place, with its update multiplied by `scale`.

    `ranges` are factors on the scale for blocks and times (`flux2.adapters.strengths`).

    `path` is a PEFT folder, a run folder or checkpoint that holds one, or a .safetensors file of another program
    (docs/adapters.md lists them). Adapters that the model has already stay active. Raises AdapterError for an adapter
    that cannot be used, TypeError or ValueError for an invalid scale; `model` is then unchanged.
    """
    scale = checks.number("scale", scale)
    parsed = parse_ranges(ranges, model.config)
    place = find(path)
    try:
        stored = read_adapter(place, model)
        check_compatible(model, stored.kind)
        check_scale(stored.kind, scale, ranges)
        parsed.check_layers(stored.layers)
        if stored.config is None:
            attach_pairs(model, stored.pairs, name, scale, parsed)
            if stored.schedule is not None:
                tlora.set_schedule(model, stored.schedule)
        else:
            state = {f"{layer}.{key}": one for layer, found in stored.tensors.items() for key, one in found.items()}
            insert(model, stored.config, state, name, scale, parsed)
    except ValueError as error:
        text = str(error) + base_hint(place, model)
        raise AdapterError(text if text.startswith("adapter ") else f"adapter {place}: {text}") from error
    return LoadedAdapter(stored.kind, stored.layers, stored.ranks, stored.note, name, str(path), scale, ranges)


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """Add the active adapters to the weights of `model`, in place, and remove all adapters.

    The sum is computed in float32 and rounded once, to the dtype of the weight. A bfloat16 weight does not change by
    less than 0.2 to 0.4 % of itself; quantized weights would lose most of the update and are refused.

    Raises AdapterError, leaving the model unchanged, if a layer is quantized, blocks are offloaded, an adapter is
    merged already, or a weight would not be finite. Sums of which that is not certain beforehand are computed twice.
    """
    if isinstance(model, peft.PeftModel):
        model = model.get_base_model()
    if isinstance(model, Transformer) and model.has_offloaded_blocks:
        raise AdapterError(
            "cannot merge while blocks are offloaded to host memory, because their copies on the device would not "
            "change. Load the model with offload_blocks=0"
        )
    layers = adapter_layers(model)
    for name, module in layers.items():
        if isinstance(base := module.get_base_layer(), QuantizedLinear):
            raise AdapterError(f"cannot merge into {name}: {base.refusal}")
        if kind_of(module) == "T-LoRA":
            raise AdapterError(f"cannot merge into {name}: the rank of a T-LoRA depends on the timestep")
        if module.merged or any(getattr(module, "lora_bias", {}).values()):
            raise AdapterError(f"cannot merge into {name}: its adapter is merged already, or has a bias")
    for name, module in layers.items():
        if is_certainly_finite(module):
            continue
        # processors differ in whether a scale is applied before or after the product, and in what NaN does as one
        scales = [getattr(module, "scaling", {}).get(adapter, 1.0) for adapter in module.active_adapters]
        merged = merged_weight(module).to(module.get_base_layer().weight.dtype)
        if not all(map(math.isfinite, scales)) or not bool(torch.isfinite(merged).all()):
            raise AdapterError(
                f"cannot merge into {name}: its weight would get NaN or infinite values, because the base has them or "
                "the adapters overflow. Use a smaller scale, or another adapter"
            )
    for name, strength in strengths(model).items():
        if strength.ranges.times:
            raise AdapterError(f"cannot merge {name}: its strength depends on the time, and a weight has one value")
    for module in layers.values():
        base = module.get_base_layer()
        base.weight.data = merged_weight(module).to(base.weight.dtype)
    remove_adapters(model)


def is_certainly_finite(layer: Any) -> bool:
    """Whether a bound shows that the weight of a layer with its LoRAs is finite: an element of B A is at most the
    length of a row of B times that of a column of A. It takes a fraction of the sum's time.
    """
    if kind_of(layer) != "LoRA":
        return False
    weight = layer.get_base_layer().weight
    smallest, largest = weight.aminmax()
    bound = max(-float(smallest), float(largest))
    for adapter in layer.active_adapters:
        if adapter in layer.lora_A:
            a, b = layer.lora_A[adapter].weight.float(), layer.lora_B[adapter].weight.float()
            # at least once: the product is computed before it is scaled
            bound += max(abs(layer.scaling[adapter]), 1) * float(a.norm(dim=0).max()) * float(b.norm(dim=1).max())
    return bound < torch.finfo(weight.dtype).max / 2  # half, because of rounding; false for NaN


def merged_weight(layer: Any) -> Tensor:
    """Return the weight of a layer with its active adapters, in float32."""
    weight = layer.get_base_layer().weight.float()
    if kind_of(layer) == "LoRA":
        for adapter in layer.active_adapters:
            if adapter in layer.lora_A:
                a, b = layer.lora_A[adapter].weight.float(), layer.lora_B[adapter].weight.float()
                weight = torch.addmm(weight, b, a, alpha=layer.scaling[adapter])
        return weight
    for adapter, magnitude in getattr(layer, "lora_magnitude_vector", {}).items():
        if magnitude.weight.ndim > 1:  # lengths of columns, which PEFT does not know
            delta = layer.scaling[adapter] * (layer.lora_B[adapter].weight @ layer.lora_A[adapter].weight)
            return weight + magnitude.strength * (rescale(weight + delta, magnitude.weight) - weight)
    base, layer.base_layer = layer.base_layer, float_copy(layer, weight.device)
    layer.base_layer.weight.data = weight.clone()  # PEFT merges in place
    try:
        layer.merge()
        found = layer.base_layer.weight.detach()
    finally:
        layer.base_layer = base
        layer.merged_adapters.clear()
    strengths = [getattr(one, "strength", 1.0) for one in getattr(layer, "lora_magnitude_vector", {}).values()]
    return found if set(strengths) <= {1.0} else weight + strengths[0] * (found - weight)


def restore(wrapped: peft.PeftModel, folder: Path, name: str = "default") -> None:
    """Put the weights saved in `folder` into the attached adapter, bit for bit, to resume its training.

    Raises AdapterError, leaving the adapter unchanged, unless type, layers and shapes are equal.
    """
    model = wrapped.get_base_model()
    if name + INITIAL in wrapped.peft_config:
        if not (folder / PISSA_FILE).exists():
            raise AdapterError(f"{folder} holds no PiSSA that can be resumed: {PISSA_FILE} is missing")
        state, current = load_file(folder / PISSA_FILE), pissa_tensors(model, name)
    else:
        state, current = read_tensors(folder), adapter_tensors(model, name)
    if current.keys() != state.keys():
        raise AdapterError(
            f"{folder} holds an adapter of another type, or of other layers than adapter.targets: "
            f"{listed(current.keys() ^ state.keys())}"
        )
    for key, tensor in state.items():
        check_dtype(key, tensor)
        if tensor.shape != current[key].shape:
            raise AdapterError(
                f"{folder}: {key} has shape {tuple(tensor.shape)} instead of {tuple(current[key].shape)}: it belongs "
                "to another model or another adapter.rank"
            )
    for key, tensor in state.items():
        current[key].data.copy_(tensor)
