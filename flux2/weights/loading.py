"""Fill a model with a published one's weights.

Two namings are read for the transformer and the autoencoder: diffusers' and Black Forest Labs' own, which is also ours
(flux2/weights/key_names.py); weights may be quantized in the file (flux2/weights/prequantized.py). Models are built on
the meta device and filled tensor by tensor, quantized on the way where a layer is kept so, while threads read the next
ones (flux2/weights/parallel_reader.py): host memory never holds more than two tensors beside the model. Loading is
strict: missing, unexpected and misshaped tensors are one error that lists them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from flux2.models.autoencoder import Autoencoder
from flux2.models.text_encoder import Storage, TextEncoder, build, check_storage, load_tokenizer, quantize
from flux2.models.transformer import Transformer
from flux2.models.variants import TextConfig
from flux2.quantization.base import QuantizedLinear
from flux2.quantization.precision import Precision, convert
from flux2.utils.text import listed
from flux2.weights.key_names import PublishedTensor, autoencoder_tensor, transformer_tensor
from flux2.weights.parallel_reader import Digests, ReadTask, group_by_module, run_tasks
from flux2.weights.prequantized import MARKER, Weight, find_part
from flux2.weights.quantized_cache import QuantizedCache, set_tensor
from flux2.weights.safetensors_files import TensorFiles, tensor_files
from flux2.weights.sources import ModelSource, WeightsError, fingerprint


def check_names(
    what: str, files: TensorFiles, missing: set[str], unexpected: set[str], misshaped: Sequence[str]
) -> None:
    problems = [
        f"{len(names)} {kind}: {listed(names)}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("misshaped", misshaped))
        if names
    ]
    if problems:
        raise WeightsError(f"{files.place} does not hold {what}: " + "; ".join(problems))


@runtime_checkable
class StoresWeight(Protocol):
    """A linear layer that takes a float weight (out_features, in_features) and keeps it in a form of its own."""

    in_features: int
    out_features: int

    def store(self, weight: Tensor) -> None: ...


def expected_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Names and shapes of the tensors that a model is filled with.

    They are its parameters and buffers; of a module with a method `store`, a `weight` in their place.
    """
    stores = {name: module for name, module in model.named_modules() if isinstance(module, StoresWeight)}
    own = tuple(f"{name}." for name in stores)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if not name.startswith(own)}
    return shapes | {
        f"{name}.weight": torch.Size((module.out_features, module.in_features)) for name, module in stores.items()
    }


@dataclass
class FillCounts:
    """How many of a model's layers were stored in their own form, and how the file held its weights.

    Attributes:
        quantized: layers whose weight was quantized now.
        taken_over: layers whose weight was in their form in the file.
        dequantized: tensors that were quantized in the file and are in another form here.
        unused: tensors of the file that belong to weights and are not used: scales of inputs.
    """

    quantized: int = 0
    kept: int = 0
    dequantized: int = 0
    unused: int = 0

    def description(self, files: TensorFiles) -> str:
        """One line about a file that is quantized already; empty for others."""
        if not self.kept and not self.dequantized:
            return ""
        text = f"{files.place} is quantized: {self.kept} layers are kept as they are there"
        text += f", {self.dequantized} tensors are dequantized" if self.dequantized else ""
        return text + (f", {self.unused} scales of inputs are not used" if self.unused else "")


def device_chooser(host: Sequence[str], device: torch.device) -> Callable[[str], torch.device]:
    """Where the tensor or module of a name stays: in host memory if it is one of the modules `host` or in it."""
    inside = tuple(f"{module}." for module in host)
    return lambda name: torch.device("cpu") if name.startswith(inside) else device


def fill(
    model: nn.Module,
    files: TensorFiles,
    published: Mapping[str, PublishedTensor],
    what: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    ignored: Callable[[str], bool] = lambda name: False,
    host: Sequence[str] = (),
    digests: Digests | None = None,
    modules: Mapping[str, Callable[[], None]] | None = None,
) -> FillCounts:
    """Fill a model built on the meta device.

    Args:
        model: every tensor of `taken(model)` is filled. A module with a method `store` is given its weight in the
            file's dtype, or in `dtype` if it is quantized in the file.
        published: for each of these names, where it is in `files`.
        what: the model's name in errors.
        device, dtype: of the filled tensors; integers keep their dtype.
        ignored: names in `files` that may stay unread.
        host: modules whose tensors stay in host memory; they are quantized on `device` all the same.
        digests: gets the checksums of all that is read.
        modules: by name, those that are filled one after the other; what one maps to is called once it is filled.
    """
    device = torch.device(device)
    home = device_chooser(host, device)
    shapes = expected_shapes(model)
    weights, missing = {}, set()
    misshaped, unused = [], 0
    unread = {name for name in files.names if not ignored(name) and name.rpartition(".")[2] != MARKER}
    for name, entry in published.items():
        parts = [find_part(files, key) for key in entry.names]
        missing |= {key for key, part in zip(entry.names, parts, strict=True) if part is None}
        there = [part for part in parts if part is not None]
        for part in there:
            unread -= part.names
            unused += len(part.unused)
        if len(there) == len(parts):
            weights[name] = Weight(entry, tuple(there))
            if weights[name].shape != shapes[name]:
                shape = tuple(weights[name].shape)
                misshaped.append(f"{entry.names[0]} {shape} instead of {tuple(shapes[name])}")
    check_names(what, files, missing, unread, misshaped)
    check_floats(model, weights)

    filled = FillCounts(unused=unused)

    def job(name: str, weight: Weight) -> ReadTask:
        stays = home(name)
        stores = isinstance(model.get_submodule(name.rpartition(".")[0]), StoresWeight)
        reads = weight.reads(device if stores or not weight.plain else stays)
        return ReadTask(reads, lambda tensors: store_weight(model, name, weight, tensors, dtype, stays, filled))

    run_tasks(group_by_module({name: job(name, weight) for name, weight in weights.items()}, modules or {}), digests)
    files.check_unchanged()
    left = {name for name, tensor in model.state_dict().items() if tensor.is_meta}
    left |= {name for name, parameter in model.named_parameters() if parameter.is_meta}
    assert not left, f"not filled: {listed(left)}"
    return filled


def check_floats(model: nn.Module, weights: Mapping[str, Weight]) -> None:
    """Raises WeightsError for whole numbers in a file where the model has floats: a cast would hide what is wrong."""
    kept = model.state_dict()
    for name, weight in weights.items():
        for part in weight.parts:
            stored = part.stored["weight"]
            wants_float = name not in kept or kept[name].is_floating_point()
            if part.form == "plain" and wants_float and not stored.dtype.is_floating_point:
                raise WeightsError(
                    f"{part.description} is in {stored.dtype}, and a weight is a float: these are other files"
                )


def store_weight(
    model: nn.Module,
    name: str,
    weight: Weight,
    tensors: dict[str, Tensor],
    dtype: torch.dtype | None,
    stays: torch.device,
    filled: FillCounts,
) -> None:
    """Put what was read of `weight` where the model keeps what is called `name`, and count it in `filled`."""
    module = model.get_submodule(name.rpartition(".")[0])
    if isinstance(module, QuantizedLinear) and weight.keep_stored_form(module, tensors):
        filled.kept += 1
        module.to(stays)
        return
    tensor = weight.dequantized(tensors, dtype or torch.float32)
    tensors.clear()
    filled.dequantized += not weight.plain
    if isinstance(module, StoresWeight):
        try:
            module.store(tensor)
        except ValueError as error:
            raise WeightsError(f"{weight.parts[0].description} cannot be used: {error}") from error
        filled.quantized += 1
        module.to(stays)
    else:
        set_tensor(model, name, tensor.to(stays, dtype if tensor.is_floating_point() else None).contiguous())


def transformer_names(model: nn.Module, files: TensorFiles) -> tuple[dict[str, PublishedTensor], Callable[[str], bool]]:
    """Where each tensor of a transformer, or a part of it, is in `files`, and which names there are of other models."""
    prefix = next((p for p in ("model.diffusion_model.", "diffusion_model.") if f"{p}img_in.weight" in files.names), "")
    if f"{prefix}img_in.weight" in files.names:  # Black Forest Labs' names, perhaps with ComfyUI's prefix
        published = {name: PublishedTensor((prefix + name,)) for name in expected_shapes(model)}
    else:
        published = {name: transformer_tensor(name) for name in expected_shapes(model)}
    return published, lambda name: bool(prefix) and not name.startswith(prefix)


def load_transformer(
    source: ModelSource,
    device: torch.device | str = "cpu",
    precision: Precision | torch.dtype = torch.float32,
    *,
    cache: Path | None = None,
    host: Sequence[str] = (),
    say: Callable[[str], None] = print,
    ready: Callable[[nn.Module], None] | None = None,
) -> Transformer:
    """The transformer on `device` in `precision`, or all of it in one dtype, frozen, in evaluation mode.

    Args:
        cache: folder of quantized copies (flux2/weights/quantized_cache.py). If it holds one of these files in this
        precision,
            that is loaded in their place; otherwise one is made, if anything was quantized. None: no copies.
        host: modules (`single_blocks.3`) that stay in host memory; they are quantized on `device` all the same.
        say: is told, in a line each, of copies read and written, and of files that are quantized.
        ready: is called with each block as soon as it is filled, and at the end with the model. It may replace their
            parameters, to keep a share of them; then no copy of what was quantized is made.
    """
    if isinstance(precision, torch.dtype):
        precision = Precision(precision)
    device = torch.device(device)

    def build() -> Transformer:
        with torch.device("meta"):
            model = Transformer(source.variant.transformer)
            convert(model, precision, device)
        return model.eval()

    def blocks(model: Transformer) -> dict[str, Callable[[], None]]:
        if ready is None:
            return {}
        return {name: partial(ready, model.get_submodule(name)) for name in model.config.block_names}

    files = tensor_files(source, "transformer")
    model = build()
    copies, found = None, False
    if cache is not None and precision.storage is not None:
        copies = QuantizedCache(cache, source.variant.name, files, model, precision, say)
        found = copies.read(model, device_chooser(host, device), blocks(model))
        if not found:
            model = build()  # what was read of a damaged copy is not kept
    if not found:
        published, ignored = transformer_names(model, files)
        digests = Digests() if copies is not None and ready is None else None
        what = f"the transformer of {source.variant.name}"
        filled = fill(model, files, published, what, device, precision.dtype, ignored, host, digests, blocks(model))
        if told := filled.description(files):
            say(told)
        if copies is not None and digests is not None and filled.quantized:
            copies.write(model, digests)
    if ready is not None:
        ready(model)
    return model


def load_text_projection(source: ModelSource, device: torch.device | str, dtype: torch.dtype) -> nn.Linear:
    """The transformer's first layer on embeddings, `txt_in`, alone: (.., text_width) -> (.., hidden)."""
    with torch.device("meta"):
        whole = Transformer(source.variant.transformer)
    model = nn.Module()
    model.txt_in = whole.txt_in
    files = tensor_files(source, "transformer")
    published, _ = transformer_names(model, files)
    fill(model, files, published, f"txt_in of {source.variant.name}", device, dtype, ignored=lambda name: True)
    assert isinstance(whole.txt_in, nn.Linear)
    return whole.txt_in


def load_autoencoder(
    source: ModelSource, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Autoencoder:
    """The autoencoder on `device` in `dtype`, frozen, in evaluation mode."""
    config = source.variant.autoencoder
    with torch.device("meta"):
        model = Autoencoder(config)
    model.bn.num_batches_tracked = None  # only training it would need the count
    files = tensor_files(source, "vae")
    if "encoder.down.0.block.0.conv1.weight" in files.names:
        published = {name: PublishedTensor((name,)) for name in expected_shapes(model)}
    else:
        published = {name: autoencoder_tensor(name, len(config.widths)) for name in expected_shapes(model)}
    fill(
        model,
        files,
        published,
        f"the autoencoder of {source.variant.name}",
        device,
        dtype,
        ignored=lambda name: name == "bn.num_batches_tracked",
    )
    return model.eval()


def load_text_encoder(
    source: ModelSource,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    storage: Storage | None = None,
) -> TextEncoder:
    """The text encoder's layers that are read, on `device` in `dtype`, with its tokenizer.

    With `storage` the linears are quantized one by one while they are loaded; what is NF4 in the file is then taken
    over as it is. Raises ValueError for a `storage` that there is not, WeightsError for files that are not the model's.
    """
    check_storage(storage, "storage")
    files = tensor_files(source, "text_encoder")
    folder = source.folder("text_encoder")
    text = source.variant.text
    config_file = folder / "config.json"
    if not config_file.exists():
        raise WeightsError(f"{folder} holds no config.json")
    try:
        with torch.device("meta"):
            model = build(json.loads(config_file.read_text()), text)
        if storage is not None:
            quantize(model, storage, dtype)
    except ValueError as error:
        raise WeightsError(f"{folder}: {error}") from error
    width = len(text.layers) * model.get_parameter("embed_tokens.weight").shape[1]
    takes = source.variant.transformer.text_width
    if width != takes:
        raise WeightsError(
            f"{folder} makes embeddings of width {width}, {source.variant.name} takes {takes}: it is another model's"
        )
    prefix = language_prefix(files)
    read = {name: PublishedTensor((prefix + name,)) for name in expected_shapes(model)}
    fill(model, files, read, f"the text encoder of {source.variant.name}", device, dtype, ignored=lambda name: True)
    rebuild_rotary(model, device)
    return TextEncoder(model, load_tokenizer(source.folder("tokenizer")), text)


def language_prefix(files: TensorFiles) -> str:
    """What precedes the names of a language model's own tensors in `files`. Raises WeightsError if there is none."""
    # saved as a language model, as part of a vision-language model, or as such by newer versions of transformers
    prefixes = ("model.language_model.", "language_model.model.", "model.", "")
    prefix = next((p for p in prefixes if f"{p}embed_tokens.weight" in files.names), None)
    if prefix is None:
        raise WeightsError(f"{files.place} holds no language model: no tensor ends in embed_tokens.weight")
    return prefix


def text_encoder_fingerprint(source: ModelSource) -> str:
    """A digest of the text encoder's and the tokenizer's files. Raises WeightsError if they are not there."""
    return fingerprint(source, "text_encoder") + fingerprint(source, "tokenizer")


def embedding_identity(
    text: TextConfig, files: str, length: int, dtype: torch.dtype, storage: Storage | None = None
) -> str:
    """What an embedding depends on beside its prompt, the same on any machine; `files` is their fingerprint."""
    return f"{text.kind} {files} {text.layers} {length} {dtype}" + (f" {storage}" if storage else "")


def rebuild_rotary(model: nn.Module, device: torch.device | str) -> None:
    """Recompute the rotary tables, which no file stores and the meta device left empty."""
    rotary = model.get_submodule("rotary_emb")
    with torch.device(device):
        model.rotary_emb = type(rotary)(model.config)
