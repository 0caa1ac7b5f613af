"""Fill models with published weights.

Two naming schemes are read for the transformer and the autoencoder: diffusers' and Black Forest Labs', which is also
ours (flux2/weights/key_names.py). Weights may be quantized in the file (flux2/weights/prequantized.py). Models are
built on the meta device and filled tensor by tensor, quantized on the way if the layer is quantized, while threads read
the next ones (flux2/weights/parallel_reader.py): host memory holds at most two tensors in addition to the model.
Loading is strict: missing, unexpected and misshaped tensors are one error that lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from flux2.models.autoencoder import Autoencoder
from flux2.models.text_encoder import TextEncoder, build, check_storage, load_tokenizer, quantize_text_encoder
from flux2.models.transformer import Transformer
from flux2.models.variants import TextConfig
from flux2.quantization.base import QuantizedLinear
from flux2.quantization.precision import Precision, convert
from flux2.utils.choices import TextStorage
from flux2.utils.json_files import read_json
from flux2.utils.text import listed
from flux2.weights.key_names import PublishedTensor, autoencoder_tensor, transformer_tensor
from flux2.weights.parallel_reader import Digests, ReadTask, group_by_module, run_tasks
from flux2.weights.prequantized import MARKER, Weight, check_formats, find_part
from flux2.weights.quantized_cache import QuantizedCache, plain_tensors, quantized_layers, set_tensor
from flux2.weights.safetensors_files import TensorFiles, tensor_files
from flux2.weights.sources import ModelSource, WeightsError, fingerprint


def expected_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Return names and shapes of the tensors that a model is filled with.

    These are its parameters and buffers; a quantized layer has a `weight` instead of its storage.
    """
    weights = {f"{name}.weight": layer.weight.shape for name, layer in quantized_layers(model).items()}
    return {name: tensor.shape for name, tensor in plain_tensors(model).items()} | weights


@dataclass
class FillCounts:
    """How many layers of a model were stored in their own format, and how the file stores the weights."""

    quantized: int = 0  # layers whose weight was quantized now
    kept: int = 0  # layers whose weight had their format in the file
    dequantized: int = 0  # tensors that were quantized in the file and have another format here
    unused: int = 0  # scales of inputs in the file, which belong to weights and are not used

    def description(self, files: TensorFiles) -> str:
        """Return one line about a file that is quantized already; empty for other files."""
        if not self.kept and not self.dequantized:
            return ""
        text = f"{files.place} is quantized: {self.kept} layers keep the stored format"
        text += f", {self.dequantized} tensors are dequantized" if self.dequantized else ""
        return text + (f", {self.unused} input scales are not used" if self.unused else "")


def device_chooser(
    host: Sequence[str], device: torch.device, devices: Mapping[str, torch.device] | None = None
) -> Callable[[str], torch.device]:
    """Return a function that maps a name to its device: by the module in `host` (the CPU) or `devices`, else `device`.

    The modules are children of the model or elements of its lists: `final_layer`, `double_blocks.0`.
    """
    places = {**(devices or {}), **dict.fromkeys(host, torch.device("cpu"))}

    def device_of(name: str) -> torch.device:
        child, _, rest = name.partition(".")
        return places.get(f"{child}.{rest.partition('.')[0]}", places.get(child, device))

    return device_of


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
    devices: Mapping[str, torch.device] | None = None,
) -> FillCounts:
    """Fill a model built on the meta device.

    Args:
        model: The model; every tensor of `expected_shapes(model)` is filled. A quantized layer receives its weight in
            the file's dtype, or in `dtype` if it is quantized in the file.
        published: The location of each of these names in `files`.
        what: Name of the model in errors.
        device, dtype: Device and dtype of the filled tensors; integers keep their dtype.
        ignored: Returns whether a name in `files` may stay unread.
        host: Modules whose tensors stay in host memory; they are still quantized on `device`.
        digests: Receives the checksums of everything that is read.
        devices: Devices of the modules, by name, that are not on `device`.
        modules: Modules, by name, that are filled one after the other; the value is called when its module is filled.
    """
    device = torch.device(device)
    device_of, quantizes_on = device_chooser(host, device, devices), device_chooser((), device, devices)
    weights = match_weights(model, files, published, ignored, what)
    filled = FillCounts(unused=sum(len(part.unused) for one in weights.values() for part in one.parts))

    def read_task(name: str, weight: Weight) -> ReadTask:
        module, final_device = model.get_submodule(name.rpartition(".")[0]), device_of(name)

        def store(tensors: dict[str, Tensor]) -> None:
            if isinstance(module, QuantizedLinear) and weight.keep_stored_form(module, tensors):
                filled.kept += 1
                module.to(final_device)
                return
            tensor = weight.dequantized(tensors, dtype or torch.float32)
            tensors.clear()
            filled.dequantized += not weight.is_plain
            if not isinstance(module, QuantizedLinear):
                tensor = tensor.to(final_device, dtype if tensor.is_floating_point() else None)
                set_tensor(model, name, tensor.contiguous())
                return
            try:
                module.store(tensor)
            except ValueError as error:
                raise WeightsError(f"{weight.parts[0].description} cannot be used: {error}") from error
            filled.quantized += 1
            module.to(final_device)

        is_converted = isinstance(module, QuantizedLinear) or not weight.is_plain
        return ReadTask(weight.reads(quantizes_on(name) if is_converted else final_device), store)

    tasks = {name: read_task(name, weight) for name, weight in weights.items()}
    run_tasks(group_by_module(tasks, modules or {}), digests)
    files.check_unchanged()
    assert not any(tensor.is_meta for tensor in model.state_dict().values()), "a tensor was not filled"
    return filled


def match_weights(
    model: nn.Module,
    files: TensorFiles,
    published: Mapping[str, PublishedTensor],
    ignored: Callable[[str], bool],
    what: str,
) -> dict[str, Weight]:
    """Return where the tensors of `model` are in `files`, by our names; arguments as in `fill`.

    Raises WeightsError, which lists the names, if tensors are missing, unexpected or misshaped, and for integers where
    the model expects floats: a cast would hide the error.
    """
    check_formats(files)
    shapes = expected_shapes(model)
    weights: dict[str, Weight] = {}
    missing: set[str] = set()
    misshaped: list[str] = []
    unread = {name for name in files.names if not ignored(name) and name.rpartition(".")[2] != MARKER}
    for name, entry in published.items():
        found = {key: find_part(files, key) for key in entry.names}
        missing |= {key for key, part in found.items() if part is None}
        parts = tuple(part for part in found.values() if part is not None)
        unread -= {key for part in parts for key in part.names}
        if len(parts) == len(found):
            weights[name] = Weight(entry, parts)
            if weights[name].shape != shapes[name]:
                misshaped.append(f"{entry.names[0]} {tuple(weights[name].shape)} instead of {tuple(shapes[name])}")
    kinds: dict[str, set[str] | list[str]] = {"missing": missing, "unexpected": unread, "misshaped": misshaped}
    if problems := [f"{len(names)} {kind}: {listed(names)}" for kind, names in kinds.items() if names]:
        raise WeightsError(f"{files.place} does not hold {what}: " + "; ".join(problems))
    integers = {name for name, tensor in model.state_dict().items() if not tensor.is_floating_point()}
    for part in (part for name, weight in weights.items() if name not in integers for part in weight.parts):
        if part.form == "plain" and not part.weight.dtype.is_floating_point:
            raise WeightsError(f"{part.description} has dtype {part.weight.dtype}, not a float: give the model's files")
    return weights


def transformer_names(model: nn.Module, files: TensorFiles) -> tuple[dict[str, PublishedTensor], Callable[[str], bool]]:
    """Return where each tensor of a transformer, or of a part of it, is in `files`, and which names to ignore."""
    prefix = next((p for p in ("model.diffusion_model.", "diffusion_model.") if f"{p}img_in.weight" in files.names), "")
    if f"{prefix}img_in.weight" in files.names:  # Black Forest Labs' names, possibly with ComfyUI's prefix
        published = {name: PublishedTensor((prefix + name,)) for name in expected_shapes(model)}
    else:
        published = {name: transformer_tensor(name) for name in expected_shapes(model)}
    return published, lambda name: bool(prefix) and not name.startswith(prefix)


def other_modules(published: Mapping[str, PublishedTensor]) -> Callable[[str], bool]:
    """Return a function that says whether a name belongs to none of the modules that are read.

    What is next to a weight that is read changes what it means: a scale, a bias.
    """
    read = tuple({f"{name.rpartition('.')[0]}." for entry in published.values() for name in entry.names})
    return lambda name: not name.startswith(read)


class BaseWeights:
    """The tensors of a published transformer with the names and shapes of `model`, by our names in its order.

    They are read one by one, without the model: the largest is 1.4 GB in float32, the model 64 GB in bfloat16. Raises
    WeightsError unless `files` hold exactly these tensors as floats: quantization has lost the original values.
    """

    def __init__(self, model: Transformer, files: TensorFiles, what: str) -> None:
        self.model, self.files = model, files
        self.weights = match_weights(model, files, *transformer_names(model, files), what)
        parts = [part for weight in self.weights.values() for part in weight.parts]
        if quantized := [part.weight.key for part in parts if part.form != "plain"]:
            raise WeightsError(
                f"{files.place} is quantized ({listed(quantized, 2)}): rounding would lose most of an adapter, and the "
                "original values are not in it. Give the published files in bfloat16 (--path)"
            )

    def each(self, names: Iterable[str], device: torch.device, use: Callable[[str, Tensor], None]) -> None:
        """Call `use` with each name and its tensor on `device`, in the dtype of the file, in this order."""

        def task(name: str, weight: Weight) -> ReadTask:
            return ReadTask(weight.reads(device), lambda tensors: use(name, weight.dequantized(tensors, torch.float32)))

        with torch.no_grad():
            run_tasks([task(name, self.weights[name]) for name in names])
        self.files.check_unchanged()


def load_transformer(
    source: ModelSource,
    device: torch.device | str = "cpu",
    precision: Precision | torch.dtype = torch.float32,
    *,
    cache: Path | None = None,
    host: Sequence[str] = (),
    devices: Mapping[str, torch.device] | None = None,
    say: Callable[[str], None] = print,
    ready: Callable[[nn.Module], None] | None = None,
) -> Transformer:
    """Return the transformer on `device` in `precision`, which may be a dtype, frozen, in evaluation mode.

    Args:
        cache: Folder of quantized copies (flux2/weights/quantized_cache.py). A copy of these files in this precision is
            loaded instead of the files; without one, a copy is written if anything was quantized. None: no copies.
        host: Modules (`single_blocks.3`) that stay in host memory; they are still quantized on `device`.
        devices: Devices of the modules, by name, that are not on `device` (flux2/memory/model_split.py).
        say: Receives a line for each copy that is read or written, and for files that are quantized.
        ready: Called with each block as soon as it is filled, and with the model at the end. It may replace parameters
            with shards of them; no quantized copy is written then.
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
        return {name: partial(ready, model.get_submodule(name)) for name in model.config.block_names} if ready else {}

    files = tensor_files(source, "transformer")
    model = build()
    copies, found = None, False
    if cache is not None and precision.storage is not None:
        copies = QuantizedCache(cache, source.variant.name, files, model, precision, say)
        found = copies.read(model, device_chooser(host, device, devices), blocks(model))
        if not found:
            model = build()  # without the tensors of a damaged copy
    if not found:
        published, ignored = transformer_names(model, files)
        digests = Digests() if copies is not None and ready is None else None
        what = f"the transformer of {source.variant.name}"
        modules = blocks(model)
        filled = fill(model, files, published, what, device, precision.dtype, ignored, host, digests, modules, devices)
        if description := filled.description(files):
            say(description)
        if copies and digests and filled.quantized:
            copies.write(model, digests)
    if ready is not None:
        ready(model)
    return model


def load_text_projection(source: ModelSource, device: torch.device | str, dtype: torch.dtype) -> nn.Linear:
    """Return the transformer's projection of embeddings, `txt_in`: (.., text_width) -> (.., hidden)."""
    with torch.device("meta"):
        projection = Transformer(source.variant.transformer).txt_in
    assert isinstance(projection, nn.Linear)
    model, files = nn.ModuleDict({"txt_in": projection}), tensor_files(source, "transformer")
    published, _ = transformer_names(model, files)
    fill(model, files, published, f"txt_in of {source.variant.name}", device, dtype, other_modules(published))
    return projection


def load_autoencoder(
    source: ModelSource, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Autoencoder:
    """Return the autoencoder on `device` in `dtype`, frozen, in evaluation mode."""
    config = source.variant.autoencoder
    with torch.device("meta"):
        model = Autoencoder(config)
    model.bn.num_batches_tracked = None  # only training needs the count
    files = tensor_files(source, "vae")
    if "encoder.down.0.block.0.conv1.weight" in files.names:
        published = {name: PublishedTensor((name,)) for name in expected_shapes(model)}
    else:
        published = {name: autoencoder_tensor(name, len(config.widths)) for name in expected_shapes(model)}
    name = f"the autoencoder of {source.variant.name}"
    fill(model, files, published, name, device, dtype, lambda name: name == "bn.num_batches_tracked")
    return model.eval()


def load_text_encoder(
    source: ModelSource,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    storage: TextStorage | None = None,
) -> TextEncoder:
    """Return the text encoder's layers that are read, on `device` in `dtype`, with its tokenizer.

    With `storage` each linear is quantized while the model is loaded; weights that are NF4 in the file are then kept as
    stored. Raises ValueError for an unknown `storage`, WeightsError for files of another model.
    """
    check_storage(storage, "storage")
    files = tensor_files(source, "text_encoder")
    folder = source.folder("text_encoder")
    text = source.variant.text
    if not (folder / "config.json").exists():
        raise WeightsError(f"{folder} holds no config.json. Give a complete text encoder")
    try:
        with torch.device("meta"):
            model = build(read_json(folder / "config.json"), text)
    except Exception as error:  # of reading, or of the library for values of another type
        raise WeightsError(f"{folder}: its config.json does not describe a text encoder ({error})") from error
    if storage is not None:
        quantize_text_encoder(model, storage, dtype)
    width = len(text.layers) * model.get_parameter("embed_tokens.weight").shape[1]
    if width != source.variant.transformer.text_width:
        raise WeightsError(
            f"{folder} gives embeddings of width {width}, but {source.variant.name} takes "
            f"{source.variant.transformer.text_width}. Give its own text encoder"
        )
    prefix = language_prefix(files)
    read = {name: PublishedTensor((prefix + name,)) for name in expected_shapes(model)}
    fill(model, files, read, f"the text encoder of {source.variant.name}", device, dtype, other_modules(read))
    rebuild_rotary(model, device)
    return TextEncoder(model, load_tokenizer(source.folder("tokenizer")), text)


def language_prefix(files: TensorFiles) -> str:
    """Return the prefix of a language model's tensors in `files`. Raises WeightsError if there is no language model."""
    # saved as a language model, as part of a vision-language model, or as such by newer versions of transformers
    prefixes = ("model.language_model.", "language_model.model.", "model.", "")
    prefix = next((p for p in prefixes if f"{p}embed_tokens.weight" in files.names), None)
    if prefix is None:
        raise WeightsError(f"{files.place} holds no language model: no tensor ends in embed_tokens.weight")
    return prefix


def text_encoder_fingerprint(source: ModelSource) -> str:
    """Return a digest of the text encoder's and the tokenizer's files. Raises WeightsError if they do not exist."""
    return fingerprint(source, "text_encoder") + fingerprint(source, "tokenizer")


def embedding_identity(
    text: TextConfig, files: str, length: int, dtype: torch.dtype, storage: TextStorage | None = None
) -> str:
    """Return what an embedding depends on besides its prompt, the same on any machine; `files` is the fingerprint."""
    return f"{text.kind} {files} {text.layers} {length} {dtype}" + (f" {storage}" if storage else "")


def rebuild_rotary(model: nn.Module, device: torch.device | str) -> None:
    """Recompute the rotary tables, which no file stores and which are empty on the meta device."""
    rotary = model.get_submodule("rotary_emb")
    with torch.device(device):
        model.rotary_emb = type(rotary)(model.config)
